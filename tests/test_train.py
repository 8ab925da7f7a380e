"""The programs train, measure, save and go on, each in one folder; mistakes are one line."""

import contextlib
import dataclasses
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import prepared
import pytest
import soundfile
import tiny
from disk import small_files
from flax import nnx

pytest.importorskip("grain")

from qwen2audio_jax import Processor, Qwen2Audio, flash, weights
from qwen2audio_jax.data import sources
from qwen2audio_jax.data.mixture import Mixture
from qwen2audio_jax.data.pack import Bucket
from qwen2audio_jax.training import (
    held_out,
    log,
    lora,
    loss,
    objective,
    peft,
    reference,
    stage,
)
from qwen2audio_jax.training.checkpoint import CHECKPOINTS
from qwen2audio_jax.training.data_config import DataConfig
from qwen2audio_jax.training.learner import Learner
from qwen2audio_jax.training.optimizer import OptimizerConfig
from qwen2audio_jax.training.settings import LoopConfig, PreferenceSettings, Settings
from train import launch

WORDS = ("low", "mid", "high", "top")
TASK = "[AUDIO:audio] What is that? -> [TEXT:text,closed_set=low|mid|high|top]"

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning"),
    # Orbax's and TensorStore's own threads, which end with the process
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("base"))


BAD = {  # reason -> a row that is bad for it
    "missing audio": ("absent.wav", "low"),
    "corrupt audio": ("noise.wav", "low"),
    "too long": ("long.wav", "low"),
    "empty text": ("0.wav", " "),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory, chirp):
    """Clips, told about in conversations, pairs of answers, and plainly; some rows are bad."""
    folder = tmp_path_factory.mktemp("data")
    rows = {"chats": [], "pairs": [], "plain": []}
    for i in range(9):
        soundfile.write(folder / f"{i}.wav", chirp(0.3, i), 16_000)
    (folder / "noise.wav").write_bytes(b"no sound at all")
    soundfile.write(folder / "long.wav", chirp(31, 0), 16_000)
    good = [(f"{i}.wav", WORDS[i % 4]) for i in range(9)]
    for i, (clip, word) in enumerate([*good[:3], *BAD.values(), *good[3:]]):
        split = {"split": "test" if i > 9 else "train"}
        asked = [{"type": "audio", "audio": clip}, {"type": "text", "text": "How high?"}]
        given = [{"role": "user", "content": asked}]
        answered = {"role": "assistant", "content": word}
        rows["chats"].append(split | {"messages": [*given, answered]})
        rows["pairs"].append(split | {"messages": given, "chosen": word, "rejected": "no"})
        rows["plain"].append(split | {"audio": clip, "text": word})
    for name, each in rows.items():
        lines = [*map(json.dumps, each), '{"audio": ', "[1]"]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def presets(stage):
    """One, for clips of half a second on eight devices."""
    return {"tiny": ("For tests.", PREFERENCE if stage == "dpo" else SETTINGS)}


SETTINGS = Settings(
    scan_layers=False,
    data=DataConfig(buckets=(Bucket(rows=8, tokens=160, clips=24, frames=60),)),
    optimizer=OptimizerConfig(learning_rate=5e-4),
)
PREFERENCE = PreferenceSettings(**{**vars(SETTINGS), "loop": LoopConfig(best="accuracy")})


@pytest.fixture
def run(monkeypatch, base, data):
    """Runs a program here, on eight devices: `run("sft", "chats", out, ...)` gives its status."""

    def call(stage, rows, out, *args):
        source = data / f"{rows}.jsonl"
        flags = ["--model", base, "--out", out, "--data.train", f"{source}:train"]
        flags += ["--data.held-out", f"{source}:test", "--data.workers", 0, "--data.augmented", 0]
        flags += ["--data.masked", 0, "--optimizer.warmup-steps", 1, "--evaluation.samples", 5]
        flags += ["--evaluation.max-new-tokens", 3, "--no-tensorboard"]
        monkeypatch.setattr(launch, "presets", presets)
        monkeypatch.setattr(sys, "argv", ["x", "tiny", *map(str, flags), *map(str, args)])
        try:
            runpy.run_module(f"train.{stage}", run_name="__main__")
        except SystemExit as stop:
            return stop.code
        return 0

    return call


def rows_of(out):
    return [row for row in log.read(out / log.LOG) if "loss" in row]


def parameters(folder):
    return Qwen2Audio.from_pretrained(folder, dtype="float32")


@pytest.mark.slow
def test_sft_leaves_a_folder_that_says_all(run, tmp_path, base, data, capsys, caplog, monkeypatch):
    """LoRA and a whole projector on a mesh, in parts: adapters, merged models, figures; and a run
    that is done."""
    out, scores, wer = tmp_path / "run", held_out.scores, iter((0.9, 0.1, 0.5, 0.05))
    # the second evaluation's is the best, until the run is given another step
    monkeypatch.setattr(held_out, "scores", lambda x: scores(x) | {"wer": next(wer)})
    args = ["--optimizer.steps", 3, "--loop.evaluate-every", 2, "--lora.r", 2, "--tensorboard"]
    args += ["--gradient-accumulation-steps", 2, "--loop.profile", 2, 2, "--loop.evaluate-first"]
    args += ["--lora.modules-to-save", "multi_modal_projector"]
    assert run("sft", "chats", out, *args) == 0
    assert [row["step"] for row in rows_of(out)] == [1, 2, 3]
    wanted = {"run.json", "config.json", "tokenizer.json", "checkpoints", "log.jsonl", "adapter"}
    wanted |= {"model", "summary.md", "answers.jsonl", "tensorboard", "profile"}
    assert wanted <= {path.name for path in out.iterdir()}
    events = b"".join(path.read_bytes() for path in (out / "tensorboard").iterdir())
    assert b"tokens_per_second" in events and b"eval/exact_match" in events
    assert list((out / "profile").rglob("*.xplane.pb"))
    told = (out / "summary.md").read_text()
    assert "| exact_match |" in told and "| held out | step 0 | step 2 | step 3 |" in told
    for reason in (*BAD, "bad row"):  # nothing is dropped in silence
        assert re.search(rf"chats.jsonl:train: \d+ {reason}, the last: line ", told), reason
    bad = [row.get("eval/bad_samples") for row in log.read(out / log.LOG) if "loss" not in row]
    assert bad == [2, 2, 2]  # the last two lines of the file
    assert re.search(r"chats.jsonl:test: 2 bad row, the last: line 15 of .*: bad ", caplog.text)
    ids, both = np.array([[1, 20, 30, 40]]), []
    for end in ("", "-best"):
        config, adapters = peft.load(out / f"adapter{end}", parameters(base))
        merged = lora.merge(parameters(base), adapters, config)
        np.testing.assert_allclose(parameters(out / f"model{end}")(ids), merged(ids), atol=1e-5)
        both.append(adapters)
    for path in ("projector", "decoder.blocks.0.mlp.up"):
        assert any(map(np.any, jax.tree.leaves(jax.tree.map(np.subtract, *both)[path]))), path
    assert "The best by wer is model-best/, of step 2." in told

    told = capsys.readouterr()
    assert "rows and tokens of a step: 16x160 (feeds 1, batches of each 2)\n" in told.out
    said = told.err.splitlines()  # which is no terminal
    line = r"training: 3/3 steps, loss \d.*, tokens/s [\d,]+, audio s/s .*elapsed, 00:00 left"
    assert any(re.fullmatch(line, each) for each in said), said
    assert [each[:7] for each in said if each.startswith("step")] == [
        "step 0:",
        "step 2:",
        "step 3:",
    ]
    assert run("sft", "chats", out, *args) == 0  # nothing is left to do
    assert [row["step"] for row in rows_of(out)] == [1, 2, 3]
    assert run("sft", "chats", out, *args, "--optimizer.learning-rate", 1) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("train.sft: error: ")
    assert "holds a run with other settings: optimizer.learning_rate was 0.0005, now 1.0; " in error
    assert error.endswith("; --changing optimizer.learning_rate goes on so, another --out anew")
    more = ("--optimizer.steps", 4, "--optimizer.learning-rate", 1e-4)
    assert run("sft", "chats", out, *args, *more, "--changing", "optimizer.steps") == 2
    assert "optimizer.learning_rate was" in capsys.readouterr().err
    moved = shutil.copytree(data, tmp_path / "moved")
    more += ("--data.train", moved / "chats.jsonl:train", "--data.held-out")  # nothing, any more
    changing = ("--changing", "optimizer.steps", "optimizer.learning_rate")
    assert run("sft", "chats", out, *args, *more, *changing) == 2
    error = capsys.readouterr().err.strip()
    assert re.search(
        r"settings: data.train was \S+, now \S+; --changing .* data.train goes on", error
    )
    others = moved / "others.jsonl"
    others.write_text((data / "chats.jsonl").read_text())
    wrong = ("--data.train", f"{others}:train", *changing, "data.train")
    settings = (out / "run.json").read_bytes()
    assert run("sft", "chats", out, *args, *more, *wrong) == 2
    assert "cannot resume: parts was {'chats.jsonl:train': [" in capsys.readouterr().err
    assert (out / "run.json").read_bytes() == settings  # or what it began with would be refused
    more += ("--data.held-out", moved / "chats.jsonl:test")
    assert run("sft", "chats", out, *args, *more, *changing, "data.train") == 0
    assert not [*out.glob("*-best")]
    assert "The best by wer is model/, the last, of step 4." in (out / "summary.md").read_text()
    assert [row["step"] for row in rows_of(out)] == [1, 2, 3, 4]
    assert run("sft", "chats", out, *args, "--changing", "seed") == 2
    assert "wanted changing of optimizer.learning_rate, " in capsys.readouterr().err


@pytest.fixture
def everywhere(data, tmp_path, monkeypatch):
    """A good row and the bad ones, as JSON lines, as ArrayRecord, and as tfds wrote them."""
    pytest.importorskip("tensorflow_datasets")
    rows = [("0.wav", "low"), *BAD.values()]
    lines = [json.dumps({"audio": clip, "text": text}) for clip, text in rows]
    (data / "all.jsonl").write_text("\n".join(lines))
    (tmp_path / "shards").mkdir()
    records = [{"audio": str(data / clip), "text": text} for clip, text in rows]
    sources.write(tmp_path / "shards" / "0.array_record", map(sources.as_record, records))
    # what tfds has is in it: only a clip of nothing is missing
    content = lambda clip: (data / clip).read_bytes() if (data / clip).exists() else b""
    prepared.write(
        tmp_path / "tfds",
        {"train": [{"audio": content(clip), "text": text} for clip, text in rows]},
        lambda tfds: {
            "audio": tfds.features.Tensor(shape=(), dtype=np.bytes_),
            "text": tfds.features.Text(),
        },
        audio="audio",
        lazyDecode=True,
    )
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    return [data / "all.jsonl", tmp_path / "shards", "tfds:made_speech/en:train"]


@pytest.mark.slow
def test_pretraining_begins_from_nothing(run, tmp_path, base, everywhere):
    """A declared task, answered from its closed set; the parameters are the seed's.

    Of every kind of source, all bad samples are told; none ends the run.
    """
    out = tmp_path / "run"
    args = ["--optimizer.steps", 2, "--data.tasks", TASK, "--from-scratch"]
    assert run("pretrain", "plain", out, *args, "--data.train", *everywhere) == 0
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 3 and all(each["got"] in WORDS for each in answers)
    new, old = parameters(out / "model"), parameters(base)
    assert not np.allclose(new.projector.kernel[...], old.projector.kernel[...], atol=0.01)
    told = (out / "summary.md").read_text()
    names = ("all.jsonl", "shards", everywhere[-1])
    for source, row in zip(names, ("line", "row", "row"), strict=True):
        for reason in BAD:
            line = rf"\n\W*{source}: \d+ {reason}, the last: {row} "
            assert re.search(line, told), (source, reason)


@pytest.mark.slow
def test_dpo_has_the_same_reference_in_memory_and_beforehand(run, tmp_path, data, monkeypatch):
    """And is told both ways how often the chosen answer is preferred; in short arithmetic, too.

    Another run that learns from the rows with its answers has no reference at all.
    """
    both, file = [], "--precompute-ref-log-probs"
    for name, how in (("memory", ()), ("file", (file,)), ("short", (file, "--dtype", "bfloat16"))):
        out = tmp_path / name
        args = ["--optimizer.steps", 3, "--loop.evaluate-every", 2, *how]
        assert run("dpo", "pairs", out, *args) == 0
        rows = rows_of(out)
        assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)  # it is the reference itself
        both.append([row["loss"] for row in rows])
        told = (out / "summary.md").read_text()
        assert "| accuracy |" in told and "| rejected_match |" in told
    np.testing.assert_allclose(*both[:2], atol=1e-5)
    files = list((tmp_path / "file" / reference.FOLDER).iterdir())
    assert len(files) == 2  # what is trained on, and what is held out
    # those that cannot be used: two lines without a pair are there for either
    assert sum(np.isnan(np.load(file)["logps"][:, 0]).sum() for file in files) == len(BAD) + 4
    answered = (tmp_path / "file" / reference.PAIRS).iterdir()
    (data / "answered.jsonl").write_text("".join(path.read_text() for path in answered))
    keeping = []
    begin = Learner.__init__
    note = lambda *a, reference, **k: keeping.append(reference) or begin(*a, **k)
    monkeypatch.setattr(Learner, "__init__", note)
    assert run("dpo", "answered", tmp_path / "rows", "--optimizer.steps", 3) == 0
    losses = [row["loss"] for row in rows_of(tmp_path / "rows")]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-5) and losses[2] < losses[0]
    assert keeping == [False] and not (tmp_path / "rows" / reference.FOLDER).exists()


@pytest.mark.slow
def test_dpo_from_adapters_is_compared_with_them(run, tmp_path, base, capsys):
    """In memory and beforehand; a run that goes on with another model is refused."""
    sft, losses, lora = tmp_path / "sft", [], ("--lora.r", 2)
    assert run("sft", "chats", sft, "--optimizer.steps", 3, *lora) == 0
    start = ("--lora.start", sft / "adapter")
    for name, how in (("memory", lora), ("file", ("--precompute-ref-log-probs",))):
        args = ("--optimizer.steps", 3, *start, *how)
        assert run("dpo", "pairs", tmp_path / name, *args) == 0
        kept = json.loads((tmp_path / name / "run.json").read_text())["lora"]
        assert (kept["r"], kept["lora_alpha"]) == (2, 32)  # said, and as the adapter's
        losses.append([row["loss"] for row in rows_of(tmp_path / name)])
        assert losses[-1][0] == pytest.approx(np.log(2), abs=1e-5)
    np.testing.assert_allclose(*losses, atol=1e-5)
    other = tmp_path / "other"
    shutil.copytree(base, other)
    weights.save(Qwen2Audio(parameters(base).config, rngs=nnx.Rngs(7)), other)
    assert run("dpo", "pairs", tmp_path / "file", *args, "--model", other) == 2
    assert "holds a run whose reference is another model than --model" in capsys.readouterr().err
    other = ("--lora.r", 2, *start, "--lora.lora-alpha", 8)
    assert run("dpo", "pairs", tmp_path / "other_scale", "--optimizer.steps", 3, *other) == 2
    assert "wanted adapters with lora_alpha 8, got 32" in capsys.readouterr().err
    assert run("dpo", "pairs", tmp_path / "base", *args, "--model", sft / "adapter") == 2
    assert f"wanted a model, got the adapter {sft / 'adapter'}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stage", "args", "message"),
    [
        ("sft", ["--data.train", "absent.jsonl"], "no manifest at absent.jsonl"),
        ("sft", ["--data.train", "--data.held-out"], "wanted --data.train SOURCE"),
        (
            "sft",
            ["--out", "gs://bucket/run"],
            "a folder on a disk to write to, got gs://bucket/run",
        ),
        ("sft", ["--model", "absent"], "wanted 'tiny', a folder or a hub id"),
        (
            "sft",
            ["--data.buckets", "8x161,8x1000", "--mesh.ici-context-parallelism", "2"],
            "161 tokens of a row do not split over the 2 devices",
        ),
        ("sft", ["--mesh.ici-tensor-parallelism", "3"], "a mesh of .* needs 6 devices"),
        ("sft", ["--data.weights", "1", "2"], "wanted weights for 1 sources, got 2"),
        ("sft", ["--optimizer.steps", "1"], "wanted fewer warm-up steps than the 1 steps"),
        ("sft", ["--data.train", "table.jsonl"], "bad row: table.jsonl, line 1: Expecting value"),
        ("pretrain", ["--data.tasks", "[AUDIO:audio] ->"], "column 17"),
        ("dpo", ["--preference.beta", "-1"], "wanted beta above 0"),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, monkeypatch, capsys, stage, args, message):
    """With exit status 2, before anything is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.jsonl").write_text("audio,text\na.wav,one\n")
    assert run(stage, "chats", "out", *args) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"train.{stage}: error: ")
    assert re.search(message, error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "config.json",
            {"text_config": {"vocab_size": 511}},
            r"tokens below its vocabulary of 511, got '.+' of number 511 in its tokenizer$",
        ),
        (
            "config.json",
            {"audio_token_index": 4},
            r"<\|AUDIO\|> as its audio_token 4, got number 3 in its tokenizer$",
        ),
        (
            "config.json",
            {"audio_config": {"max_source_positions": 29}},
            "--data.buckets 8x160,24x60: wanted at most the 58 frames that .* hears, got 60$",
        ),
        (
            "preprocessor_config.json",
            {"feature_size": 80},
            "128 mel bands, which it hears, got 80 in its feature settings$",
        ),
    ],
)
def test_words_and_clips_that_the_model_does_not_take_are_refused(
    run, tmp_path, base, capsys, file, change, message
):
    """Before anything is written: it would learn nothing, or hear nothing, and not say so."""
    model = shutil.copytree(base, tmp_path / "model")
    told = json.loads((model / file).read_text())
    for name, value in change.items():
        told[name] = told[name] | value if isinstance(value, dict) else value
    (model / file).write_text(json.dumps(told))
    assert run("sft", "chats", tmp_path / "out", "--model", model) == 2
    assert re.search(message, capsys.readouterr().err.strip().splitlines()[-1])
    assert not (tmp_path / "out").exists()


def test_tags_that_the_model_lacks_are_told_before_it_learns(run, tmp_path, caplog, monkeypatch):
    """As text they would be learned without a word."""
    monkeypatch.setattr(stage.run, "begin", Mock(side_effect=ValueError("begun")))
    task = "[AUDIO:audio] What is that? -> <|never|>[TEXT:text]"
    assert run("pretrain", "plain", tmp_path / "out", "--data.tasks", task) == 2
    assert "takes <|never|> for text, not for tags; convert.from_parts" in caplog.text


def test_a_run_does_not_write_over_what_it_begins_with(run, tmp_path, base, capsys, monkeypatch):
    """Neither in its folder nor in those that it makes at its end. What it could not log to is
    told as early."""
    before = {path: path.read_bytes() for path in base.iterdir()}
    told = lambda out: f"error: wanted another --out than {out}, which would write over"
    assert run("sft", "chats", base) == 2
    assert f"{told(base)} --model" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in base.iterdir()}
    out = tmp_path / "run"
    model = shutil.copytree(base, out / "model")
    assert run("sft", "chats", out, "--model", model) == 2
    assert f"{told(out)} --model" in capsys.readouterr().err
    start = out / "adapter"
    config = lora.LoraConfig(r=1)
    adapters = lora.init(config, parameters(base), key=jax.random.key(0))
    peft.save(start, adapters, config, parameters(base))
    assert run("sft", "chats", out, "--lora.start", start) == 2
    assert f"{told(out)} --lora.start" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert run("sft", "chats", out, "--wandb", "speech", "--model", "absent") == 2
    assert "--wandb wants Weights & Biases: pip install" in capsys.readouterr().err


def test_a_preset_gives_way_to_what_is_told(monkeypatch):
    """Its world is measured beside somebody's data, whose lines are not its own; adapters that are
    begun with say what they are."""

    def told(stage, *args):
        monkeypatch.setattr(sys, "argv", ["x", *args])
        return launch._parse(stage, "about")

    tasks = ("--data.tasks", "", TASK)
    data = told("pretrain", "tiny", "--data.train", "world:small/tasks", "a.jsonl", *tasks).data
    assert data.held_out == ("world:small/tasks:test",) and data.lines_held_out == ("",)
    lora = told("dpo", "7b", "--lora.start", "adapter", "--lora.lora-alpha", "32").lora
    assert (lora.r, lora.lora_alpha, lora.target_modules) == (0, 32, None)
    assert told("dpo", "7b", "--lora.r", "4").lora.config.lora_alpha == 32


def test_a_presets_world_is_not_measured_beside_other_data(monkeypatch, capsys):
    """Unless it is asked for, with others or alone."""

    def held_out(*args):
        monkeypatch.setattr(sys, "argv", ["x", "tiny", "--data.train", "a.jsonl:train", *args])
        return launch._parse("sft", "about").data.held_out

    assert held_out() == ()
    assert capsys.readouterr().err == "train.sft: nothing is measured without --data.held-out\n"
    usual = launch.presets("sft")["tiny"][1].data.held_out
    for asked in (("a.jsonl:test", "world:small/chat:test"), ("world:small/chat:test",), usual):
        assert held_out("--data.held-out", *asked) == asked
    assert not capsys.readouterr().err


def test_answers_attend_as_the_settings_say(tmp_path, monkeypatch):
    """As the loss does, in training and of what is held out."""
    seen = []

    def answers(*_, **__):
        seen.append(flash._CHOICE.value)
        return [], {}

    monkeypatch.setattr(held_out, "answers", answers)
    learner = Mock(spec=Learner, on_mesh=contextlib.nullcontext)
    settings = dataclasses.replace(SETTINGS, out=tmp_path, attention="dot_product")
    assert stage._evaluate(settings, learner, Mock(spec=Mixture), Mock(spec=Processor), []) == {}
    assert seen == ["dot_product"]


@pytest.mark.parametrize("stage", ["pretrain", "sft", "dpo"])
def test_presets_are_settings_that_fit_each_other(stage):
    """For a laptop and for a pod; each says its command."""
    found = launch.presets(stage)
    assert {"tiny", "7b"} <= set(found)
    for name, (about, settings) in found.items():
        assert f"python -m train.{stage} {name}" in about
        assert isinstance(settings, PreferenceSettings) == (stage == "dpo")


def test_one_bad_sample_ends_a_run_if_asked(run, tmp_path, capsys):
    """With its line; in the folder is nothing that it could go on from."""
    assert run("sft", "chats", tmp_path / "run", "--data.fatal", "--optimizer.steps", 2) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(
        r"train.sft: error: part '.*': line \d+ of chats.jsonl: (bad|missing|corrupt|too|em)", error
    )
    assert not [*(tmp_path / "run" / CHECKPOINTS).glob("*")]


STEPS = ["--optimizer.steps", 6, "--loop.save-every", 2, "--loop.bad-steps", 2, "--data.held-out"]


@pytest.fixture
def ends(run, monkeypatch, capsys):
    """Runs `sft` to its end in some folder: `ends(out)` gives its status and its last line."""

    def call(out, *args):
        status = run("sft", "chats", out, *STEPS, *args)
        told = capsys.readouterr()
        return status, (told.err if status in (1, 2) else told.out).splitlines()[-1]

    return call


def steps_of(out):
    return sorted(int(path.name) for path in (out / CHECKPOINTS).iterdir() if path.name.isdigit())


def weights_of(out):
    return (out / "model" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_whatever_ends_a_run_it_goes_on_to_the_same_bits(ends, tmp_path, monkeypatch, caplog, base):
    """SIGTERM, gradients that are no numbers, a full disk, a damaged checkpoint: one line each."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert ends(whole)[0] == 0

    def terminated(self, batch, number):
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, number)

    step = Learner.step
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", terminated)
        status, line = ends(out)
    assert (status, steps_of(out)) == (143, [2, 3])
    assert line == f"train.sft: signal 15: run it again to go on from what {out} holds"

    def broken(*args, **how):
        sums = loss.next_token(*args, **how)
        return sums.replace(loss=sums.loss * jnp.nan)

    with monkeypatch.context() as patch:
        patch.setattr(objective, "next_token", broken)
        status, line = ends(out)
    assert (status, steps_of(out)) == (1, [2, 3])
    assert line.startswith(
        "train.sft: error: the loss is nan and the gradient's norm nan at step 5"
    )
    assert f"the last good checkpoint is {out / CHECKPOINTS / '3'}, and --changing " in line

    with small_files(100 * 1024):
        status, line = ends(out)
    assert (status, steps_of(out)) == (1, [2, 3])
    assert line.startswith(f"train.sft: error: cannot save step 4 to {out / CHECKPOINTS}: ")
    assert "File too large" in line and line.endswith("; step 3 is still there")

    file = max((out / CHECKPOINTS / "3").rglob("*"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:1000])
    moved = shutil.copytree(base, tmp_path / "moved")
    other = shutil.copytree(base, tmp_path / "other")
    weights.save(Qwen2Audio(parameters(base).config, rngs=nnx.Rngs(7)), other)
    status, line = ends(out, "--model", other)
    assert status == 2 and "began with other parameters than --model has now" in line
    assert ends(out, "--model", moved)[0] == 0
    assert f"{out / CHECKPOINTS / '3'} is damaged, now called 3.damaged: " in caplog.text
    assert weights_of(out) == weights_of(whole)
    exact = lambda out: [(row["step"], row["loss"], row["grad_norm"]) for row in rows_of(out)]
    assert exact(out) == exact(whole)


@pytest.fixture
def disk(tmp_path):
    """A disk of its own: `disk("size=2m")` makes it, then changes it; skips where nobody may."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "tmpfs", folder]

    def change(options):
        again = [] if not os.path.ismount(folder) else ["remount"]
        told = subprocess.run([*command, "-o", ",".join([*again, options])], capture_output=True)
        if told.returncode:
            pytest.skip(f"no disk can be mounted here: {told.stderr.decode().strip()}")
        return folder

    yield change
    if os.path.ismount(folder):
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
def test_a_disk_that_is_full_or_read_only(ends, disk, tmp_path, monkeypatch):
    """A real one. With more room the same command goes on, to the same bits."""
    out = disk("size=2500k") / "run"
    status, line = ends(out, "--loop.keep", 9, "--tensorboard")
    assert status == 1 and line.startswith("train.sft: error: ") and str(out) in line
    assert "No space left" in line or "ENOSPC" in line
    assert (saved := steps_of(out)) and f"step {saved[-1]} is still there" in line
    disk("ro")
    with monkeypatch.context() as patch:  # it is told before the model is read
        patch.setattr(stage, "_learner", lambda *_: pytest.fail("the model is read"))
        status, line = ends(out, "--loop.keep", 9)
    assert status == 1 and "Read-only file system" in line and steps_of(out) == saved
    disk("rw,size=64m")
    assert ends(out, "--loop.keep", 9)[0] == 0
    assert ends(tmp_path / "whole")[0] == 0
    assert weights_of(out) == weights_of(tmp_path / "whole")


def test_a_folder_that_cannot_be_is_one_line(ends, tmp_path):
    """There is a file in its place."""
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        status, line = ends(out)
        assert status == 1 and line.startswith("train.sft: error: ") and str(out) in line


@pytest.mark.slow
def test_a_run_that_is_killed_ends_with_the_same_bits(base, tmp_path):
    """kill -9 at a random step and during a save, SIGTERM, a disk that takes no checkpoint: real
    processes."""
    from benchmarks import interruption

    settings = interruption.Settings(
        kills=1, saves=1, steps=20, save_every=2, model=str(base), workers=0
    )
    result = interruption.measure(settings)
    assert result["same"] == {"parameters": True, "steps": True}
    status = {event["way"]: event["statuses"][0] for event in result["events"]}
    assert {event["way"] for event in result["events"] if event["torn"]} >= {"save"}
    assert status == {"kill": -9, "save": -9, "term": 143, "full": 1}


@pytest.mark.slow
def test_so_does_one_of_two_processes_of_which_one_is_killed(base, tmp_path):
    """At a random step and during a save; the other one ends, and says which is lost."""
    from benchmarks import interruption

    settings = interruption.Settings(
        **{"kills": 1, "saves": 1, "terms": 0, "full_disks": 0, "steps": 12, "save_every": 2},
        **{"model": str(base), "workers": 0, "processes": 2},
    )
    result = interruption.measure(settings)
    assert result["same"] == {"parameters": True, "steps": True}
    assert sorted(event["way"] for event in result["events"]) == ["kill", "save"]
    for event in result["events"]:
        assert event["statuses"][event["lost"]] == -9
        assert event["statuses"][1 - event["lost"]] > 0  # ended by itself


def test_survivors_that_go_on_or_name_nobody_are_refused(tmp_path):
    """Of processes that were to lose the second one."""
    from benchmarks import interruption

    out, settings = tmp_path / "run", interruption.Settings(processes=2)
    event = {"lost": 1, "statuses": [1, -9], "took_s": 12.0}
    said = interruption.told(out, 0)
    said.write_text("train.sft: error: lost process 1\n", "utf-8")
    interruption.check(settings, out, event)
    for wrong in ({"statuses": [0, -9]}, {"took_s": 61.0}, {"lost": 0, "statuses": [-9, 1]}):
        interruption.told(out, 1).write_text("train.sft: error: lost process 1\n", "utf-8")
        with pytest.raises(SystemExit, match=r"wanted process \d to end within 60 s and to name"):
            interruption.check(settings, out, event | wrong)
