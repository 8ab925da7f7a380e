"""Sources and lines of a run's settings -> samples, as they are learned and as they are asked."""

import dataclasses
import json
import os
import pathlib
import re
import shutil

import numpy as np
import pytest
import soundfile
import tyro
import words

pytest.importorskip("grain")

from qwen2audio_jax import Processor
from qwen2audio_jax.data.chats import from_preference
from qwen2audio_jax.data.example import BadSample
from qwen2audio_jax.data.instruction import Task
from qwen2audio_jax.data.mixture import Mixture, Part
from qwen2audio_jax.data.pack import Bad, Bucket
from qwen2audio_jax.data.sources import Made, as_record, open_source, where, write
from qwen2audio_jax.training import held_out, inputs, reference
from qwen2audio_jax.training.data_config import DataConfig
from qwen2audio_jax.training.learner import Learner
from qwen2audio_jax.training.preference import PreferenceConfig
from qwen2audio_jax.training.run import as_json
from qwen2audio_jax.training.settings import PreferenceSettings

ASR = "[AUDIO:speech] Detect the language and recognize the speech: -> <|en|>[TEXT:text]"


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return Processor(words.made_tokenizer(tmp_path_factory.mktemp("words")))


def ids_of(compiled):
    return [token for segment in compiled for token in segment.ids]


@pytest.fixture
def rows(tmp_path, chirp):
    """Writes a manifest beside a clip, 0.wav; gives its path."""
    soundfile.write(tmp_path / "0.wav", chirp(0.2), 16_000)

    def write(*rows):
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return str(tmp_path / "rows.jsonl")

    return write


def test_clips_lie_beside_their_manifest_whatever_their_field(rows, processor):
    """A task's own fields name them, also for what is held out."""
    row = {"speech": "0.wav", "text": "yes"}
    path = rows({**row, "split": "train"}, {**row, "split": "test"})
    data = DataConfig(train=(f"{path}:train",), held_out=(f"{path}:test",), tasks=(ASR,))
    (part,), (kept,) = inputs.training(data), inputs.held_out(data, 5)
    for each in (part, kept.part):
        example = each.compile(each.source[0], processor)
        assert len(example.waves[0]) == 3200
        assert held_out.prompt_and_answer(example, processor)[1] == "<|en|>yes"


@pytest.mark.parametrize(
    ("line", "sample", "prompt", "answers"),
    [
        (
            "-> <|en|>[TEXT:hint,no_loss,closed_set=x|y] is [TEXT:text,closed_set=a|b]",
            {"hint": "x", "text": "b"},
            "What? <|en|>x",
            [" is a", " is b"],
        ),
        (
            "-> [TEXT:hint,no_loss] [TEXT:text,closed_set=a|b]",
            {"hint": "sound", "text": "b"},
            "What? sound",
            [" a", " b"],
        ),
        (
            "-> so[TEXT:hint,no_loss]und: [TEXT:text,closed_set=a|b]",
            {"hint": "what", "text": "b"},
            "What? sowhat",
            ["und: a", "und: b"],
        ),
        (
            "-> no[TEXT:hint,no_loss,optional] is[TEXT:text,optional,closed_set=among]",
            {"hint": {"bytes": None, "path": None}, "text": np.float32("nan")},
            "What?",
            [" no is"],
        ),
        ("-> [TEXT:hint,no_loss] [TEXT:text]", {"hint": "x", "text": "b"}, "What? x", None),
    ],
)
def test_choices_follow_what_is_given(processor, line, sample, prompt, answers):
    """An answer's slots that are not learned are in the prompt, with the sample's own text."""
    task = Task.parse(f"What? {line}")
    example = task.compile(sample, processor)
    given, wanted = held_out.prompt_and_answer(example, processor)
    assert processor.decode([ids_of(given.prompt)], skip_special_tokens=False) == [prompt]
    assert task.choices(sample) == answers
    unanswered = {name: value for name, value in sample.items() if name != "text"}
    asked = task.compile(unanswered, processor, learn=False)
    assert ids_of(asked.prompt) == ids_of(given.prompt)
    if answers:
        end = processor.tokenizer.pad_id
        rest = ids_of(example.prompt[len(given.prompt) :])
        assert rest in [[*processor.tokenizer.encode(text), end] for text in answers]
        assert wanted in [text.strip() for text in answers]


def test_of_answers_of_several_turns_the_first_is_wanted(processor):
    """No more can be said behind the prompt; of one to be rejected likewise."""
    turns = lambda *texts: [
        {"role": ("assistant", "user")[i % 2], "content": text} for i, text in enumerate(texts)
    ]
    record = {
        "messages": [{"role": "user", "content": "no?"}],
        "chosen": turns("yes", "no?", "a"),
        "rejected": turns("no", "no?", "a"),
    }
    example = from_preference(record, processor)
    assert held_out.prompt_and_answer(example, processor)[1] == "yes"
    assert held_out.text_of(example.rejected, processor) == "no"


def test_a_reference_answers_pairs_in_a_file_however_many(tmp_path, monkeypatch):
    """Only what is made has no end; its first samples have one."""
    known = lambda path, model, rows: (
        np.zeros((len(rows), 2)),
        np.array([[True], [False]]).repeat(len(rows), 1),
    )
    monkeypatch.setattr(reference, "_identity", lambda learner: "the same")
    monkeypatch.setattr(reference, "_fingerprints", lambda source: np.zeros(len(source), np.uint32))
    monkeypatch.setattr(reference, "_publish", lambda path, source, how: None)
    monkeypatch.setattr(reference, "_read", known)
    nobody, made = (Answers(0), shapes()), Made(lambda i: {}, 5)
    for source in (range(10**6), inputs.Drawn(made, 2)):
        part = Part(name="pairs", source=source, compile=from_preference)
        (answered,) = reference.precompute(*nobody, [part], tmp_path)
        assert len(answered.source) == len(source)
    with pytest.raises(ValueError, match="wants pairs in a file, got pairs"):
        reference.precompute(*nobody, [dataclasses.replace(part, source=made)], tmp_path)


def shapes(tokens=9):
    """A mixture of nothing but its batches' shapes."""
    bucket = Bucket(rows=1, tokens=tokens, clips=0, frames=4)
    nothing = Part(name="nothing", source=[{}], compile=from_preference)
    return Mixture(parts=(nothing,), processor="", buckets=(bucket,))


class Answers(Learner):
    """A reference that answers a number of batches, the row's number of answers to each pair."""

    def __init__(self, at_most, dtype=None):
        self.at_most, self.asked, self.dtype = at_most, [], dtype

    def reference_logps(self, batch):
        if len(self.asked) == self.at_most:
            raise KeyboardInterrupt
        self.asked.append(batch["rows"].tolist())
        return dict.fromkeys(reference.REFERENCE, -batch["rows"].astype(np.float32))


def test_what_a_reference_has_answered_is_not_asked_again(tmp_path, monkeypatch, caplog):
    """A start that was killed leaves what it knew; rows that cannot be used stay unknown."""
    batches = [{"rows": np.array(rows)} for rows in ([0, 3], [1, -1], [4, 2])]  # not 5
    monkeypatch.setattr(inputs, "once", lambda part, mixture, bad: iter(batches))
    monkeypatch.setattr(reference, "_identity", lambda learner: "the same")
    monkeypatch.setattr(reference, "SAVE_EVERY", 0)
    part = Part(name="pairs", source=[{}] * 6, compile=from_preference)
    mixture, first, second, third = shapes(), Answers(2), Answers(9), Answers(0)
    with pytest.raises(KeyboardInterrupt):
        reference.precompute(first, mixture, [part], tmp_path)
    (answered,) = reference.precompute(second, mixture, [part], tmp_path)
    assert (first.asked, second.asked) == ([[0, 3], [1, -1]], [[4, 2]])
    (again,) = reference.precompute(third, mixture, [part], tmp_path)
    wanted = np.array([[0, -1, -2, -3, -4, np.nan]] * 2, np.float32).T
    for each in (answered, again):
        np.testing.assert_array_equal(each.source.logps, wanted)
    (kept,) = (tmp_path / reference.FOLDER).glob("*.npz")
    for damaged in (b"", kept.read_bytes()[:-50], b"PK no zip"):  # asked once more, and told
        kept.write_bytes(damaged)
        caplog.clear()
        anew = Answers(9)
        (again,) = reference.precompute(anew, mixture, [part], tmp_path)
        assert anew.asked == [[0, 3], [1, -1], [4, 2]]
        np.testing.assert_array_equal(again.source.logps, wanted)
        assert f"{kept} is damaged, so the reference is asked again: " in caplog.text


def test_what_a_reference_was_asked_in_depends_on_shapes_and_arithmetic(tmp_path, monkeypatch):
    """What fitted no batch may fit longer ones; in another dtype all answers are others."""
    batches = [{"rows": np.array([i])} for i in range(3)]
    too_long = Bad(part="pairs", reason="too long", message="too long: fits none", row=2)

    def once(part, mixture, bad):
        yield from batches[:2]
        if mixture.buckets[0].tokens < 99:
            bad.append(too_long)
        elif len(part.source) == 3:
            yield batches[2]

    monkeypatch.setattr(inputs, "once", once)
    monkeypatch.setattr(reference, "_identity", lambda learner: "the same")
    part = Part(name="pairs", source=[{}] * 3, compile=from_preference)

    def start(tokens, dtype):
        learner = Answers(9, dtype)
        (answered,) = reference.precompute(learner, shapes(tokens), [part], tmp_path)
        return learner.asked, np.isfinite(answered.source.logps).all(axis=1).tolist()

    assert start(9, "float32") == ([[0], [1]], [True, True, False])
    assert start(9, "float32") == ([], [True, True, False])
    assert start(99, "float32") == ([[2]], [True, True, True])
    assert start(9, "bfloat16") == ([[0], [1]], [True, True, False])


def pair(text, clip="0.wav", **columns):
    asked = [{"type": "audio", "audio": clip}, {"type": "text", "text": "What?"}]
    given = [{"role": "user", "content": asked}]
    return {"messages": given, "chosen": text, "rejected": "no", **columns}


KNOWN = dict.fromkeys(reference.REFERENCE, -1.0)


def test_what_has_changed_is_asked_again(rows, tmp_path, chirp, monkeypatch):
    """Rows that say something else and clips that sound otherwise: of an equal name and number."""
    monkeypatch.setattr(reference, "_identity", lambda learner: "the same")
    once = lambda part, mixture, bad: iter(
        [{"rows": np.array([i])} for i in range(len(part.source))]
    )
    monkeypatch.setattr(inputs, "once", once)
    soundfile.write(tmp_path / "1.wav", chirp(0.2), 16_000)
    texts, mixture = ["a", "b", "c"], shapes()
    write = lambda: rows(*(pair(text, f"{i % 2}.wav") for i, text in enumerate(texts)))

    def asked(path):
        learner, data = Answers(9), DataConfig(train=(path,))
        parts = inputs.training(data, pairs=True)
        reference.precompute(learner, mixture, parts, tmp_path / "run")
        return learner.asked

    assert asked(write()) == [[0], [1], [2]] and asked(write()) == []
    texts[2] = "C"
    assert asked(write()) == [[2]]
    soundfile.write(tmp_path / "1.wav", chirp(0.3), 16_000)
    assert asked(write()) == [[1]]
    other = tmp_path / "other"
    other.mkdir()
    for name in ("0.wav", "1.wav", "rows.jsonl"):
        shutil.copy(tmp_path / name, other)
    assert asked(str(other / "rows.jsonl")) == [[0], [1], [2]]


def test_what_could_not_be_heard_is_asked_at_the_next_start(
    tmp_path, chirp, monkeypatch, caplog, processor
):
    """And nothing else is, not even read; what is wrong with a pair is told."""
    storage, read = {}, []

    def stored(path):
        read.append(path)
        if path not in storage:
            raise BadSample("missing audio", f"{path}: 503")
        return storage[path]

    monkeypatch.setattr("qwen2audio_jax.data.example._stored", stored)
    monkeypatch.setattr(reference, "_identity", lambda learner: "the same")
    soundfile.write(tmp_path / "0.wav", chirp(0.2), 16_000)
    heard = (tmp_path / "0.wav").read_bytes()
    names = [f"gs://bucket/{i}.wav" for i in range(4)]
    texts = ["a", "long " * 99, "c", "d"]
    pairs = [pair(text, name) for text, name in zip(texts, names, strict=True)]
    part = Part(name="unheard pairs", source=pairs, compile=from_preference)
    buckets = (Bucket(rows=2, tokens=90, clips=2, frames=60),)
    folder = str(words.made_tokenizer(tmp_path / "words"))
    mixture = Mixture(parts=(part,), processor=folder, buckets=buckets)

    def start(*there):
        storage.update({names[i]: heard for i in there})
        learner = Answers(9)
        read.clear()
        (answered,) = reference.precompute(learner, mixture, [part], tmp_path)
        return learner.asked, np.isfinite(answered.source.logps).all(axis=1).tolist(), [*read]

    assert start(0, 1) == ([[0, -1]], [True, False, False, False], names)
    assert "left out: unheard pairs: 1 too long, the last: row 1: too long: fits no" in caplog.text
    assert "left out: unheard pairs: 2 missing audio, the last: row 3: miss" in caplog.text
    assert start() == ([], [True, False, False, False], names[2:])
    assert "unheard pairs: still without a reference: none of 2 samples can be" in caplog.text
    assert start(3) == ([[1, -1]], [True, False, False, True], names[2:])
    assert start(2) == ([[0, -1]], [True, False, True, True], names[2:3])
    assert start() == ([], [True, False, True, True], [])


def test_shards_that_nobody_touched_are_not_read_to_look_for_changes(tmp_path, monkeypatch):
    """Touched, they are, once, and if they say the same nobody is asked."""
    write(tmp_path / "x.array_record", map(as_record, [pair("a"), pair("b")]))
    monkeypatch.setattr(reference, "_identity", lambda learner: "the same")
    monkeypatch.setattr(inputs, "once", lambda *_: iter([{"rows": np.array([0, 1])}]))
    monkeypatch.setattr(reference, "_publish", lambda path, source, how: None)
    looked = []
    fingerprints = reference._fingerprints
    look = lambda source: looked.append(source) or fingerprints(source)
    monkeypatch.setattr(reference, "_fingerprints", look)
    shards = Part(
        name="x", source=open_source(tmp_path / "x.array_record"), compile=from_preference
    )

    def start(asked):
        reference.precompute(learner := Answers(1), shapes(), [shards], tmp_path / "run")
        assert bool(learner.asked) == asked
        return len(looked)

    assert [start(True), start(False)] == [1, 1]
    os.utime(tmp_path / "x.array_record", (0, 0))
    assert [start(False), start(False)] == [2, 2]


def test_what_a_reference_has_answered_is_a_manifest_for_other_runs(
    rows, tmp_path, monkeypatch, processor, caplog
):
    """With both columns, and clips that are found from there; then nobody is asked, or kept. It is
    told if it was another reference, and if there can be no manifest."""
    monkeypatch.setattr(reference, "_identity", lambda learner: "the same")
    once = lambda part, mixture, bad: iter([{"rows": np.array([0, 2])}])
    monkeypatch.setattr(inputs, "once", once)
    rows(pair("a"), pair(""), pair("c") | {"note": "cut \ud83d"})  # within a smile
    monkeypatch.chdir(tmp_path)
    parts = inputs.training(DataConfig(train=("rows.jsonl",)), pairs=True)
    first, nobody = Answers(1), Answers(0)
    reference.precompute(first, shapes(), parts, tmp_path / "run")
    (path,) = (tmp_path / "run" / reference.PAIRS).iterdir()
    data = DataConfig(train=(str(path),))
    (part,) = parts = inputs.training(data, pairs=True)
    assert [[row[name] for name in reference.REFERENCE] for row in part.source] == [
        [0, 0],
        [-2, -2],
    ]
    assert len(part.compile(part.source[1], processor).waves[0]) == 3200
    assert not reference.settle(PreferenceSettings(), parts).keeps_reference
    assert reference.precompute(nobody, shapes(), parts, tmp_path / "other") == parts
    assert not caplog.records
    monkeypatch.setattr(reference, "_identity", lambda learner: "another")
    assert reference.precompute(nobody, shapes(), parts, tmp_path / "other") == parts
    assert "its log-probabilities are of another reference than --model" in caplog.text
    shards = dataclasses.replace(part, source=[pair("a", b"RIFF")] * 3, name="shards")
    reference.precompute(Answers(1), shapes(), [shards], tmp_path / "more")
    assert not list((tmp_path / "more" / reference.PAIRS).iterdir())
    assert "its rows hold their clips, which no manifest can" in caplog.text


def test_whether_rows_have_a_reference_s_answers_is_known_beforehand():
    """From the first row that can be read; what is learned and what is measured has to agree."""
    part = lambda *rows: Part(name=f"{len(rows)}", source=rows, compile=from_preference)
    without, known = part(pair("a"), pair("b", **KNOWN)), part([1], pair("a", **KNOWN), pair("b"))
    settings = PreferenceSettings()
    assert reference.settle(settings, [without, without]).keeps_reference
    assert not reference.settle(settings, [known, known]).keeps_reference
    with pytest.raises(
        ValueError, match="3 has ref_chosen_logps and ref_rejected_logps, 2 has not"
    ):
        reference.settle(settings, [without, known])
    for free in (PreferenceConfig(loss_type="orpo"), PreferenceConfig(reference_free=True)):
        settings = PreferenceSettings(preference=free)
        assert reference.settle(settings, [without, known]) == settings


@pytest.mark.parametrize("kind", [lambda i: i // 10, lambda i: i % 6])
def test_of_what_is_measured_there_is_some_of_every_kind(rows, processor, kind):
    """Whether rows are sorted or recur; always the same ones, each with its line."""
    path = rows(*({"speech": "0.wav", "text": f"{kind(i)}", "number": i} for i in range(60)))
    data = DataConfig(held_out=(path,), held_out_tasks=(ASR,))
    (kept,), (again,) = (inputs.held_out(data, 30) for _ in range(2))
    found = list(kept.part.source)
    assert found == list(again.part.source) and len(found) == 30
    numbers = [row["number"] for row in found]
    assert numbers == sorted(set(numbers)) and {row["text"] for row in found} == set("012345")
    assert where(kept.part.source, 29) == f"line {numbers[-1] + 1} of rows.jsonl"
    (whole,) = inputs.held_out(data, 99)
    assert [row["number"] for row in whole.part.source] == [*range(60)]


@pytest.fixture
def named(rows, tmp_path, monkeypatch):
    """Names that sources have: `named(sources)`; a/ and b/ hold rows.jsonl too."""
    row = {"speech": "0.wav", "text": "yes"}
    path = pathlib.Path(rows(*(row | {"split": split} for split in ("train", "test"))))
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        shutil.copy(path, folder)
    monkeypatch.chdir(tmp_path)

    def call(*sources):
        here = [source.replace("HERE", str(tmp_path)) for source in sources]
        data = DataConfig(train=tuple(here), tasks=(ASR,))
        kept = DataConfig(held_out=tuple(here), held_out_tasks=(ASR,))
        names = [part.name for part in inputs.training(data)]
        assert [each.part.name for each in inputs.held_out(kept, 1)] == names
        return names

    return call


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (["rows.jsonl"], ["rows.jsonl"]),
        (["./rows.jsonl"], ["rows.jsonl"]),
        (["HERE/a/../rows.jsonl:train"], ["rows.jsonl:train"]),
        (["a/rows.jsonl:train", "a/rows.jsonl:test"], ["rows.jsonl:train", "rows.jsonl:test"]),
        (
            ["a/rows.jsonl:train", "HERE/b/rows.jsonl:train", "b/rows.jsonl"],
            ["a/rows.jsonl:train", "b/rows.jsonl:train", "rows.jsonl"],
        ),
        (
            ["a/rows.jsonl", "HERE/a/rows.jsonl", "b/rows.jsonl"],
            ["a/rows.jsonl", "a/rows.jsonl (2)", "b/rows.jsonl"],
        ),
    ],
)
def test_sources_are_called_by_as_little_of_their_paths_as_tells_them_apart(named, sources, names):
    """So that rows are in the same order wherever they lie, and however that is written."""
    assert named(*sources) == names


def test_what_is_no_path_keeps_its_name():
    """And so does a path that is the end of another."""
    sources = ("world:small/tasks", "tfds:a/b:train[:1%]", "/b/rows.jsonl", "gs://a/b/rows.jsonl")
    wanted = (*sources[:3], "a/b/rows.jsonl")
    assert inputs.names(sources) == dict(zip(sources, wanted, strict=True))


def test_what_a_reference_says_of_other_rows_has_a_file_of_its_own(rows):
    """What is held out may change from start to start of a run."""
    row = {"messages": [], "chosen": "a", "rejected": "b"}
    one = DataConfig(held_out=(rows(row, row, row),))
    known = {inputs.held_out(one, samples, pairs=True)[0].rows for samples in (1, 2, 3, 9)}
    assert len(known) == 3
    rows(row, row, row, row)
    assert inputs.held_out(one, 2, pairs=True)[0].rows not in known


def test_a_mistake_in_a_line_says_in_which(rows):
    """Where several sources have one each."""
    path = rows({"speech": "0.wav", "text": "yes"})
    wrong = "[AUDIO:speech] What? -> [TEXT:text,loud]"
    with pytest.raises(ValueError, match=re.escape(f"task {wrong!r}: column 36: wanted an attri")):
        inputs.training(DataConfig(train=(path, path), tasks=(ASR, wrong)))


@pytest.mark.parametrize(
    ("line", "end"),
    [
        (r"-> [TEXT:text,closed_set=yes|no<\|im_end\|>]", "<|im_end|>"),
        (r"What? -> [TEXT:text,closed_set=yes<\|endoftext\|>|no]", "<|endoftext|>"),
    ],
)
def test_closed_answers_that_nothing_could_choose_are_refused_at_once(rows, line, end):
    """To be measured; they are learned, too."""
    path = rows({"text": "yes"})
    assert inputs.training(DataConfig(train=(path,), tasks=(line,)))
    told = re.escape(f"held_out {path}: wanted closed answers without {end}, ")
    with pytest.raises(ValueError, match=told):
        inputs.held_out(DataConfig(held_out=(path,), held_out_tasks=(line,)), 5)


def test_tags_that_a_tokenizer_lacks_are_told(processor, tmp_path, caplog):
    """Once for each task, in whatever style; a tag around a field is the sample's."""
    given = {"train": ("a.jsonl", "b.jsonl"), "style": "tags"}
    line = r"[AUDIO:a] <|never|> -> <|[TEXT:l]|>[TEXT:t,closed_set=<\|zh\|>|no] <|e-n|> <||>"
    data = DataConfig(**given, held_out=("c.jsonl",), tasks=(line,), tags=("<|x|><|a b|>",))
    inputs.tell_tags(data, processor.tokenizer)
    told = "the model's tokenizer takes <|x|>, <|zh|>, <|e-n|> for text, not for tags"
    told = f"task {line!r}: {told}; {inputs.HOW}"
    assert [record.getMessage() for record in caplog.records] == [told]
    caplog.clear()
    known = words.made_tokenizer(tmp_path, [*words.SPECIAL, "<|x|>", "<|zh|>", "<|e-n|>"])
    inputs.tell_tags(data, Processor(known).tokenizer)
    inputs.tell_tags(DataConfig(train=("a.jsonl",)), processor.tokenizer)
    assert not caplog.records


def test_a_style_that_nothing_has_is_refused(rows):
    """Conversations have no hints at a task that could be put otherwise."""
    path = rows({"messages": ANSWERED})
    with pytest.raises(ValueError, match=r"data\.style none is of tasks: wanted --data\.tasks, "):
        inputs.training(DataConfig(train=(path,), style="none"))


PAIR = {"chosen": "yes", "rejected": "no"}
ASKED = [{"role": "user", "content": "Yes?"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "yes"}]


@pytest.mark.parametrize(
    ("row", "line", "pairs", "told"),
    [
        ({"speech": "0.wav"}, ASR, True, ": wanted pairs of answers, which have no task, got '[A"),
        ({"messages": ANSWERED}, "", True, "or 'rejected_response'), got rows of messages"),
        ({"prompt": ASKED, **PAIR}, "", False, "--data.tasks, got rows of prompt, chosen, reject"),
        ({"messages": ASKED, **PAIR}, "", False, "--data.tasks, got rows of messages, chosen"),
        ({"speech": "0.wav", "text": "yes"}, "", False, ": wanted conversations ('messages' with"),
        ({"messages": ANSWERED, **PAIR}, "", False, None),
        ({"messages": ANSWERED}, "", False, None),
        ({"prompt": ASKED, **PAIR}, "", True, None),
    ],
)
def test_every_stage_says_which_rows_it_takes(rows, row, line, pairs, told):
    """Of what is learned and of what is held out, before anything is built; one row may be bad."""
    path = rows(row, row)
    learned = DataConfig(train=(path,), tasks=(line,))
    kept = DataConfig(held_out=(path,), held_out_tasks=(line,))
    calls = (
        lambda: inputs.training(learned, pairs=pairs),
        lambda: inputs.held_out(kept, 5, pairs=pairs),
    )
    for call in calls:
        if told is None:
            assert len(call()) == 1
            continue
        with pytest.raises(ValueError, match=f"^{re.escape(path)}.*{re.escape(told)}"):
            call()
    if told and not line:
        rows(row, {"messages": ANSWERED, **PAIR}, {"x": 0})
        assert all(len(call()) == 1 for call in calls)


@pytest.mark.parametrize(
    ("source", "pairs", "wanted"),
    [
        ("world:small/preference", False, "wanted tasks or conversations, got "),
        ("world:small/chat", True, "wanted pairs of answers, world:NAME/preference, got "),
        ("world:small/tasks", True, "wanted pairs of answers, world:NAME/preference, got "),
    ],
)
def test_what_is_made_is_for_one_stage(source, pairs, wanted):
    with pytest.raises(ValueError, match=f"^{wanted}{source}$"):
        inputs.training(DataConfig(train=(source,)), pairs=pairs)
    with pytest.raises(ValueError, match=f"^{wanted}{source}:test$"):
        inputs.held_out(DataConfig(held_out=(f"{source}:test",)), 5, pairs=pairs)


def test_words_are_wanted_where_ctc_learns_from_them(rows):
    """From any source; without them, audio states would be taught nothing, in silence."""
    said = [{"audio": "0.wav", "words": "yes"}, {"text": "What?"}]
    clip = [{"audio": "0.wav"}, {"text": "What?"}]
    path = rows({"speech": "0.wav", "text": "yes", "messages": ANSWERED})
    named = ASR.replace("speech", "speech,words=text")
    of = lambda *lines: DataConfig(train=(path,) * len(lines), tasks=lines)
    for lines in ((ASR,), ("",), (ASR, "")):
        inputs.training(of(*lines))
        with pytest.raises(ValueError, match=r"^ctc: wanted words .*words=FIELD\].*--ctc 0 does"):
            inputs.training(of(*lines), words=True)
    assert len(inputs.training(of(ASR, named), words=True)) == 2
    wrong = ASR.replace("speech", "speech,words=txt")
    assert len(inputs.training(of(wrong))) == 1
    with pytest.raises(ValueError, match=r"words=txt of its fields, got speech, text, messages"):
        inputs.training(of(named, wrong), words=True)
    talk = lambda parts: {"messages": [{"role": "user", "content": parts}, ANSWERED[1]]}
    rows(talk(clip), talk(said), {"messages": "broken"})
    assert len(inputs.training(of(""), words=True)) == 1


def test_words_that_few_rows_have_are_found(rows, monkeypatch, caplog):
    """In a manifest wherever they are; what is dear to read may have some that were not looked at,
    which is told."""
    named = ASR.replace("speech", "speech,words=said")
    talk = lambda **words: {
        "messages": [{"role": "user", "content": [{"audio": "0.wav", **words}]}, ANSWERED[1]]
    }
    of = lambda path, line: DataConfig(train=(path,), tasks=(line,))
    row = {"speech": "0.wav", "text": "yes"}
    for line, few, many in ((named, row | {"said": "yes"}, row), ("", talk(words="yes"), talk())):
        monkeypatch.undo()
        drawn = inputs.Drawn(range(300), inputs.LOOKED)._rows
        place = next(i for i in range(300) if i not in drawn)
        written = [few if i == place else many for i in range(300)]
        path = rows(*written)
        assert len(inputs.training(of(path, line), words=True)) == 1
        path = rows(*[many] * 300)
        with pytest.raises(ValueError, match=r"words=said of its fields, got|^ctc: wanted words"):
            inputs.training(of(path, line), words=True)
        monkeypatch.setattr(inputs, "Manifest", ())  # as shards, which have the clips in them
        with pytest.raises(ValueError, match=r"words=said of its fields, got|^ctc: wanted words"):
            inputs.training(of(path, line), words=True)
        assert not caplog.records
        monkeypatch.setattr(inputs, "SEARCHED", 200)
        assert len(inputs.training(of(path, line), words=True)) == 1
        (told,) = [record.getMessage() for record in caplog.records]
        assert told.startswith(f"{path}: none of 200 of its 300 rows has words")
        caplog.clear()


@pytest.mark.parametrize("name", ["augmented", "masked"])
def test_each_source_is_augmented_as_much_as_is_said_of_it(rows, name):
    """Or all alike; on the command line, too, where a preset has one number."""
    path, preset = rows({"speech": "0.wav", "text": "yes"}), DataConfig(**{name: 0.4})
    flags = ["--train", path, path, "--tasks", ASR, f"--{name}"]
    for given, wanted in (("0.3", [0.3, 0.3]), ("0.3 0", [0.3, 0.0])):
        for default in (DataConfig(), preset):
            data = tyro.cli(DataConfig, args=flags + given.split(), default=default)
            assert [getattr(part, name) for part in inputs.training(data)] == wanted
    silent = tyro.cli(DataConfig, args=[f"--{name}"])
    assert getattr(silent, f"{name}_each") == (0.0,)
    whole = tyro.cli(DataConfig, args=[], default=preset)
    assert getattr(whole, name) == 0.4 == as_json(whole)[name]


def test_a_rate_of_nothing_is_refused():
    with pytest.raises(ValueError, match="wanted a sampling rate of at least 1, got 0"):
        DataConfig(rate=0)


def test_each_source_has_tags_of_its_own(rows, processor):
    """Or all have one; a line without any is refused where tags are the style."""
    path = f"{rows({'speech': '0.wav', 'text': 'yes', 'split': 'train'})}:train"
    tags = ("<|transcribe|>", "<|caption|>")
    tagged = {"tasks": (ASR,), "style": "tags", "train": (path, path)}
    one, two = inputs.training(DataConfig(**tagged, tags=tags))
    for part, tag in ((one, tags[0]), (two, tags[1])):
        given = part.compile(part.source[0], processor).prompt
        assert tag in processor.decode([ids_of(given)], False)[0]
    with pytest.raises(ValueError, match="wanted tags for 2 sources, got 3"):
        DataConfig(**tagged, tags=(*tags, ""))
    with pytest.raises(ValueError, match="style 'tags' wants tags="):
        inputs.training(DataConfig(**tagged))
