"""The programs train, measure, save and go on, each in one folder; mistakes are one line."""

import json
import pathlib
import re
import runpy
import sys

import jax
import numpy as np
import pytest
import soundfile
import tiny

pytest.importorskip("grain")

from qwen2audio_jax import Qwen2Audio
from qwen2audio_jax.training import log, lora, peft, reference

ROOT = pathlib.Path(__file__).resolve().parent.parent
WORDS = ("low", "mid", "high", "top")
TASK = "[AUDIO:audio] What is that? -> [TEXT:text,closed_set=low|mid|high|top]"

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning"),
    # Orbax's and TensorStore's own threads, which end with the process
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def hurry():
    """Programs that run a few steps take longer to be compiled well than to be run badly."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory, chirp):
    """Ten clips, told about in conversations, pairs of answers, and plainly; one is missing."""
    folder = tmp_path_factory.mktemp("data")
    rows = {"chats": [], "pairs": [], "plain": []}
    for i in range(10):
        if i != 3:
            soundfile.write(folder / f"{i}.wav", chirp(0.3, i), 16_000)
        split, word = {"split": "test" if i > 6 else "train"}, WORDS[i % 4]
        asked = [{"type": "audio", "audio": f"{i}.wav"}, {"type": "text", "text": "How high?"}]
        given = [{"role": "user", "content": asked}]
        answered = {"role": "assistant", "content": word}
        rows["chats"].append(split | {"messages": [*given, answered]})
        rows["pairs"].append(split | {"messages": given, "chosen": word, "rejected": "no"})
        rows["plain"].append(split | {"audio": f"{i}.wav", "text": word})
    for name, each in rows.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, each)))
    return folder


@pytest.fixture
def run(monkeypatch, base, data):
    """Runs a program here, on eight devices: `run("sft", "chats", out, ...)` gives its status."""

    def call(stage, rows, out, *args):
        source = data / f"{rows}.jsonl"
        flags = ["--model", base, "--out", out, "--data.train", f"{source}:train"]
        flags += ["--data.held-out", f"{source}:test", "--data.workers", 0, "--data.augmented", 0]
        flags += ["--data.masked", 0, "--optimizer.warmup-steps", 1, "--evaluation.samples", 3]
        flags += ["--evaluation.max-new-tokens", 4, "--no-tensorboard"]
        monkeypatch.syspath_prepend(ROOT)
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


def test_sft_leaves_a_folder_that_says_all(run, tmp_path, base, capsys):
    """LoRA on a mesh, in parts: adapter, merged model, figures, and a run that is done."""
    out = tmp_path / "run"
    args = ["--optimizer.steps", 3, "--loop.evaluate-every", 2, "--lora.r", 2, "--tensorboard"]
    args += ["--gradient-accumulation-steps", 2, "--loop.profile", 2, 2]
    assert run("sft", "chats", out, *args) == 0
    assert [row["step"] for row in rows_of(out)] == [1, 2, 3]
    wanted = {"run.json", "config.json", "tokenizer.json", "checkpoints", "log.jsonl", "adapter"}
    wanted |= {"model", "summary.md", "answers.jsonl", "tensorboard", "profile"}
    assert wanted <= {path.name for path in out.iterdir()}
    assert any((out / "tensorboard").iterdir())
    assert list((out / "profile").rglob("*.xplane.pb"))
    told = (out / "summary.md").read_text()
    assert "| exact_match |" in told and "| held out | step 2 | step 3 |" in told
    assert "1 missing audio" in told and "3.wav" in told  # nothing is dropped in silence
    config, adapters = peft.load(out / "adapter", parameters(base))
    merged = lora.merge(parameters(base), adapters, config)
    ids = np.array([[1, 20, 30, 40]])
    np.testing.assert_allclose(parameters(out / "model")(ids), merged(ids), atol=1e-5)

    capsys.readouterr()
    assert run("sft", "chats", out, *args) == 0  # nothing is left to do
    assert [row["step"] for row in rows_of(out)] == [1, 2, 3]
    assert run("sft", "chats", out, *args, "--optimizer.learning-rate", 1) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("train.sft: error: ")
    assert "holds a run with other settings: optimizer.learning_rate was 0.0005, now 1.0" in error


def test_pretraining_begins_from_nothing(run, tmp_path, base):
    """A declared task, answered from its closed set; the parameters are the seed's."""
    out = tmp_path / "run"
    args = ["--optimizer.steps", 2, "--loop.evaluate-every", 5, "--data.tasks", TASK]
    assert run("pretrain", "plain", out, *args) == 0
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 3 and all(each["got"] in WORDS for each in answers)
    new, old = parameters(out / "model"), parameters(base)
    assert not np.allclose(new.projector.kernel[...], old.projector.kernel[...], atol=0.01)


def test_dpo_has_the_same_reference_in_memory_and_beforehand(run, tmp_path):
    """And is told both ways how often the chosen answer is preferred."""
    both = []
    for name, how in (("memory", ()), ("file", ("--precompute-ref-log-probs",))):
        out = tmp_path / name
        args = ["--optimizer.steps", 3, "--loop.evaluate-every", 2, *how]
        assert run("dpo", "pairs", out, *args) == 0
        rows = rows_of(out)
        assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)  # it is the reference itself
        both.append([row["loss"] for row in rows])
        told = (out / "summary.md").read_text()
        assert "| accuracy |" in told and "| rejected_match |" in told
    np.testing.assert_allclose(*both, atol=1e-5)
    files = list((tmp_path / "file" / reference.FOLDER).iterdir())
    assert len(files) == 2  # what is trained on, and what is held out
    assert (
        sum(np.isnan(np.load(file)["logps"][:, 0]).sum() for file in files) == 1
    )  # the missing one


@pytest.mark.parametrize(
    ("stage", "args", "message"),
    [
        ("sft", ["--data.train", "absent.jsonl"], "no manifest at absent.jsonl"),
        ("sft", ["--data.train", "--data.held-out"], "wanted --data.train SOURCE"),
        ("sft", ["--model", "absent"], "wanted 'tiny', a folder or a hub id"),
        ("sft", ["--data.buckets.0.rows", "3"], "3 rows of a batch do not split over the 8"),
        ("sft", ["--mesh.ici-tensor-parallelism", "3"], "a mesh of .* needs 6 devices"),
        ("sft", ["--data.weights", "1", "2"], "wanted weights for 1 sources, got 2"),
        ("sft", ["--optimizer.steps", "1"], "wanted fewer warm-up steps than the 1 steps"),
        ("pretrain", ["--data.tasks", "[AUDIO:audio] ->"], "column"),
        ("dpo", ["--preference.beta", "-1"], "wanted beta above 0"),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, monkeypatch, capsys, stage, args, message):
    """With exit status 2, before anything is written."""
    monkeypatch.chdir(tmp_path)
    assert run(stage, "chats", "out", *args) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"train.{stage}: error: ")
    assert re.search(message, error)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_run_that_is_killed_ends_with_the_same_bits(base, tmp_path):
    """kill -9 at a random step and during a save, SIGTERM, a full disk: real processes."""
    from benchmarks import interruption

    settings = interruption.Settings(
        kills=1, saves=1, steps=20, save_every=2, model=str(base), workers=0
    )
    result = interruption.main(settings)
    assert result["same"] == {"parameters": True, "steps": True}
    status = {event["way"]: event["status"] for event in result["events"]}
    assert {event["way"] for event in result["events"] if event["torn"]} >= {"save"}
    assert status == {"kill": -9, "save": -9, "term": 143, "full": 1}
