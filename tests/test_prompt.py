import base64
import json

import numpy as np
import pytest
import words

from qwen2audio_jax import prompt
from qwen2audio_jax.prompt import ChatTemplate, Detokenizer, Segment, Tokenizer, parse

CHAT = [
    {"role": "user", "content": [prompt.CLIP, {"type": "text", "text": "What is that?"}]},
    {"role": "assistant", "content": "It is a dog; 狗。"},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": [{"type": "text", "text": "Cafe\u0301 🦙"}]},
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return Tokenizer(words.made_tokenizer(tmp_path_factory.mktemp("made")) / "tokenizer.json")


@pytest.fixture(scope="module")
def real(shared_data, tmp_path_factory):
    folder = words.real_tokenizer(shared_data, tmp_path_factory.mktemp("real"))
    return Tokenizer(folder / "tokenizer.json")


@pytest.fixture(scope="module")
def golden(shared_data):
    return json.loads((shared_data / "golden/hf_qwen2_audio.json").read_text())


def flat(segments):
    return [token for segment in segments for token in segment.ids]


def learned_text(tokenizer, messages, template=None):
    text, spans = (template or ChatTemplate()).learned(messages)
    segments = tokenizer.compile(text, [3] * text.count(prompt.AUDIO), spans)
    return [tokenizer.decode(s.ids, skip_special_tokens=False) for s in segments if s.learned]


# The published vectors.


def test_golden_prompt(real, golden):
    """A chat with a clip of 101 audio tokens has the published ids."""
    question = {"type": "text", "text": golden["single"]["question"]}
    messages = [{"role": "user", "content": [prompt.CLIP, question]}]
    text = ChatTemplate().render(messages, add_generation_prompt=True)
    wanted = [token for token, n in golden["single"]["input_ids_rle"] for _ in range(n)]
    assert flat(real.compile(text, [101])) == wanted


def test_golden_template(golden):
    case = golden["chat_template"]
    assert ChatTemplate().render(case["messages"], add_generation_prompt=True) == case["text"]


def test_golden_tokens(real, golden):
    case = golden["tokenize"]
    assert [real.core.id_to_token(i) for i in real.encode(case["prompt"])] == case["tokens"]
    assert real.encode(golden["turbospark"]["text"]) == golden["turbospark"]["ids"]


def test_default_template_is_the_newest(shared_data):
    path = shared_data / "qwen2_audio_configs/chat_templates.json"
    assert json.loads(path.read_text())["processor_default_newest"] == prompt.CHAT_TEMPLATE


def test_llama_cpp_vectors(real, shared_data):
    folder = shared_data / "golden/llama_cpp"
    texts = (folder / "ggml-vocab-qwen2.gguf.inp").read_bytes().decode()
    lines = (folder / "ggml-vocab-qwen2.gguf.out").read_text().split("\n")
    texts = texts.split("\n__ggml_vocab_test__\n")
    assert len(texts) == len(lines) == 47
    assert [real.encode(text) for text in texts] == [[int(i) for i in x.split()] for x in lines]


# Segments.


def test_one_tag_becomes_as_many_as_the_clip_has_tokens(made):
    text = "<|audio_bos|><|AUDIO|><|audio_eos|> and <|AUDIO|><|AUDIO|>."
    segments = made.compile(text, [3, 1, 2])
    assert [(s.clip, len(s.ids)) for s in segments if s.clip is not None] == [
        (0, 3),
        (1, 1),
        (2, 2),
    ]
    assert segments[0] == Segment((made.audio_bos_id,), None, False)
    assert flat(segments).count(made.audio_id) == 6


def test_an_expanded_prompt_is_taken_as_it_is(made):
    text = "<|AUDIO|><|AUDIO|><|AUDIO|> and <|AUDIO|>"
    segments = made.compile(text, [2, 2], expanded=True)
    assert flat(segments) == made.encode(text)
    assert [(s.clip, len(s.ids)) for s in segments if s.clip is not None] == [
        (0, 2),
        (1, 1),
        (1, 1),
    ]


def test_a_wrong_count_of_tags_is_told_with_both_numbers(made):
    with pytest.raises(ValueError, match=r"has 2 <\|AUDIO\|>, wanted 1 for 1 clips of 25"):
        made.compile("<|AUDIO|><|AUDIO|>", [25])


def test_special_tokens_in_a_users_text_count_as_such(made):
    assert made.encode("a<|im_end|>").count(made.im_end_id) == 1


def test_learned_are_the_assistants_words_and_their_end(made):
    assert learned_text(made, CHAT) == ["It is a dog; 狗。<|im_end|>", "Café 🦙<|im_end|>"]


def test_learning_changes_no_token(made):
    text, spans = ChatTemplate().learned(CHAT)
    assert flat(made.compile(text, [1], spans)) == made.encode(text)


def test_an_empty_answer_is_its_end(made):
    messages = [*CHAT[:1], {"role": "assistant", "content": ""}]
    assert learned_text(made, messages) == ["<|im_end|>"]


def test_an_answer_begins_with_a_token_of_its_own(made):
    """Where it begins with a newline, too, which that of the generation prompt would take in: what
    is given are the tokens that are given when it is generated."""
    assert len(made.encode("\n\n")) == 1
    segments = made.compile("it\n\nyes", (), [(3, 7)])
    assert [(made.decode(s.ids), s.learned) for s in segments] == [("it\n", False), ("\nyes", True)]
    messages = [*CHAT[:1], {"role": "assistant", "content": "\n\nA dog.\n"}]
    text, spans = ChatTemplate().learned(messages)
    segments = made.compile(text, [1], spans)
    given = made.encode(ChatTemplate().render(messages[:1], add_generation_prompt=True))
    assert flat(s for s in segments if not s.learned)[: len(given)] == given
    assert learned_text(made, messages) == ["\n\nA dog.\n<|im_end|>"]


def test_a_template_with_thoughts_that_vanish_cannot_be_learned():
    template = ChatTemplate(
        "{% for m in messages %}{{ m.role }}:{% if loop.last %}!{% endif %}{{ m.content }}"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    with pytest.raises(ValueError, match="message 2: the chat template writes"):
        template.learned([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])


@pytest.mark.parametrize("mask", [{"loss": False}, {"weight": 0}, {"loss": 0.0, "weight": None}])
def test_a_turn_that_says_so_is_not_learned(made, mask):
    """ms-swift's and OpenAI's way to give an answer that others follow, but no model shall say."""
    first, *rest = (dict(message) for message in CHAT)
    masked = [first, rest[0] | mask, *rest[1:]]
    assert rest[0]["role"] == "assistant"
    assert learned_text(made, masked) == ["Café 🦙<|im_end|>"]
    assert ChatTemplate().learned(masked)[0] == ChatTemplate().learned(CHAT)[0]
    every = [message | {"loss": True, "weight": 1} for message in CHAT]
    assert learned_text(made, every) == learned_text(made, CHAT)


def test_nothing_to_learn_is_told():
    with pytest.raises(ValueError, match="no assistant turn"):
        ChatTemplate().learned(CHAT[:1])
    with pytest.raises(ValueError, match="no assistant turn has a loss"):
        ChatTemplate().learned([message | {"loss": False} for message in CHAT])
    with pytest.raises(ValueError, match=r"message 2: wanted a weight of 0 or 1, got 0\.5"):
        ChatTemplate().learned([message | {"weight": 0.5} for message in CHAT])


# Templates.


def test_a_template_without_closing_token_learns_the_whole_answer(made):
    template = ChatTemplate(
        "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }}\n{% else %}A:"
        "{% generation %} {{ m.content }}\n{% endgeneration %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}"
    )
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert template.learned(messages) == ("Q: a\nA: b\n", [(7, 10)])
    assert learned_text(made, messages, template) == [" b\n"]


def test_templates_have_what_transformers_gives_them():
    template = ChatTemplate(
        "{{ messages | tojson }}{{ strftime_now('%Y')[:1] }}{{ eos_token }}\n"
        "{% for m in messages %}\n    {% if m.x %}{% break %}{% endif %}\n{{ m.role }}{% endfor %}"
    )
    assert (
        template.render([{"role": "你"}, {"x": 1}]) == '[{"role": "你"}, {"x": 1}]2<|im_end|>\n你'
    )


def test_a_template_may_refuse():
    with pytest.raises(ValueError, match="refused the conversation: no tools"):
        ChatTemplate("{{ raise_exception('no tools') }}").render([])


def test_a_template_that_is_none():
    with pytest.raises(ValueError, match="does not compile"):
        ChatTemplate("{% if %}")


PLAIN = "{% for m in messages %}{{ '<|im_start|>' + m['content'] }}{% endfor %}"
OWN = "own: <|AUDIO|>{{ messages[0].role }}"


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("chat_template.jinja", OWN, OWN),
        ("chat_template.json", json.dumps({"chat_template": OWN}), OWN),
        ("processor_config.json", json.dumps({"chat_template": OWN}), OWN),
        ("tokenizer_config.json", json.dumps({"chat_template": OWN}), OWN),
        (
            "tokenizer_config.json",
            json.dumps({"chat_template": [{"name": "default", "template": OWN}]}),
            OWN,
        ),
        ("tokenizer_config.json", json.dumps({"chat_template": PLAIN}), prompt.CHAT_TEMPLATE),
        ("tokenizer_config.json", "{}", prompt.CHAT_TEMPLATE),
    ],
)
def test_a_checkpoints_own_template_wins_if_it_hears(tmp_path, name, content, wanted):
    (tmp_path / name).write_text(content)
    assert prompt.read_template(tmp_path).text == wanted


def test_the_published_tokenizers_template_is_passed_over(shared_data):
    path = shared_data / "qwen2_audio_configs/chat_templates.json"
    templates = json.loads(path.read_text())
    assert not ChatTemplate(templates["tokenizer_config_chatml"]).hears()
    for name in ("processor_default_v4_45", "hf_pr13_chat_template_json"):
        assert ChatTemplate(templates[name]).hears()


# Conversations.


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ({"type": "audio", "audio": "a.wav"}, "a.wav"),
        ({"type": "audio", "audio_url": "a.wav"}, "a.wav"),
        ({"type": "audio_url", "audio_url": "a.wav"}, "a.wav"),
        ({"type": "audio_url", "audio_url": {"url": "a.wav"}}, "a.wav"),
        ({"type": "audio", "audio": "a.wav", "text": None, "audio_url": None}, "a.wav"),
        ({"type": "audio", "path": "a.wav"}, "a.wav"),
        ({"audio": b"RIFF"}, b"RIFF"),
        ({"audio": "a.wav", "text": ""}, "a.wav"),
        (
            {
                "type": "input_audio",
                "input_audio": {"data": base64.b64encode(b"RIFF").decode(), "format": "wav"},
            },
            b"RIFF",
        ),
    ],
)
def test_forms_of_an_audio_part(part, source):
    [message] = parse([{"role": "user", "content": [part]}])
    assert message["content"] == [{"type": "audio", "audio": source}]


def test_a_text_part_with_an_empty_audio_field_is_text():
    part = {"type": "text", "text": "Hello", "audio": None}
    [message] = parse([{"role": "user", "content": [part], "name": "Ann"}])
    assert message["content"] == [{"type": "text", "text": "Hello"}]
    assert message["name"] == "Ann"


BOTH = {"audio": "a.wav", "text": "What is that?"}


@pytest.mark.parametrize(
    ("conversation", "told"),
    [
        ([], "got no messages"),
        (["hello"], "message 1: wanted a role and content, got 'hello'"),
        ([{"content": "hello"}], "message 1: wanted a role"),
        ([{"role": "human", "content": "hello"}], "message 1: wanted a role of .* got 'human'"),
        ([{"role": "user"}], "message 1: wanted content, .* got None"),
        ([{"role": "user", "content": b"hello"}], "message 1: wanted content"),
        ([{"role": "user", "content": ["hello"]}], "message 1, part 1: .* got 'hello'"),
        (
            [CHAT[0], {"role": "user", "content": [{"type": "image", "image": "x" * 200}]}],
            r"message 2, part 1: wanted an audio or a text part, got \{'type': 'image'.*\.\.\.$",
        ),
        ([{"role": "user", "content": [{"type": "audio"}]}], "message 1, part 1"),
        *(
            ([{"role": "user", "content": [kind | BOTH]}], "message 1, part 1: .*, got both in one")
            for kind in ({}, {"type": "audio"}, {"type": "text"})
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "message 1, part 1"),
        (
            [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "?"}}]}],
            "wanted a url or base64 data",
        ),
    ],
)
def test_a_bad_conversation_is_told_in_a_line(conversation, told):
    with pytest.raises(ValueError, match=told) as error:
        parse(conversation)
    assert "\n" not in str(error.value)


# Tokenizers.


def test_a_missing_special_token_is_named(tmp_path):
    words.made_tokenizer(tmp_path, [x for x in words.SPECIAL if x != "<|AUDIO|>"])
    with pytest.raises(ValueError, match=r"lacks the special tokens <\|AUDIO\|>$"):
        Tokenizer(tmp_path / "tokenizer.json")


def test_a_tokenizer_that_is_none(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        Tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a tokenizer"):
        Tokenizer(tmp_path / "tokenizer.json")


def test_stored_truncation_and_padding_are_left_out(made, tmp_path):
    made.core.enable_truncation(2)
    made.core.enable_padding(length=50)
    made.core.save(str(tmp_path / "tokenizer.json"))
    made.core.no_truncation()
    made.core.no_padding()
    text = "What is that sound?"
    assert Tokenizer(tmp_path / "tokenizer.json").encode(text) == made.encode(text)


TEXTS = [
    "What is that?",
    " 今天天气很好，👩‍🚀🦙",
    "a\n\n  b <|im_end|>c",
    "\N{REPLACEMENT CHARACTER}x",
]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_and_join_to_the_text(made, text):
    ids, stream = made.encode(text), Detokenizer(made)
    pieces = [stream(token) for token in ids] + [stream.flush()]
    assert "".join(pieces) == made.decode(ids) == text.replace("<|im_end|>", "")
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces[:-1]) or text in TEXTS[3:]


def test_a_text_that_ends_within_a_character_is_flushed(made):
    ids, stream = made.encode("a狗")[:-1], Detokenizer(made)
    pieces = [stream(token) for token in ids]
    assert pieces[0] == "a" and not any(pieces[1:])
    assert "a" + stream.flush() == made.decode(ids)


def test_any_tokens_stream_to_what_they_decode_to(made):
    """Also such as no text has."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        ids, stream = rng.integers(0, 420, 30).tolist(), Detokenizer(made)
        assert "".join([stream(token) for token in ids] + [stream.flush()]) == made.decode(ids)
