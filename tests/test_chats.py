"""Conversations and preferences are compiled as they are asked; what cannot be used says why."""

import pickle

import numpy as np
import pytest
import soundfile
import words

from qwen2audio_jax import Processor, prompt
from qwen2audio_jax.data.chats import from_messages, from_preference, is_pair, says_words
from qwen2audio_jax.data.example import BadSample

QUESTION = {"type": "text", "text": "What is that sound?"}


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return Processor(words.made_tokenizer(tmp_path_factory.mktemp("words")))


@pytest.fixture
def heard(tmp_path, chirp):
    """A user's turn with a recording."""
    soundfile.write(tmp_path / "clip.wav", chirp(0.7), 16_000, "FLOAT")
    part = {"type": "audio", "audio": str(tmp_path / "clip.wav")}
    return {"role": "user", "content": [part, QUESTION]}


def ids_of(compiled):
    return [token for segment in compiled for token in segment.ids]


def learned_of(processor, compiled):
    ids = [token for segment in compiled if segment.learned for token in segment.ids]
    return processor.decode(ids, skip_special_tokens=False)[0]


def says(text):
    return {"role": "assistant", "content": text}


def test_conversations_are_learned_as_they_are_asked(processor, heard, chirp):
    """The processor's tokens; every assistant's turn and its end is learned, and no more."""
    messages = [heard, says("A dog."), heard, says("那是狗。")]
    example = from_messages({"messages": messages, "source": "mine"}, processor)
    assert learned_of(processor, example.prompt) == "A dog.<|im_end|>那是狗。<|im_end|>"
    np.testing.assert_array_equal(
        processor.batch([example.prompt], example.waves, labels=True)["labels"],
        processor(messages, labels=True)["labels"],
    )
    asked = processor(messages[:3])["input_ids"][0].tolist()
    assert ids_of(example.prompt)[: len(asked)] == asked
    for wave in example.waves:
        np.testing.assert_array_equal(wave, chirp(0.7))


def test_what_is_said_may_stand_beside_a_clip(processor, heard):
    """It goes with its clip, and changes nothing of what is read."""
    silent, said = heard["content"][0], {**heard["content"][0], "words": "open the door"}
    messages = [{"role": "user", "content": [silent, said, QUESTION]}, says("A dog.")]
    example = from_messages({"messages": messages}, processor)
    assert example.words == ([], processor.tokenizer.encode("open the door"))
    for value, text in ((7, "7"), (" 7.5 ", "7.5"), (float("nan"), ""), (b"a dog", "a dog")):
        messages[0]["content"][1] = {**silent, "words": value}
        assert says_words({"messages": messages}) == bool(text)
        again = from_messages({"messages": messages}, processor)
        assert again.words == ([], processor.tokenizer.encode(text))
    messages[0]["content"][1] = {**silent, "words": ["open", "the", "door"]}
    assert not says_words({"messages": messages})
    messages[0]["content"][1] = silent
    assert ids_of(example.prompt) == ids_of(from_messages({"messages": messages}, processor).prompt)


def named(heard):
    return heard["content"][0]["audio"]


def test_clips_may_stand_beside_a_conversation(processor, heard, tmp_path, chirp):
    """As ms-swift writes them: each is heard at its `<audio>`; one in an answer is only said."""
    soundfile.write(tmp_path / "other.wav", chirp(0.4, 1), 16_000, "FLOAT")
    clips = [named(heard), {"bytes": None, "path": str(tmp_path / "other.wav")}]
    parts = lambda *some: {"role": "user", "content": list(some)}
    clip, other = ({"type": "audio", "audio": each} for each in clips)
    asked, answered = "<audio>What is that, and <audio>that?", "A dog and an <audio>."
    record = {
        "messages": [{"role": "user", "content": asked}, says(answered)],
        "audios": clips,
        "audio": None,  # as tables fill what is absent
    }
    first, second = {"text": "What is that, and "}, {"text": "that?"}
    messages = [parts(clip, first, other, second), says(answered)]
    wanted = from_messages({"messages": messages}, processor)
    example = from_messages(record, processor)
    assert example.prompt == wanted.prompt and example.words == ([], [])
    for wave, seconds, seed in zip(example.waves, (0.7, 0.4), (0, 1), strict=True):
        np.testing.assert_array_equal(wave, chirp(seconds, seed))
    silent = {"messages": [{"role": "user", "content": "Hello."}, says("Hello.")]}
    empty = from_messages({**silent, "audios": [], "audio_url": ""}, processor)
    assert empty.prompt == from_messages(silent, processor).prompt


def test_parts_without_a_source_take_the_clips_in_order(processor, heard):
    """As chat templates have them, and TRL beside its media."""
    content = [{"type": "audio"}, QUESTION, {"type": "audio", "audio": None}]
    record = {"messages": [{"role": "user", "content": content}, says("Yes.")]}
    clips = [named(heard)] * 2
    whole = [{"audio": clips[0]}, QUESTION, {"audio": clips[1]}]
    wanted = from_messages(
        {"messages": [{"role": "user", "content": whole}, says("Yes.")]}, processor
    )
    example = from_messages({**record, "audios": clips}, processor)
    assert example.prompt == wanted.prompt and len(example.waves) == 2
    with pytest.raises(BadSample, match=r"'audios' for each of 2 <audio>, got 1"):
        from_messages({**record, "audios": clips[:1]}, processor)


def test_a_piece_of_a_recording_is_heard(processor, heard, chirp):
    """Where a part says which; the words are that piece's."""
    part = {**heard["content"][0], "offset": 0.2, "duration": "0.3", "words": "a dog"}
    messages = [{"role": "user", "content": [part, QUESTION]}, says("Yes.")]
    example = from_messages({"messages": messages}, processor)
    np.testing.assert_array_equal(example.waves[0], chirp(0.7)[3200:8000])
    assert example.words == (processor.tokenizer.encode("a dog"),)
    asked = processor(messages[:1])["input_ids"][0].tolist()
    assert ids_of(example.prompt)[: len(asked)] == asked


@pytest.mark.parametrize("form", ["messages", "pair", "implicit prompt"])
def test_a_row_s_system_comes_first(processor, heard, form):
    """ms-swift's column; the same as the first message once more is that."""
    system = {"role": "system", "content": "Be brief."}
    make, row = {
        "messages": (from_messages, lambda head: {"messages": [*head, heard, says("a")]}),
        "pair": (
            from_preference,
            lambda head: {"messages": [*head, heard, says("a")], "rejected_response": "b"},
        ),
        "implicit prompt": (
            from_preference,
            lambda head: {name: [*head, heard, says(name)] for name in ("chosen", "rejected")},
        ),
    }[form]
    wanted = make(row([system]), processor)
    for head in ([], [system]):
        assert make({**row(head), "system": "Be brief."}, processor).prompt == wanted.prompt
    assert make({**row([]), "system": ""}, processor).prompt == make(row([]), processor).prompt
    with pytest.raises(BadSample, match="'system' or the first message to say it, got both"):
        make({**row([system]), "system": "Be long."}, processor)


FORMS = ["texts", "messages", "prompt", "implicit prompt", "both", "UltraFeedback", "ms-swift"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("beside", [False, True])
def test_pairs_share_their_prompt(processor, heard, form, beside):
    """Each answer behind it is what training on that conversation sees, however it was written."""
    whole = messages = [heard, says("Yes."), {"role": "user", "content": "And over?"}]
    if beside:
        text = f"<audio>{QUESTION['text']}"
        messages = [{"role": "user", "content": text}, *messages[1:]]
    chosen, rejected = "今天天气很好。", "No\n"
    record = {
        "texts": {"messages": messages, "chosen": chosen, "rejected": rejected},
        "messages": {"messages": messages, "chosen": says(chosen), "rejected": says(rejected)},
        "prompt": {"prompt": messages, "chosen": [says(chosen)], "rejected": [says(rejected)]},
        "implicit prompt": {
            "chosen": [*messages, says(chosen)],
            "rejected": [*messages, says(rejected)],
        },
        "both": {
            "prompt": QUESTION["text"],
            "chosen": [*messages, says(chosen)],
            "rejected": [*messages, says(rejected)],
        },
        "UltraFeedback": {
            "prompt": QUESTION["text"],
            "chosen": [*messages, says(chosen)],
            "rejected": [*messages, says(rejected)],
            "messages": [*messages, says(chosen)],
        },
        "ms-swift": {
            "messages": [*messages, says(chosen)],
            "rejected_response": rejected,
            "rejected": None,  # as tables fill what is absent
        },
    }[form]
    record |= {"audios": [named(heard)] * beside}
    assert is_pair(record)
    pair = from_preference(record, processor)
    messages = whole
    assert ids_of(pair.prompt) == processor(messages)["input_ids"][0].tolist()
    assert learned_of(processor, pair.prompt) == ""
    assert len(pair.waves) == 1
    for answer, text in ((pair.chosen, chosen), (pair.rejected, rejected)):
        whole = from_messages({"messages": [*messages, says(text)]}, processor).prompt
        row = ids_of(pair.prompt + answer)
        # what is learned ends with the turn; a line's end follows in the template
        assert ids_of(whole)[: len(row)] == row
        assert learned_of(processor, answer) == f"{text}<|im_end|>"
        assert all(segment.learned for segment in answer)


def test_a_prompt_may_be_a_text(processor, heard):
    """TRL's plain form: it is what a user says."""
    record = {"prompt": f"<audio>{QUESTION['text']}", "chosen": "Yes.", "rejected": "No."}
    pair = from_preference(record | {"audios": [named(heard)]}, processor)
    assert ids_of(pair.prompt) == processor([heard])["input_ids"][0].tolist()
    assert learned_of(processor, pair.chosen) == "Yes.<|im_end|>" and len(pair.waves) == 1


def test_an_answer_may_be_several_turns(processor, heard):
    """What is between the assistant's turns is not learned."""
    turns = [says("Yes."), {"role": "user", "content": "And over?"}, says("No.")]
    record = {"messages": [heard], "chosen": turns, "rejected": "It is the sound of glass."}
    pair = from_preference(record, processor)
    assert learned_of(processor, pair.chosen) == "Yes.<|im_end|>No.<|im_end|>"
    assert "And over?" in processor.decode(ids_of(pair.chosen))[0]


def test_bad_conversations_say_why(processor, heard, chirp):
    """A reason to count them under, and one line; also when they come from another process."""
    clip = lambda source: {"role": "user", "content": [{"type": "audio", "audio": source}]}
    clip_in = lambda part: {"role": "user", "content": [{**part, "audio": named(heard)}]}
    said = lambda words: turn([{"audio": named(heard), "words": words}])
    turn = lambda content: {"role": "user", "content": content}
    long = clip((chirp(30.1), 16_000))
    beside = lambda content, audios, **rest: (
        from_messages,
        {"messages": [turn(content), says("a")], "audios": audios, **rest},
    )
    learn = lambda *messages: (from_messages, {"messages": list(messages)})
    prefer = lambda chosen, rejected, **rest: (
        from_preference,
        {"messages": [heard], "chosen": chosen, "rejected": rejected, **rest},
    )
    swift = lambda messages, rejected: (
        from_preference,
        {"messages": messages, "rejected_response": rejected},
    )
    for (make, record), reason, message in (
        ((from_messages, {"text": "a"}), "missing field", "no 'messages' among text"),
        ((from_messages, {"messages": "a"}), "bad conversation", "list of messages, got str"),
        (learn(), "bad conversation", "got no messages"),
        (learn({"role": "judge"}), "bad conversation", "message 1: wanted a role of"),
        (learn(heard), "bad conversation", "no assistant turn"),
        (learn(heard, says(" ")), "empty text", "message 2: the assistant says nothing"),
        (learn(heard, {**heard, "role": "assistant"}), "bad conversation", "is text, got audio"),
        (learn(clip("no.wav"), says("a")), "missing audio", "no.wav: there is no such file"),
        (learn(clip(b"no sound"), says("a")), "corrupt audio", "8 bytes: "),
        (learn(long, says("a")), "too long", "wanted at most 30 s, got 30.10 s"),
        (
            learn({"role": "user", "content": prompt.AUDIO}, says("a")),
            "special token in text",
            "message 1: wanted no <|AUDIO|>",
        ),
        (beside("<audio>a", []), "bad conversation", "'audios' for each of 1 <audio>, got 0"),
        (beside("<audio>a", None), "bad conversation", "'audios' for each of 1 <audio>, got 0"),
        (beside("a", [named(heard)]), "bad conversation", "each of 0 <audio>, got 1"),
        (beside([QUESTION], [named(heard)]), "bad conversation", "each of 0 <audio>, got 1"),
        (
            beside("<audio>a", [named(heard)], rejected_audios=["b.wav"]),
            "bad conversation",
            "wanted a row without 'rejected_audios'",
        ),
        (
            beside("<audio>a", ["a.wav"], tools=[{"name": "f"}]),
            "bad conversation",
            "'tools', which",
        ),
        (
            learn(turn([{"audio": named(heard), "start": 0.1, "end": 0.2}]), says("a")),
            "bad conversation",
            "wanted a piece of a clip by its offset and duration, got 'start'",
        ),
        (
            learn(turn([{"audio": named(heard), "offset": 0.5, "duration": 0.5}]), says("a")),
            "corrupt audio",
            "lasts 0.70 s, wanted a piece from 0.5 s to 1 s",
        ),
        (learn(clip((np.zeros(800), 16_000)), says("a")), "silent", "is silent: its peak is 0"),
        (beside("<audio>a", "a.wav"), "bad conversation", "wanted a list of clips, got str"),
        (beside("<audio>a", ["no.wav"]), "missing audio", "no.wav: there is no such file"),
        (beside("<audio>a", [{}]), "bad conversation", "wanted a url or base64 data, got {}"),
        (beside("a", None, audio="a.wav"), "bad conversation", "the row: wanted each clip as"),
        (beside("a", None, audio_url=long), "bad conversation", "got 'audio_url'"),
        (learn({**heard, "audio": "a.wav"}, says("a")), "bad conversation", "message 1: wanted"),
        (learn(heard, {**says("a"), "audios": ["a"]}), "bad conversation", "message 2: wanted"),
        (learn(said(["a"]), says("a")), "not text", "message 1: words: wanted a text, got list"),
        (learn(said(prompt.PAD), says("a")), "special token in text", "message 1: words: wanted"),
        (learn(clip_in(QUESTION), says("a")), "bad conversation", "got both in one"),
        (learn(clip_in({"text": "a"}), says("a")), "bad conversation", "got both in one"),
        (learn(clip_in({"audio_url": "b"}), says("a")), "bad conversation", "got 'audio_url'"),
        (prefer("a", "b", audio="a.wav"), "bad conversation", "the row: wanted each clip as"),
        (prefer("a", "b", audios=["a.wav"]), "bad conversation", "each of 0 <audio>, got 1"),
        (prefer("a", [says("b"), turn("<audio>"), says("c")]), "bad conversation", "got 0"),
        (prefer("a", {**says("b"), "audio": "b"}), "bad conversation", "message 1: wanted each"),
        (learn(heard, says("a<|im_end|>")), "special token in text", "wanted no <|im_end|>"),
        (learn(heard, says("\ud800")), "not text", "message 2: wanted letters, got half of one"),
        (prefer("<|endoftext|>", "b"), "special token in text", "wanted no <|endoftext|>"),
        (prefer("a", None), "missing field", "no 'rejected' among"),
        (prefer("a", ""), "empty text", "the assistant says nothing"),
        (prefer("a", "a"), "equal answers", "got the same"),
        (prefer("a", 5), "bad conversation", "list of messages, got int"),
        (prefer("a", heard), "bad conversation", "no assistant turn"),
        (prefer("a", "b", messages=[heard, says("c")]), "bad conversation", "a user's turn"),
        (prefer("a", [says("b"), heard]), "bad conversation", "begins and ends with"),
        (
            prefer([turn("Hm?"), says("a")], [turn("Hm?"), says("b")]),
            "bad conversation",
            "wanted 1 clips in the answers, which begin with their prompt, too, got 0",
        ),
        (swift([says("a")], "b"), "bad conversation", "got no messages"),
        (swift([heard], "b"), "bad conversation", "got no messages"),
        (swift("a", "b"), "bad conversation", "list of messages, got str"),
        (swift([heard, says("a")], "a"), "equal answers", "got the same"),
    ):
        with pytest.raises(BadSample) as caught:
            make(record, processor)
        error = pickle.loads(pickle.dumps(caught.value))
        assert error.reason == reason, error
        assert message in str(error)
        assert "\n" not in str(error)
