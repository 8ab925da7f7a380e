"""Programs teach their use, refuse mistakes in one line, and the demonstration leaves a model."""

import dataclasses
import json
import pathlib
import runpy
import subprocess
import sys
import types

import numpy as np
import pytest
import soundfile
import tyro

from qwen2audio_jax import Processor, Qwen2Audio
from qwen2audio_jax.data.world import World
from train import demo

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROGRAMS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in ("convert", "train", "benchmarks")
    for path in (ROOT / folder).glob("*.py")
    if '__name__ == "__main__"' in path.read_text("utf-8")
)


# another test has imported the program already
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")


def run(monkeypatch, program, *args):
    """Runs a program in this process; its exit status."""
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # some programs set it: this undoes that
    monkeypatch.setattr(sys, "argv", [program, *map(str, args)])
    with pytest.raises(SystemExit) as exit:
        runpy.run_module(program, run_name="__main__")
    return exit.value.code


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_explains_itself(program, monkeypatch, capsys):
    """`--help` exits 0, and says how to call it."""
    assert run(monkeypatch, program, "--help") == 0
    assert "usage:" in capsys.readouterr().out.lower()


def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys):
    """Before anything is trained or written, with exit status 2."""
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "train.demo", "--manifest", "absent.jsonl", "--out", "out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("train.demo: error: ")
    assert "no manifest at absent.jsonl" in error and not (tmp_path / "out").exists()
    for line, told in (
        (
            '{"audio": "a.wav", "label": "dog"}',
            "line 2 of rows.jsonl: wanted 'audio' and 'text', got",
        ),
        ('{"audio": "", "text": "one"}', "line 2 of rows.jsonl: wanted 'audio' and 'text'"),
        ('{"audio": "a.wav"', "rows.jsonl, line 2: Expecting ',' delimiter"),
    ):
        (tmp_path / "rows.jsonl").write_text('{"audio": "a.wav", "text": "one"}\n' + line)
        assert run(monkeypatch, "train.demo", "--manifest", "rows.jsonl", "--out", "out") == 2
        assert told in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_another_world_begins_anew(tmp_path):
    """Where nothing was saved of the one before: with its own words and sizes."""
    start = tmp_path / "start"

    def begun(name):
        demo.begin(demo.Demo(world=name, out=tmp_path), World.named(name))
        return json.loads((start / "config.json").read_text())["text_config"]["vocab_size"]

    for name in ("small", "full"):
        assert begun(name) == demo.VOCABULARY[name]
        knows_anna = len(Processor.from_pretrained(start).tokenizer.encode("Anna")) == 1
        assert knows_anna == (name == "full")
    (tmp_path / "pretrain" / "checkpoints" / "500").mkdir(parents=True)
    assert begun("small") == demo.VOCABULARY["full"]  # what goes on refuses other settings


def test_a_score_is_of_the_recordings_that_there_are(tmp_path, monkeypatch):
    """It is told again as it was; other clips, or another manifest, are scored anew."""
    manifest, asked = tmp_path / "rows.jsonl", []
    monkeypatch.setattr(demo, "load", lambda folder: (None, None))
    monkeypatch.setattr(demo, "hear", lambda source: source)
    for name in ("ask", "answer", "rows"):
        monkeypatch.setattr(demo.evaluation, name, lambda *_: [])

    def rate(model, processor, waves, texts):
        asked.append(texts)
        return types.SimpleNamespace(word_error_rate=1 / len(asked))

    monkeypatch.setattr(demo.recognition, "score", rate)

    def score(clips, *texts):
        rows = [{"audio": "a.wav", "text": text, "split": "test"} for text in texts]
        manifest.write_text("\n".join(map(json.dumps, rows)))
        (row,) = demo.score(demo.Demo(manifest=(str(manifest),), clips=clips), tmp_path)
        return row.value, row.n

    assert score(5, "one", "two") == score(5, "one", "two") == (1, 2)
    assert score(5, "one", "six") == score(5, "one", "six") == (1 / 2, 2)
    assert score(6, "one", "six") == (1 / 3, 2)
    path = tmp_path / demo.SCORES
    path.write_text(json.dumps({"clips": 6, "rows": []}))  # as it was noted before
    assert demo.score(demo.Demo(clips=6), tmp_path) == []
    assert score(6, "one", "six") == (1 / 4, 2)


def test_recordings_may_lie_elsewhere():
    """What is no path stays as it is written."""
    given = tyro.cli(demo.Demo, args=["--manifest", "gs://bucket/rows.jsonl", "a.jsonl"])
    assert given.manifest == ("gs://bucket/rows.jsonl", "a.jsonl")


def test_the_full_world_begins_with_voices(tmp_path):
    """From nothing; each stage begins where the one before it ended. The small one does without."""
    full = demo.Demo(world="full", out=tmp_path)
    stages = [*demo.before(full), *demo.plan(full)]
    assert [each.out.name for each in stages] == ["voices", *demo.STAGES]
    assert [each.from_scratch for each in stages] == [True, False, False, False]
    begins = ["start", *(f"{each.out.name}/model" for each in stages[:-1])]
    assert [each.model for each in stages] == [str(tmp_path / each) for each in begins]
    assert stages[0].optimizer.steps == stages[1].optimizer.steps // 20
    short = dataclasses.replace(full, steps=(8, 2, 2))
    assert demo.before(short)[0].optimizer.steps == 2
    small = demo.Demo(out=tmp_path)
    assert not demo.before(small) and demo.plan(small)[0].from_scratch
    assert demo.plan(small)[0].model == str(tmp_path / "start")


def test_longer_recordings_have_batches_of_their_own(tmp_path, chirp):
    """Of clips, whether on this disk or within the manifest; of what is too long for all there is
    none. Without any, the batches are those of what is made. Without splits, all are learned."""
    manifest = tmp_path / "rows.jsonl"

    def sizes(*seconds, split="train"):
        rows = [{"audio": "absent.wav", "text": "one", "split": split}]
        for number, length in enumerate(seconds):
            path = tmp_path / f"{number}.wav"
            soundfile.write(path, chirp(length, number), 16_000)
            clip = {"bytes": None, "path": path.name} if number % 2 else path.name
            rows.append({"audio": clip, "text": "one", "split": split})
        manifest.write_text("\n".join(map(json.dumps, rows)))
        made = demo.Demo(manifest=(str(manifest),), out=tmp_path / "out")
        pretraining, conversations, _ = demo.plan(made)
        frames = [bucket.frames for bucket in pretraining.data.buckets]
        assert [bucket.frames for bucket in conversations.data.buckets] == frames[1:]
        return frames

    usual = [*demo.SIZES["small"]]
    assert sizes(1, 3) == sizes(12, 12, split="test") == usual
    assert sizes(1, 4) == sizes(4) == sizes(4, split=None) == sizes(4, split="") == [*usual, 1004]
    assert sizes(4, 12) == sizes(12) == sizes(29.99, 31) == [*usual, 1004, 3000]


def demonstrate(out, *args):
    command = [sys.executable, "-m", "train.demo", "--clips=2", f"--out={out}", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_the_demonstration_leaves_a_model(tmp_path, chirp):
    """A few steps of each stage: a folder that transformers loads, a card, pictures; run again, it
    tells the same and trains nothing; its two modes can be compared with each alone."""
    import torch
    import transformers

    out, manifest = tmp_path / "demo", tmp_path / "rows.jsonl"
    rows = []
    for number in range(6):
        soundfile.write(tmp_path / f"{number}.wav", chirp(0.5, number), 16_000)
        split = "test" if number > 3 else "train"
        rows.append({"audio": f"{number}.wav", "text": "one", "split": split, "licence": "CC0"})
    manifest.write_text("\n".join(map(json.dumps, rows)))
    options = ("--steps", "3", "2", "2", "--manifest", str(manifest))
    done = demonstrate(out, *options)
    assert done.returncode == 0, done.stderr
    told = done.stdout.partition("task  ")[2]
    assert f"transcribe --model {out}" in told and "(spoken)" in told
    talk = told.partition("A conversation: ")[2]
    assert talk.count("  user:      ") == talk.count("  assistant: ") == 2
    card = (out / "README.md").read_text("utf-8")
    assert "and 4 recordings (CC0)" in card
    wanted = ("recognise en", "gender", "analysis", "chat", "recordings", "preference: no speech")
    assert all(f"\n{task} " in card for task in wanted)
    assert all((out / name).stat().st_size > 10_000 for name in ("stages.png", "heard.png"))
    theirs = transformers.Qwen2AudioForConditionalGeneration.from_pretrained(
        out, dtype=torch.float32
    )
    ours = Qwen2Audio.from_pretrained(out, dtype="float32")
    ids = np.array([[1, 20, 30, 40]])
    wanted = theirs(input_ids=torch.tensor(ids)).logits.detach().numpy()
    np.testing.assert_allclose(ours(ids), wanted, atol=1e-4)
    processor = transformers.AutoProcessor.from_pretrained(out)
    assert processor.tokenizer.convert_tokens_to_ids("<|AUDIO|>") == ours.config.audio_token

    saved = (out / "dpo" / "log.jsonl").read_bytes()
    again = demonstrate(out, *options)
    assert again.stdout.partition("task  ")[2] == told
    assert (out / "dpo" / "log.jsonl").read_bytes() == saved
    other = demonstrate(out, *options, "--seed=1")
    assert other.returncode == 2 and "seed was 0, now 1" in other.stderr

    results = tmp_path / "modes.json"
    command = [sys.executable, "-m", "benchmarks.modes", f"--demo={out}", f"--out={results}"]
    compare = lambda *more: subprocess.run(
        [*command, "--clips=2", *more], cwd=ROOT, capture_output=True, text=True
    )
    other = compare()
    assert other.returncode == 2 and "run with other settings: data.train was [" in other.stderr
    done = compare(f"--manifest={manifest}")
    assert done.returncode == 0, done.stderr
    right = json.loads(results.read_text("utf-8"))["right"]
    assert right["alone"].keys() == right["together"].keys() == {"analysis", "chat"}
    ran = json.loads((out / "sft-chat" / "run.json").read_text("utf-8"))
    made = [f"world:small/{each}" for each in ("chat", "tasks", "recognise en")]
    assert ran["data"]["train"] == [*made, f"{manifest}:train"]
    assert ran["optimizer"]["steps"] == 1  # 2 steps were for both, and for the tasks
