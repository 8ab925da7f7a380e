"""Settings of a run that mean nothing are refused in one line, before anything is read."""

import dataclasses
import json
import re

import numpy as np
import pytest
import tyro

from qwen2audio_jax.config import PRESETS
from qwen2audio_jax.processor import count_tokens
from qwen2audio_jax.training.data_config import DataConfig
from qwen2audio_jax.training.lora import LoraConfig
from qwen2audio_jax.training.optimizer import OptimizerConfig
from qwen2audio_jax.training.preference import PreferenceConfig
from qwen2audio_jax.training.settings import (
    EvaluationConfig,
    LoopConfig,
    Lora,
    PreferenceSettings,
    Settings,
)
from train.configs import (
    dpo_7b,
    dpo_7b_full,
    dpo_tiny,
    pretrain_7b,
    pretrain_tiny,
    sft_7b,
    sft_7b_full,
    sft_tiny,
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


def test_the_same_rows_are_known_however_they_are_written(tmp_path, monkeypatch):
    """From here or from the root; shards by their folder, by a pattern or by name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    for name in ("test-0", "train-0", "train-1"):
        (tmp_path / f"shards/{name}.array_record").write_bytes(b"")
    one, some = "shards/train-1.array_record", f"{tmp_path}/shards/train-*.array_record"
    for train, held_out in (
        (f"{tmp_path}/rows.jsonl", "rows.jsonl"),
        ("rows.jsonl:test", f"{tmp_path}/rows.jsonl:test"),
        ("gs://bucket/rows.jsonl", "gs://bucket/rows.jsonl:test"),
        ("shards", "shards/*.array_record"),
        (f"{tmp_path}/shards", one),
        (some, one),
    ):
        with pytest.raises(ValueError, match="is learned, too"):
            DataConfig(train=(train,), held_out=(held_out,))
    DataConfig(train=(some,), held_out=("shards/test-*.array_record",))
    DataConfig(train=("gs://bucket/rows.jsonl",), held_out=("gs://other/rows.jsonl",))


def test_shards_are_the_rows_that_they_were_written_from(tmp_path, monkeypatch):
    """All of a manifest or a split of it, as `train.shard` noted beside them."""
    monkeypatch.chdir(tmp_path)
    of = {
        "all": {"manifest": "clips/rows.jsonl"},  # as it was noted before
        "moved": {"manifest": "rows.jsonl", "path": f"{tmp_path}/clips/rows.jsonl"},
        "train": {"manifest": "clips/rows.jsonl:train"},
        "bucket": {"manifest": "gs://bucket/rows.jsonl"},
        "damaged": None,
    }
    for folder, noted in of.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "progress.jsonl").write_text(json.dumps(noted) if noted else "{")
        for number in range(2):
            (tmp_path / folder / f"{number}.array_record").write_bytes(b"")
    rows, bucket = "clips/rows.jsonl", "gs://bucket/rows.jsonl"
    for one, other in (
        ("all", f"{rows}:test"),
        ("all/1.array_record", rows),
        ("moved", f"{tmp_path}/{rows}:test"),
        ("train", f"{rows}:train"),
        ("train", rows),
        ("train", "all"),
        ("bucket", f"{bucket}:test"),
    ):
        for train, held_out in ((one, other), (other, one)):
            with pytest.raises(ValueError, match=re.escape(f"train has {train}; name splits")):
                DataConfig(train=(train,), held_out=(held_out,))
    for train, held_out in (
        ("train", f"{rows}:test"),
        ("train", "clips/other.jsonl"),
        ("all/0.array_record", "all/1.array_record"),
        ("damaged", rows),
    ):
        DataConfig(train=(train,), held_out=(held_out,))
    data = DataConfig(train=("train", "b.jsonl"), tasks=("x", "y"), held_out=(f"{rows}:test",))
    assert data.lines_held_out == ("x",)


def test_splits_are_told_apart():
    DataConfig(train=("rows.jsonl:train",), held_out=("rows.jsonl:test", "others.jsonl"))
    DataConfig(train=("world:small/chat",), held_out=("world:small/chat:test",))
    DataConfig(train=("tfds:words:train[1%:]",), held_out=("tfds:words:train[:1%]",))


@pytest.mark.parametrize("source", ["world:small/gender", "world:small/tasks:train"])
def test_what_is_made_is_held_out_by_its_test_split(source):
    """Of the other one all kinds may be learned, by whatever name."""
    told = rf"^wanted held_out {source.removesuffix(':train')}:test, .*, got {source}$"
    for train in ((), ("world:small/tasks",), ("a.jsonl",)):
        with pytest.raises(ValueError, match=told):
            DataConfig(train=train, held_out=(source,))


def test_lines_and_weights_are_counted_by_name():
    sources = ("a.jsonl", "b.jsonl")
    with pytest.raises(ValueError, match="wanted weights for 2 sources, got 1"):
        DataConfig(train=sources, weights=(1.0,))
    with pytest.raises(ValueError, match="wanted tasks for 2 sources, got 3"):
        DataConfig(train=sources, tasks=("x",) * 3)
    with pytest.raises(ValueError, match="wanted held_out_tasks for 1 sources, got 2"):
        DataConfig(train=sources, held_out=("c.jsonl",), held_out_tasks=("x", "y"))


@pytest.mark.parametrize(
    ("train", "held_out", "wanted"),
    [
        (("a.jsonl:train", "b.jsonl:train"), ("b.jsonl:test", "./a.jsonl:test"), ("y", "x")),
        (("a.jsonl:train", "b.jsonl"), ("a.jsonl:test", "a.jsonl:new"), ("x", "x")),
        (("a.jsonl:train", "tfds:b:train"), ("tfds:b:test",), ("y",)),
        (("world:small/tasks", "a.jsonl"), ("other.jsonl",), ("y",)),
        (("a.jsonl:train", "b.jsonl"), ("c.jsonl",), "c.jsonl: wanted {}, .*, and none is of its"),
        (
            ("a.jsonl:x", "a.jsonl:y"),
            ("a.jsonl:test",),
            "a.jsonl:test: wanted {}, .* several are of",
        ),
    ],
)
def test_what_is_held_out_is_asked_as_its_file_is_learned(train, held_out, wanted):
    """Whatever the order; where nothing tells which line it is, a wrong one is not guessed."""
    for kind in ("tasks", "tags"):
        told = {"train": train, "held_out": held_out, kind: ("x", "y")}
        told |= {"style": "tags"} if kind == "tags" else {}
        if isinstance(wanted, tuple):
            data = DataConfig(**told)
            assert wanted == (data.lines_held_out if kind == "tasks" else data.tags_held_out)
            continue
        with pytest.raises(
            ValueError, match="^held_out " + wanted.format(f"--data.held-out-{kind}")
        ):
            DataConfig(**told)
        assert DataConfig(**told, **{f"held_out_{kind}": ("z",)})
        assert DataConfig(**{**told, kind: ("x", "x")})


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"tasks": ("", "x"), "held_out": ("world:small/tasks:test",)}, ("",)),
        ({"tasks": ("", "x"), "held_out": ("world:small/chat:test", "b.jsonl")}, ("", "x")),
        ({"tasks": ("", "x"), "held_out": ("b.jsonl", "world:small/chat:test")}, ("x", "")),
        ({"tasks": ("", "x"), "held_out": ("b.jsonl", "c.jsonl")}, ("x", "x")),
        ({"tasks": ("x",), "held_out": ("world:small/chat:test", "b.jsonl")}, ("", "x")),
        ({"held_out_tasks": ("y",), "held_out": ("b.jsonl", "c.jsonl")}, ("y", "y")),
        ({"tasks": ("", "x"), "held_out_tasks": ("y", "z"), "held_out": ("b", "c")}, ("y", "z")),
        ({"held_out": ("b.jsonl",)}, ("",)),
        ({"tasks": ("", "x")}, ()),
    ],
)
def test_what_is_made_takes_no_lines_of_what_is_learned(given, wanted):
    """Worlds have lines of their own, as a preset's does that stays beside somebody's data."""
    data = DataConfig(train=("world:small/tasks", "a.jsonl"), **given)
    assert data.lines_held_out == wanted
    tags = {name.replace("tasks", "tags"): words for name, words in given.items()}
    assert DataConfig(train=data.train, style="tags", **tags).tags_held_out == wanted


def test_adapters_are_like_those_that_they_begin_with():
    """In what is not said of them; without any, PEFT's usual ones."""
    theirs = LoraConfig(r=3, lora_alpha=5, target_modules=("q_proj",), lora_dropout=0.5)
    theirs = dataclasses.replace(theirs, modules_to_save=("multi_modal_projector",))
    assert Lora(start="a", lora_dropout=0.1).like(theirs).config == dataclasses.replace(
        theirs, lora_dropout=0.1
    )
    stated = Lora(start="a", r=8, lora_alpha=16, target_modules="all-linear", modules_to_save=())
    assert stated.like(theirs) == stated
    assert Lora(r=8).config == LoraConfig(r=8) and Lora().config is None
    with pytest.raises(ValueError, match=r"wanted lora.r beside lora.start a, got 0"):
        Lora(start="a").config  # noqa: B018


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (["q_proj"], ("q_proj",)),
        (["q_proj", "v_proj"], ("q_proj", "v_proj")),
        (["all-linear"], "all-linear"),
        ([r".*\.q_proj"], r".*\.q_proj"),
    ],
)
def test_one_word_names_the_end_of_a_module(said, wanted):
    """On the command line; a PEFT file's is a regex for whole names, as PEFT has it."""
    told = tyro.cli(Lora, args=["--r", "2", "--target-modules", *said])
    assert told.config.target_modules == wanted
    assert LoraConfig(target_modules=said[0]).target_modules == said[0]


@pytest.mark.parametrize(
    ("make", "wrong", "message"),
    [
        (DataConfig, {"augmented": 40.0}, "augmented from 0 to 1, got 40.0"),
        (DataConfig, {"augmented": (0.0, -1.0)}, "augmented from 0 to 1, got -1.0"),
        (DataConfig, {"augmented": (0.0, 1.0), "train": ("a",) * 3}, "augmented for 3 .*, got 2"),
        (DataConfig, {"masked": -1.0}, "masked from 0 to 1, got -1.0"),
        (DataConfig, {"masked": (0.0, 1.0), "train": ("a",) * 3}, "masked for 3 .*, got 2"),
        (DataConfig, {"tags": ("<|a|>",)}, "tags are of the style tags: .*, got prompt"),
        (DataConfig, {"held_out_tags": ("<|a|>",), "style": "none"}, "the style tags: .* got none"),
        (Lora, {"lora_dropout": 0.1}, "lora_dropout is of no adapters: wanted lora.r too, got 0"),
        (DataConfig, {"workers": -1}, "workers from 0, got -1"),
        (EvaluationConfig, {"rows": 0}, "rows of at least 1, got 0"),
        (LoopConfig, {"profile": (9, 3)}, r"a first and a last step to profile, got \(9, 3\)"),
        (LoopConfig, {"peak_tflops": -1.0}, "peak_tflops above 0, got -1.0"),
        (Settings, {"loop": LoopConfig(profile=(990, 1001))}, r"the 1000 steps, got \(990, 1001\)"),
        (DataConfig, {"train": ("a", "b"), "weights": (float("nan"), 1.0)}, "above 0, got nan"),
        (DataConfig, {"train": ("a", "b"), "weights": (1.0, 0.0)}, "weights above 0, got 0.0"),
        (PreferenceConfig, {"rpo_alpha": -1.0}, "rpo_alpha from 0, got -1.0"),
        (PreferenceConfig, {"beta": float("nan")}, "beta above 0, got nan"),
        (Lora, {"r": 2, "lora_alpha": 0}, "lora_alpha above 0, got 0"),
        (OptimizerConfig, {"muon_beta": 1.0}, "muon_beta from 0 to below 1, got 1.0"),
        (LoopConfig, {"best": "colour"}, "wanted a best of .*, got 'colour'"),
        (Lora, {"r": -1}, "wanted r of at least 1, got -1"),
        (Settings, {"gradient_accumulation_steps": 0}, "at least 1, got 0"),
        (Settings, {"ctc": -1.0}, "ctc from 0, got -1.0"),
        (PreferenceSettings, {"ctc": 0.3}, "ctc is for pretraining and SFT"),
        (
            PreferenceSettings,
            {
                "precompute_ref_log_probs": True,
                "preference": PreferenceConfig(reference_free=True),
            },
            "without a reference there is no precompute_ref_log_probs",
        ),
    ],
)
def test_values_that_mean_nothing_are_refused(make, wrong, message):
    with pytest.raises(ValueError, match=message):
        make(**wrong)


@pytest.mark.parametrize("best", ["loss", "wer", "speech/wer", "nll", "ctc", "rejected_match"])
def test_errors_are_best_low(best):
    assert LoopConfig(best=best).mode == "min"


@pytest.mark.parametrize(
    "said",
    [{"lora_alpha": 16}, {"target_modules": ("q_proj",)}, {"modules_to_save": ("lm_head",)}],
)
def test_what_is_said_of_adapters_wants_adapters(said):
    (name,) = said
    with pytest.raises(
        ValueError, match=f"lora.{name} is of no adapters: wanted lora.r too, got 0"
    ):
        Lora(**said)
    assert getattr(Lora(r=4, **said), name) == said[name]


@pytest.mark.parametrize("best", ["accuracy", "chat/exact_match", "rewards/margins"])
def test_successes_are_best_high(best):
    assert LoopConfig(best=best).mode == "max"


@pytest.mark.parametrize("preset", [pretrain_7b, sft_7b, sft_7b_full, dpo_7b, dpo_7b_full])
def test_short_clips_cost_a_pod_what_they_last(preset):
    """A clip of 4 s, or of all 5, goes where clips have 5 s; one of 30 s fits, too."""
    frames = [_taken_by(preset, seconds).frames for seconds in (4, 5, 9, 10, 30)]
    assert frames == [504, 504, 1004, 1004, 3000]


@pytest.mark.parametrize("preset", [pretrain_tiny, sft_tiny, dpo_tiny])
def test_laptops_take_clips_of_every_length_and_pad_them_little(preset):
    for seconds in (1, 3, 9, 14, 20, 30):
        assert _taken_by(preset, seconds).frames <= 350 * seconds


@pytest.mark.parametrize(
    ("preset", "sizes"),
    [
        (pretrain_tiny, {1: (30, 104), 10: (3, 1004)}),
        (sft_tiny, {1: (30, 104), 10: (3, 1004)}),
        (dpo_tiny, {10: (5, 1004)}),
    ],
)
def test_laptops_take_clips_of_whole_seconds_where_those_belong(preset, sizes):
    """With what the convolutions see behind them, and as many a batch as there were."""
    taken = {seconds: _taken_by(preset, seconds) for seconds in sizes}
    assert {s: (bucket.clips, bucket.frames) for s, bucket in taken.items()} == sizes


@pytest.mark.parametrize("preset", [sft_tiny, dpo_tiny])
def test_laptops_take_conversations_with_several_clips(preset):
    """A question about each, say; the model has room for all of it."""
    for clips, seconds in ((2, 6), (2, 8), (2, 10), (5, 8), (2, 30)):
        assert _taken_by(preset, seconds, clips).tokens <= PRESETS["tiny"].decoder.positions


def _taken_by(preset, seconds, clips=1):
    """The bucket that a preset's batches have for clips and a sentence or two about each."""
    tokens = clips * (count_tokens(np.zeros(16_000 * seconds)) + 60)
    return next(
        bucket
        for bucket in preset.SETTINGS.data.buckets
        if bucket.fits(tokens, [100 * seconds] * clips)
    )
