"""Settings of a run that mean nothing are refused in one line, before anything is read."""

import re

import pytest

from qwen2audio_jax.training.settings import (
    DataConfig,
    EvaluationConfig,
    LoopConfig,
    Lora,
    PreferenceSettings,
    Settings,
)


@pytest.mark.parametrize(
    ("train", "held_out", "told"),
    [
        ("rows.jsonl", "rows.jsonl", "train has rows.jsonl"),
        ("rows.jsonl", "rows.jsonl:test", "train has rows.jsonl"),
        ("rows.jsonl:test", "rows.jsonl:test", "train has rows.jsonl:test"),
        ("rows.jsonl:train", "rows.jsonl", "train has rows.jsonl:train"),
        ("./rows.jsonl", "rows.jsonl", "train has ./rows.jsonl"),
        ("shards", "shards/", "train has shards"),
        ("tfds:words:train", "tfds:words:train[:1%]", "train has tfds:words:train"),
        ("world:small/chat", "world:small/chat", "train has world:small/chat"),
    ],
)
def test_what_is_measured_is_not_learned(train, held_out, told):
    wanted = re.escape(f"held_out {held_out} is learned, too: {told}")
    with pytest.raises(ValueError, match=wanted):
        DataConfig(train=(train,), held_out=(held_out,))


def test_splits_are_told_apart():
    DataConfig(train=("rows.jsonl:train",), held_out=("rows.jsonl:test", "others.jsonl"))
    DataConfig(train=("world:small/chat",), held_out=("world:small/chat:test",))
    DataConfig(train=("tfds:words:train[1%:]",), held_out=("tfds:words:train[:1%]",))


def test_lines_and_weights_are_counted_by_name():
    sources = ("a.jsonl", "b.jsonl")
    with pytest.raises(ValueError, match="wanted tasks for 2 sources, got 3"):
        DataConfig(train=sources, tasks=("x",) * 3)
    with pytest.raises(ValueError, match="wanted held_out_tasks for 1 sources, got 2"):
        DataConfig(train=sources, tasks=("x", "y"), held_out=("c.jsonl",))


@pytest.mark.parametrize(
    ("make", "wrong", "message"),
    [
        (DataConfig, {"augmented": 40.0}, "augmented from 0 to 1, got 40.0"),
        (DataConfig, {"masked": -1.0}, "masked from 0 to 1, got -1.0"),
        (DataConfig, {"workers": -1}, "workers from 0, got -1"),
        (EvaluationConfig, {"rows": 0}, "rows of at least 1, got 0"),
        (LoopConfig, {"profile": (9, 3)}, r"a first and a last step to profile, got \(9, 3\)"),
        (LoopConfig, {"best": "colour"}, "wanted a best of .*, got 'colour'"),
        (Lora, {"start": "adapter"}, "wanted lora.r beside lora.start adapter, got 0"),
        (Settings, {"gradient_accumulation_steps": 0}, "at least 1, got 0"),
        (Settings, {"ctc": -1.0}, "ctc from 0, got -1.0"),
        (PreferenceSettings, {"ctc": 0.3}, "ctc is for pretraining and SFT"),
    ],
)
def test_values_that_mean_nothing_are_refused(make, wrong, message):
    with pytest.raises(ValueError, match=message):
        make(**wrong)


@pytest.mark.parametrize("best", ["loss", "wer", "speech/wer", "nll", "ctc", "rejected_match"])
def test_errors_are_best_low(best):
    assert LoopConfig(best=best).mode == "min"


@pytest.mark.parametrize("best", ["accuracy", "chat/exact_match", "rewards/margins"])
def test_successes_are_best_high(best):
    assert LoopConfig(best=best).mode == "max"
