"""A line declares a task: what it compiles to is what the processor makes when it is asked."""

import dataclasses
import importlib
import pickle
import re
import sys

import numpy as np
import pytest
import words

from qwen2audio_jax import Processor, audio, prompt
from qwen2audio_jax.data.example import BadSample, hear
from qwen2audio_jax.data.instruction import Task, hierarchical_tags
from qwen2audio_jax.data.slots import TYPES, Filled, slot_type

ASR = "[AUDIO:speech] Detect the language and recognize the speech: -> <|en|>[TEXT:text]"
TAG = "<|audio_bos|><|AUDIO|><|audio_eos|>"


@pytest.fixture(scope="module", params=["language tags", "no language tags"])
def processor(request, tmp_path_factory):
    special = ["<|en|>"] if request.param == "language tags" else []
    folder = tmp_path_factory.mktemp("words")
    return Processor(words.made_tokenizer(folder, words.SPECIAL + special))


def ids_of(compiled):
    return [token for segment in compiled for token in segment.ids]


def learned_of(compiled):
    return [token for segment in compiled if segment.learned for token in segment.ids]


def given(line, sample, processor, **options):
    """What a line's prompt and what its answer says; the pieces of a clip as one."""
    example = Task.parse(line, **options).compile(sample, processor)
    asked = Task.parse(line, **options).compile(sample, processor, learn=False)
    assert ids_of(example.prompt)[: len(ids_of(asked.prompt))] == ids_of(asked.prompt)
    text = lambda ids: processor.decode(ids, skip_special_tokens=False)[0] if ids else ""
    once = [s if s.clip is None else dataclasses.replace(s, ids=s.ids[:1]) for s in example.prompt]
    whole, shown = text(ids_of(once)), len(text(ids_of(once[: len(asked.prompt)])))
    return whole[:shown], whole[shown:], text(learned_of(example.prompt))


def check_recognition(processor, source, text):
    """Token for token the reference's prompt, which the processor's is; then the answer."""
    example = Task.parse(ASR).compile({"speech": source, "text": text}, processor)
    batch = processor.batch([example.prompt], example.waves, labels=True)
    asked = processor(text=prompt.transcription("en"), audio=[source])
    encode = processor.tokenizer.encode
    answer = [*encode(" <|en|>" + text), processor.tokenizer.pad_id]
    beginning = asked["input_ids"][0, : -len(encode(" <|en|>"))].tolist()
    assert ids_of(example.prompt) == beginning + answer
    language = asked["input_ids"].shape[1]  # the reference's prompt has the answer's language
    np.testing.assert_array_equal(batch["input_ids"][:, :language], asked["input_ids"])
    np.testing.assert_array_equal(
        batch["labels"][0], [-100] * len(beginning) + answer
    )  # no more and no less than the answer
    for key in ("input_features", "feature_attention_mask"):
        np.testing.assert_array_equal(batch[key], asked[key])
    alone = Task.parse(ASR).compile({"speech": source}, processor, learn=False)
    assert ids_of(alone.prompt) == beginning
    assert processor.decode(batch["labels"])[0].endswith(text)


@pytest.mark.parametrize("text", ["What is that sound?", "今天天气很好。那是什么声音？"])
def test_recognition_is_compiled_as_it_is_asked(processor, chirp, text):
    check_recognition(processor, (chirp(1.3), audio.SAMPLE_RATE), text)


def test_recognition_of_real_clips_in_the_real_vocabulary(shared_data, tmp_path):
    processor = Processor(words.real_tokenizer(shared_data, tmp_path))
    check_recognition(processor, str(shared_data / "speech_en/jfk.flac"), "And so my fellow 美国人")


def test_several_clips_texts_and_literals(processor, chirp):
    """Slots on both sides, in order; a backslash writes what would be syntax."""
    line = (
        r"[AUDIO:a] [AUDIO:b] Is \[it\] [TEXT:what]\, a \-> b? -> "
        r"\[[TEXT:first,no_loss]\n-> and \\ [TEXT:second] -- ]"
    ).replace("n->", r"n\->")
    clips = {"a": (chirp(0.5), 16_000), "b": (chirp(0.9), 16_000)}
    sample = clips | {"what": " a cat\n", "first": 7, "second": b"dogs"}
    left, right, learned = given(line, sample, processor)
    assert left == f"{TAG}{TAG}Is [it] a cat, a -> b? [7"
    assert right == "\n-> and \\ dogs -- ]<|endoftext|>"
    assert learned == " [" + right
    example = Task.parse(line).compile(sample, processor)
    assert [len(wave) for wave in example.waves] == [8000, 14_400]
    assert [s.clip for s in example.prompt if s.clip is not None] == [0, 1]


def test_clips_in_the_answer_follow_those_of_the_prompt(processor, chirp):
    """They are heard, and not learned."""
    line = "[AUDIO:a] And -> that: [AUDIO:b,no_loss] a dog"
    sample = {"a": (chirp(0.5), 16_000), "b": (chirp(0.9), 16_000)}
    assert given(line, sample, processor) == (
        f"{TAG}And that: {TAG}",
        "a dog<|endoftext|>",
        " that: a dog<|endoftext|>",
    )
    example = Task.parse(line).compile(sample, processor)
    counts = [(s.clip, len(s.ids)) for s in example.prompt if s.clip is not None]
    assert counts == [(0, 12), (1, 22)]


def test_the_words_of_a_clip_go_with_it(processor, chirp):
    """A field of each slot's own, for CTC; clips have none where nobody knows them, as where there
    is nothing but a clip to ask about; bad samples say why."""
    line = "[AUDIO:a,words=said][AUDIO:b] Which? -> [AUDIO:c,no_loss,words=sung] that"
    task = Task.parse(line)
    clips = {name: (chirp(0.3), 16_000) for name in "abc"}
    sample = {**clips, "said": "one two", "sung": None}
    wanted = processor.tokenizer.encode("one two")
    assert task.compile(sample, processor).words == (wanted, [], [])
    assert task.compile(sample, processor, learn=False).words == (wanted, [], [])
    assert Task.parse("[AUDIO:a] -> b").compile(clips, processor).words == ([],)
    for learn in (True, False):
        assert task.compile(clips, processor, learn=learn).words == ([], [], [])
    with pytest.raises(BadSample, match="'said': wanted a text, got list"):
        task.compile({**sample, "said": ["one"]}, processor)


def test_a_piece_of_a_recording_is_heard(processor, chirp):
    """By the fields that say which, as NeMo's manifests do."""
    task = Task.parse("[AUDIO:call,offset=offset,duration=duration] What? -> [TEXT:text]")
    call = (chirp(2.0), 16_000)
    sample = {"call": call, "offset": 0.5, "duration": 0.25, "text": "one"}
    (wave,) = task.compile(sample, processor).waves
    np.testing.assert_array_equal(wave, chirp(2.0)[8000:12000])
    (rest,) = task.compile({**sample, "offset": 1, "duration": None}, processor).waves
    np.testing.assert_array_equal(rest, chirp(2.0)[16000:])
    for change, reason, message in (
        ({"duration": 1.8}, "corrupt audio", "lasts 2.00 s, wanted a piece from 0.5 s to 2.3 s"),
        ({"offset": 2.5}, "corrupt audio", "lasts 2.00 s, wanted a piece from 2.5 s"),
        ({"offset": -1}, "corrupt audio", "an offset from 0 and a duration above 0, got an offset"),
        ({"offset": "soon"}, "corrupt audio", "wanted offset in seconds, got 'soon'"),
        ({"duration": 0.01}, "corrupt audio", "lasts 10 ms there, wanted at least 25 ms"),
        ({"call": (chirp(40.0), 16_000), "duration": 31}, "too long", "at most 30 s, got 31.00 s"),
    ):
        with pytest.raises(BadSample, match=re.escape(message)) as caught:
            task.compile({**sample, **change}, processor)
        assert caught.value.reason == reason
    with pytest.raises(BadSample, match="missing field: no 'offset' among call, text"):
        task.compile({"call": call, "text": "one"}, processor)
    quiet = chirp(2.0).copy()
    quiet[8000:16000] = 0
    with pytest.raises(BadSample, match=r"silent: .*is silent from 0.5 s on: its peak is 0"):
        task.compile({**sample, "call": (quiet, 16_000)}, processor)


def test_text_without_a_clip(processor):
    """Questions; and plain text, of which all is learned and which begins with no space."""
    sample = {"q": "What can you hear?", "text": "今天"}
    assert given("[TEXT:q] -> [TEXT:text]", sample, processor)[:2] == (
        "What can you hear?",
        " 今天<|endoftext|>",
    )
    example = Task.parse("-> [TEXT:text]").compile(sample, processor)
    assert example.waves == ()
    assert learned_of(example.prompt) == ids_of(example.prompt)
    assert processor.decode(ids_of(example.prompt)) == ["今天"]


def test_optional_slots_may_be_empty(processor, chirp):
    line = "[AUDIO:clip,optional][TEXT:hint,optional] What? -> no[TEXT:more,optional]"
    absent = {"clip": {"bytes": None, "path": None}, "hint": float("nan"), "more": None}
    for nothing in ({}, {"clip": None, "hint": " ", "more": ""}, absent):
        assert given(line, nothing, processor)[:2] == (" What?", " no<|endoftext|>")
    full = {"clip": (chirp(0.2), 16_000), "hint": "a dog", "more": "yes"}
    assert given(line, full, processor)[:2] == (f"{TAG}a dog What?", " noyes<|endoftext|>")


def test_closed_sets(processor):
    """The sample's value is in the set, and the set is what can be answered."""
    listed = Task.parse(r"Is it? -> [TEXT:a,closed_set=a dog | a dog barks|a\|b]!")
    assert listed.choices({}) == [" a dog!", " a dog barks!", " a|b!"]
    with pytest.raises(BadSample, match=r"outside closed set: 'a' is 'cat', wanted one of \['a d"):
        listed.compile({"a": "cat"}, processor)
    given("Is it? -> [TEXT:a,closed_set=a dog|a cat]", {"a": "a dog"}, processor)
    own = Task.parse("Is it? -> <|en|>[TEXT:a,closed_set=among][TEXT:b,optional,closed_set=.|!]")
    sample = {"a": "no", "among": ["yes", "no"]}
    assert own.choices(sample) == [f" <|en|>{a}{b}" for a in ("yes", "no") for b in (".", "!", "")]
    own.compile(sample, processor)
    with pytest.raises(BadSample, match="missing field: no 'among' among a"):
        own.choices({"a": "no"})
    for among in ("yes", None, float("nan"), [], {"yes": 1}):  # as a table's empty cells are
        told = f"missing field: 'among': wanted a list, got {among!r}"
        with pytest.raises(BadSample, match=f"^{re.escape(told)}$"):
            own.choices({"among": among})
    assert Task.parse("Is it? -> [TEXT:a,closed_set=b] [TEXT:c]").choices({"b": ["a"]}) is None


def test_closed_sets_do_not_multiply_without_end(monkeypatch):
    """What a line lists is refused with it, what a sample lists with that; alone it may be long."""
    ten = "|".join("0123456789")
    line = lambda *sets: "-> " + " ".join(f"[TEXT:x,closed_set={each}]" for each in sets)
    told = "wanted closed sets that allow at most 10000 answers together, got "
    with pytest.raises(ValueError, match=f"^{told}1000000$"):
        Task.parse(line(*[ten] * 6))
    with pytest.raises(ValueError, match=f"^{told}100000$"):
        Task.parse(line(*[ten] * 5, "among"))
    assert len(Task.parse(line(*[ten] * 4)).choices({})) == 10_000
    Task.parse(f"{line(*[ten] * 6)} [TEXT:open]")  # no end, and nothing to write out
    own = Task.parse(line(*[ten] * 3, "among"))
    assert len(own.choices({"among": [*"abcdefghij"]})) == 10_000
    with pytest.raises(BadSample, match=f"^too many answers: {told}11000$"):
        own.choices({"among": [*"abcdefghijk"]})
    assert len(Task.parse(line("among")).choices({"among": [*map(str, range(20_000))]})) == 20_000


def test_tags_say_what_the_prompt_said(processor, chirp):
    """In its place, behind the clips; what slots give and the answer stay the same."""
    line = "[TEXT:hint] then [AUDIO:a] Answer [TEXT:q] or [TEXT:r]: -> <|en|>[TEXT:text]"
    sample = {"a": (chirp(0.4), 16_000), "hint": "no", "q": "What?", "r": "A dog?", "text": "yes",
              "language": "zh"}  # fmt: skip
    tags = hierarchical_tags("transcribe", audio_language="[TEXT:language]", instruction="wo_itn")
    answer = " <|en|>yes<|endoftext|>"
    assert given(line, sample, processor, tags=tags, style="tags") == (
        f"no{TAG}<|startoftranscript|><|zh|><|transcribe|><|en|><|notimestamps|><|wo_itn|>"
        "What? A dog?",
        answer,
        answer,
    )
    assert given(line, sample, processor, style="none") == (f"no{TAG}What? A dog?", answer, answer)
    assert given(line, sample, processor, tags=tags)[0] == f"no then {TAG}Answer What? or A dog?:"
    analysis = hierarchical_tags("caption", timestamps=True)
    assert analysis == "<|startofanalysis|><|unknown|><|caption|><|en|><|timestamps|>"
    given_only = ids_of(
        Task.parse("[TEXT:q] -> a", tags="<|en|>", style="tags")
        .compile(sample, processor, learn=False)
        .prompt
    )
    tag = processor.tokenizer.core.token_to_id("<|en|>")
    assert (given_only[0] == tag) == (tag is not None)  # text where the vocabulary has no such tag


def test_tags_that_do_not_fit_are_refused():
    for tags, message in (
        (None, "style 'tags' wants tags=, got none"),
        ("<|a|> -> b", "tags: column 7: wanted 0 of '->'"),
        ("<|[WORD:a]|>", "tags: column 4: wanted a slot type"),
    ):
        with pytest.raises(ValueError, match=message.replace("|", r"\|").replace("[", r"\[")):
            Task.parse(ASR, tags=tags, style="tags")
    with pytest.raises(ValueError, match="wanted a style of prompt, tags, none, got 'tag'"):
        Task.parse(ASR, style="tag")
    with pytest.raises(ValueError, match=r"wanted a language code.*got 'English'"):
        hierarchical_tags("translate", audio_language="en", text_language="English")
    with pytest.raises(ValueError, match=r"wanted a task of transcribe, .* got 'asr'"):
        hierarchical_tags("asr")
    with pytest.raises(ValueError, match="wanted one word as an output instruction, got '<a>'"):
        hierarchical_tags("caption", instruction="<a>")


OWN = "text without special tokens (clips, '[AUDIO:FIELD]', and the end bring their own)"
WRONG = {
    "[AUDO:x] -> [TEXT:t]": "column 2: wanted a slot type of AUDIO, TEXT, got 'AUDO'",
    "a [AUDIO:x": "column 11: wanted ']' to close the slot of column 3, got the end of the line",
    "[AUDIO:x [TEXT:y] -> a": "column 10: wanted ']' to close the slot of column 1, got '['",
    "[AUDIO] -> a": "column 7: wanted ':' and the name of a field, got none",
    "hello": "column 6: wanted '->' before what is learned, got the end of the line",
    "a -> ": "column 6: wanted what is learned behind '->', got the end of the line",
    "a -> b  -> c": "column 9: wanted 1 of '->' (literal: '\\->'), got one more",
    "[TEXT:a,no_loss] -> b": "column 9: wanted no_loss behind the arrow, got it before, where"
    " nothing is learned",
    "a -> [AUDIO:x]": "column 6: wanted no_loss for an AUDIO slot behind the arrow, got none",
    "a -> [TEXT:x,closed_set]": "column 24: wanted a field, or texts parted by '|', got nothing",
    "a -> [TEXT:x,closed_set=b| |c]": "column 28: wanted a field, or texts parted by '|', got"
    " nothing",
    "[AUDIO:x, max_seconds=40] -> a": "column 23: wanted seconds above 0 and up to 30, got '40'",
    "[AUDIO:x,max_seconds=nan] -> a": "column 22: wanted seconds above 0 and up to 30, got 'nan'",
    "[AUDIO:x, closed_set=b] -> a": "column 11: wanted an attribute of AUDIO (duration,"
    " max_seconds, no_loss, offset, optional, words), got 'closed_set'",
    "[AUDIO:x,words=] -> a": "column 16: wanted the name of a field, got nothing",
    "a -> [TEXT:x,no_loss=1]": "column 22: wanted an attribute without a value, got '1'",
    "a -> [TEXT:x,no_loss,no_loss]": "column 22: wanted no_loss once, got it again",
    "a -> b [TEXT:x,no_loss] ": "column 25: wanted what is learned behind no_loss, got the end of"
    " the line",
    "a -> <|[TEXT:x,no_loss]|> b": "column 8: wanted a tag, <|...|>, that is learned as a whole,"
    " got no_loss in it",
    "a <|AUDIO|> -> b": f"column 3: wanted {OWN}, got <|AUDIO|>",
    "-> [TEXT:t]<|im_end|>": f"column 12: wanted {OWN}, got <|im_end|>",
    r"[TEXT:\\] a <\|im_st\art|> -> b": f"column 13: wanted {OWN}, got <|im_start|>",
    "a -> b\\": "column 7: wanted a character behind '\\', got the end of the line",
    "a -> [TEXT:x\\]": "column 15: wanted ']' to close the slot of column 6, got the end of the"
    " line",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_mistake_in_a_line_is_pointed_at(line):
    with pytest.raises(ValueError) as caught:
        Task.parse(line)
    assert str(caught.value) == WRONG[line]


def test_bad_samples_say_why(processor, chirp, tmp_path):
    """A reason to count them under, and one line; also when they come from another process."""
    (tmp_path / "bad.wav").write_bytes(b"RIFF no sound")
    clip = lambda seconds: (chirp(seconds), 16_000)
    task = Task.parse(ASR.replace(":speech", ":speech,max_seconds=2"))
    for sample, reason, message in (
        ({"text": "a"}, "missing field", "no 'speech' among text"),
        ({"speech": clip(1)}, "missing field", "no 'text' among speech"),
        ({"speech": None, "text": "a"}, "missing audio", "wanted a clip, got none"),
        ({"speech": "no.wav", "text": "a"}, "missing audio", "no.wav: there is no such file"),
        ({"speech": str(tmp_path / "bad.wav"), "text": "a"}, "corrupt audio", "bad.wav: "),
        ({"speech": clip(2.5), "text": "a"}, "too long", "wanted at most 2 s, got 2.50 s"),
        ({"speech": clip(1), "text": " \n"}, "empty text", "'text' says nothing"),
        ({"speech": clip(1), "text": None}, "empty text", "'text' says nothing"),
        ({"speech": clip(1), "text": float("nan")}, "empty text", "'text' says nothing"),
        ({"speech": clip(1), "text": np.float32("nan")}, "empty text", "'text' says nothing"),
        ({"speech": clip(1), "text": ["a"]}, "not text", "wanted a text, got list"),
        ({"speech": clip(1), "text": "<|AUDIO|>"}, "special token in text", "no <|AUDIO|>, got"),
        ({"speech": clip(1), "text": "<|im_end|> x"}, "special token in text", "'text': wanted no"),
        ({"speech": clip(1), "text": "a \ud800"}, "not text", "wanted letters, got half of one in"),
        ({"speech": clip(1), "text": f"a {prompt.PAD}"}, "special token in text", "<|endoftext|>"),
    ):
        with pytest.raises(BadSample) as caught:
            task.compile(sample, processor)
        error = pickle.loads(pickle.dumps(caught.value))
        assert error.reason == reason
        assert message in str(error)
        assert str(error).startswith(reason)
    with pytest.raises(BadSample, match=r"too long: .*wanted at most 30 s, got 30.10 s"):
        Task.parse(ASR).compile({"speech": clip(30.1), "text": "a"}, processor)
    assert pickle.loads(pickle.dumps(task)) == task


def test_tags_in_a_field_are_its_own(processor):
    """Of time and language, say; also where the line writes the tag around the field."""
    sample = {"text": "<|0.50|> yes <|1.00|><|en|>", "language": "en"}
    wanted = " <|en|><|0.50|> yes <|1.00|><|en|><|endoftext|>"
    assert given("Say -> <|[TEXT:language]|>[TEXT:text]", sample, processor)[1] == wanted


@pytest.fixture
def new_types(monkeypatch):
    """CODES and BROKEN, to be gone again after the test."""
    monkeypatch.setattr("qwen2audio_jax.data.slots.TYPES", {**TYPES})
    monkeypatch.delitem(sys.modules, "slot_types", raising=False)
    importlib.import_module("slot_types")


def test_a_new_type_is_a_function(processor, new_types):
    """Codec tokens, say: learned as words of the vocabulary, with an attribute of their own."""
    sample = {"c": [1, 2, 3]}
    assert given("Say: -> [CODES:c]", sample, processor)[1] == " 1 2 3<|endoftext|>"
    assert given("Say: -> [CODES:c,rate=2]", sample, processor)[1] == " 1 2<|endoftext|>"
    for wrong in ("rate=0", "rate=fast", "rate"):
        with pytest.raises(ValueError, match=r"^column (19|20): rate: (wanted|invalid)"):
            Task.parse(f"-> x [CODES:c,{wrong}]")
    with pytest.raises(
        ValueError, match=r"attribute of CODES \(no_loss, optional, rate\), got 'x'"
    ):
        Task.parse("-> [CODES:c,x=2]")
    task = Task.parse("-> [CODES:c,rate=2]")
    assert pickle.loads(pickle.dumps(task)) == task and hash(task) == hash(task)


def test_a_new_type_that_is_heard_need_not_say_words(processor, chirp, new_types):
    """Its clips stand beside those of which they are known."""
    slot_type("NOISE", heard=True)(lambda value, slot, sample: Filled(TAG, (hear(value),)))
    sample = {name: (chirp(0.3), 16_000) for name in "ab"} | {"said": "yes no"}
    task = Task.parse("[NOISE:a][AUDIO:b,words=said] Which? -> one")
    assert task.compile(sample, processor).words == ([], processor.tokenizer.encode("yes no"))


def test_attributes_that_nothing_reads_are_refused_at_once():
    with pytest.raises(ValueError, match=r"slot type X: wanted attributes of .*, got rate"):
        slot_type("X", attributes=["rate"])
    with pytest.raises(ValueError, match=r"slot type X: wanted parsers of new names, got words"):
        slot_type("X", parsers={"words": str})


def test_workers_know_new_types(tmp_path, new_types, caplog):
    """Which another process registered; of a mistake in one is said, once, where it is."""
    pytest.importorskip("grain")
    from qwen2audio_jax.data.mixture import Mixture, Part
    from qwen2audio_jax.data.pack import Bucket

    folder = str(words.made_tokenizer(tmp_path / "words"))
    parts = [
        Part(name=name, source=rows, compile=Task.parse(line).compile)
        for name, rows, line in (
            ("codes", [{"c": [i, 7, 9]} for i in range(8)], "Say: -> [CODES:c,rate=2]"),
            ("broken", [{"c": [i]} for i in range(8)], "Say: -> [BROKEN:c]"),
        )
    ]
    bucket = Bucket(rows=2, tokens=40, clips=0, frames=0)
    how = {"processor": folder, "buckets": (bucket,), "workers": 1, "shuffle": False}
    batches = iter(Mixture(parts=tuple(parts), **how))
    batch = next(batches)
    learned = batch["labels"][0][batch["segment_ids"][0] == 1]
    assert Processor.from_pretrained(folder).decode([learned[learned >= 0]])[0].strip() == "0 7"
    counts = batches.counts
    batches.close()
    assert counts["codes"]["bad"] == {} and list(counts["broken"]["bad"]) == ["unforeseen"]
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith("broken: row 0: AttributeError: ") and "in _of_a_typing_mistake" in told
    batches = iter(Mixture(parts=(parts[1],), **how | {"workers": 0}, fatal=True))
    caplog.clear()
    with pytest.raises(ValueError, match=r"^part 'broken': row 0: AttributeError"):
        next(batches)
    batches.close()
    assert "in _of_a_typing_mistake" in caplog.text
