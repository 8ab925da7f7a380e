"""Sources and lines of a run's settings -> samples, as they are learned and as they are asked."""

import dataclasses
import json

import numpy as np
import pytest
import soundfile
import words

pytest.importorskip("grain")

from qwen2audio_jax import Processor
from qwen2audio_jax.data.example import from_preference
from qwen2audio_jax.data.instruction import Task
from qwen2audio_jax.data.mixture import Mixture, Part
from qwen2audio_jax.data.sources import Made
from qwen2audio_jax.training import inputs, reference
from qwen2audio_jax.training.learner import Learner
from qwen2audio_jax.training.settings import DataConfig

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
        assert inputs.prompt_and_answer(example, processor)[1] == "<|en|>yes"


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
    given, wanted = inputs.prompt_and_answer(example, processor)
    assert processor.decode([ids_of(given.prompt)], skip_special_tokens=False) == [prompt]
    assert task.choices(sample) == answers
    if answers:
        end = processor.tokenizer.pad_id
        rest = ids_of(example.prompt[len(given.prompt) :])
        assert rest in [[*processor.tokenizer.encode(text), end] for text in answers]
        assert wanted in [text.strip() for text in answers]


def test_a_reference_answers_pairs_in_a_file_however_many(tmp_path, monkeypatch):
    """Only what is made has no end; its first samples have one."""
    whole = lambda part: (np.zeros((len(part.source), 2)), np.ones(len(part.source), bool))
    known = lambda path, part, model: whole(part)
    monkeypatch.setattr(reference, "_identity", lambda learner: "the same")
    monkeypatch.setattr(reference, "_read", known)
    nobody, made = (object.__new__(Learner), object.__new__(Mixture)), Made(lambda i: {}, 5)
    for source in (range(10**6), inputs.Head(made, 2)):
        part = Part(name="pairs", source=source, compile=from_preference)
        (answered,) = reference.precompute(*nobody, [part], tmp_path)
        assert len(answered.source) == len(source)
    with pytest.raises(ValueError, match="wants pairs in a file, got pairs"):
        reference.precompute(*nobody, [dataclasses.replace(part, source=made)], tmp_path)


def test_what_a_reference_has_answered_is_not_asked_again(tmp_path, monkeypatch):
    """A start that was killed leaves what it knew; rows that cannot be used stay unknown."""

    class Answers(Learner):
        def __init__(self, at_most):
            self.at_most, self.asked = at_most, []

        def reference_logps(self, batch):
            if len(self.asked) == self.at_most:
                raise KeyboardInterrupt
            self.asked.append(batch["rows"].tolist())
            return dict.fromkeys(reference.REFERENCE, -batch["rows"].astype(np.float32))

    batches = [{"rows": np.array(rows)} for rows in ([0, 3], [1, -1], [4, 2])]  # not 5
    monkeypatch.setattr(inputs, "once", lambda part, mixture: iter(batches))
    monkeypatch.setattr(reference, "_identity", lambda learner: "the same")
    monkeypatch.setattr(reference, "SAVE_EVERY", 0)
    part = Part(name="pairs", source=[{}] * 6, compile=from_preference)
    mixture, first, second, third = object.__new__(Mixture), Answers(2), Answers(9), Answers(0)
    with pytest.raises(KeyboardInterrupt):
        reference.precompute(first, mixture, [part], tmp_path)
    (answered,) = reference.precompute(second, mixture, [part], tmp_path)
    assert (first.asked, second.asked) == ([[0, 3], [1, -1]], [[4, 2]])
    (again,) = reference.precompute(third, mixture, [part], tmp_path)
    wanted = np.array([[0, -1, -2, -3, -4, np.nan]] * 2, np.float32).T
    for each in (answered, again):
        np.testing.assert_array_equal(each.source.logps, wanted)


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
