"""Several processes train as one does; one that dies ends all, and nothing is lost.

Starts take longest: all runs of SFT are to be one, however spread, so that they go on from each
other's checkpoints and are compared with each other.
"""

import json
import os
import pathlib
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import safetensors.numpy
import soundfile
import tiny

pytest.importorskip("grain")

from qwen2audio_jax.training import log

ROOT = pathlib.Path(__file__).resolve().parent.parent
WORDS = ("low", "mid", "high", "top")
STEPS = 10
HALF = 6  # of these: behind it a run goes on elsewhere
LOST = (3, 8)  # clips that are nowhere
MINE = 21  # a clip that is held out, and that one process alone can read: the first

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def given(tmp_path_factory, chirp):
    """A model; conversations about clips, and pairs of answers to the same."""
    folder = tmp_path_factory.mktemp("given")
    tiny.save(folder / "model")
    (folder / "elsewhere").mkdir()
    rows, pairs = [], []
    for i in range(24):
        seconds = 0.3 if i % 3 else 0.6  # of two buckets
        soundfile.write(folder / f"{i}.wav", chirp(seconds, i), 16_000)
        wave = {MINE: f"/proc/self/cwd/{i}.wav"}.get(i, "lost.wav" if i in LOST else f"{i}.wav")
        asked = [{"type": "audio", "audio": wave}, {"type": "text", "text": "How high?"}]
        answer = {"role": "assistant", "content": WORDS[i % 4]}
        split = "test" if i > 19 else "train"
        asked = {"role": "user", "content": asked}
        rows.append({"messages": [asked, answer], "split": split})
        two = {"chosen": answer["content"], "rejected": WORDS[(i + 1) % 4]}
        pairs.append({"messages": [asked], "split": split, **two})
    (folder / "sft.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "dpo.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return folder


STARTED: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def none_is_left():
    """A test that fails leaves no process behind, not even one that it has stopped."""
    yield
    while STARTED:
        STARTED.pop().kill()


def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(given, out, *args, stage="sft", processes=1, devices=1, measured=False):
    """Starts a training on so many processes of so many devices each.

    Args:
      measured: whether it is asked what was held out, too, which takes long to be compiled.
    """
    rows = given / f"{stage}.jsonl"
    command = [sys.executable, "-m", f"train.{stage}", "tiny", "--model", given / "model"]
    command += ["--out", out, "--data.train", f"{rows}:train"]
    command += ["--data.held-out", f"{rows}:test"] if measured else []
    command += ["--data.workers", 0, "--data.augmented", 0, "--data.masked", 0]
    command += ["--data.buckets", "6x220,30x40", "6x220,30x80"]
    command += ["--optimizer.name", "adamw"]  # Muon's programs take longer to be compiled
    command += ["--data.feeds", 2, "--optimizer.steps", STEPS, "--optimizer.warmup-steps", 1]
    command += ["--loop.save-every", 2, "--loop.evaluate-every", 100, "--loop.no-evaluate-first"]
    command += ["--evaluation.max-new-tokens", 2, "--no-tensorboard", *args]
    where = f"127.0.0.1:{port()}"
    started = []
    for number in range(processes):
        joined = ["--hosts.coordinator", where, "--hosts.count", processes]
        joined += ["--hosts.number", number, "--hosts.timeout", 10]
        with open(f"{out}.{number}.txt", "wb") as told:
            started.append(
                subprocess.Popen(
                    list(map(str, command + joined * (processes > 1))),
                    cwd=given / "elsewhere" if number else given,
                    stdout=told,
                    stderr=told,
                    env={
                        **os.environ,
                        "PYTHONPATH": str(ROOT),
                        "JAX_PLATFORMS": "cpu",
                        "JAX_NUM_CPU_DEVICES": str(devices),
                    },
                )
            )
    STARTED.extend(started)
    return started


def finish(started, out):
    for number, process in enumerate(started):
        assert process.wait(600) == 0, pathlib.Path(f"{out}.{number}.txt").read_text()[-3000:]


def steps(out):
    return [row for row in log.read(out / log.LOG) if "loss" in row]


def left_out(out):
    """How many samples, by the log, where there is a checkpoint."""
    return [row.get("bad/missing audio") for row in steps(out) if row["step"] % 2 == 0]


def trained_on(out):
    return (out / "summary.md").read_text().partition("What it was trained on:")[2]


def parameters(out):
    return safetensors.numpy.load_file(out / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def undisturbed(given, tmp_path_factory):
    """What two processes make of it when nothing happens."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    finish(start(given, out, processes=2, measured=True), out)
    return out


@pytest.fixture(scope="module")
def alone(given, tmp_path_factory):
    """What one process makes of it, with more devices."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    finish(start(given, out, devices=8, measured=True), out)
    return out


def alike(one, other):
    """Whether two runs have the same losses, parameters and scores within rounding, and the same
    data, each sample counted once."""
    for name in ("loss", "grad_norm", "tokens"):
        ours, theirs = ([row[name] for row in steps(each)] for each in (one, other))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    ours, theirs = (log.read(each / log.LOG)[-1] for each in (one, other))
    assert "eval/loss" in ours and ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    theirs = parameters(other)
    for name, value in parameters(one).items():
        np.testing.assert_allclose(value, theirs[name], atol=1e-5, err_msg=name)
    assert left_out(one) == left_out(other) and left_out(one)[-1] > 0
    told = [(each / "answers.jsonl").read_text("utf-8") for each in (one, other)]
    assert told[0] == told[1] and told[0].count("\n") == 4  # of all that are held out
    assert trained_on(one) == trained_on(other) and "missing audio" in trained_on(one)


def test_two_processes_are_one(undisturbed, alone):
    """The same losses and parameters as of one process, and the same data."""
    assert all(row["tokens"] > 0 for row in steps(undisturbed))
    alike(undisturbed, alone)


ASKED = ["--precompute-ref-log-probs"]


@pytest.mark.parametrize(
    ("processes", "args"),
    [
        (2, ["--lora.r", 2, "--lora.lora-dropout", 0.2, *ASKED, "--optimizer.name", "muon"]),
        (4, []),
    ],
)
def test_processes_share_rows(given, tmp_path, processes, args):
    """By heads, two of them; and the parameters. Adapters and preferences, of a reference that is
    kept or was asked before, are as of one process with as many devices."""
    args = [*args, "--mesh.ici-tensor-parallelism", 2]
    how = {"stage": "dpo", "measured": True}
    one, many = tmp_path / "one", tmp_path / "many"
    finish(start(given, many, *args, processes=processes, **how), many)
    finish(start(given, one, *args, devices=processes, **how), one)
    alike(one, many)


def reached(started, out, step):
    """Waits for a step to be logged."""
    while not (out / log.LOG).exists() or len(steps(out)) < step:
        assert all(process.poll() is None for process in started)
        time.sleep(0.05)


def test_whatever_ends_a_run_it_goes_on(given, undisturbed, tmp_path):
    """SIGTERM to one process: both save the same step and say so. One hangs, or the first, to which
    all report, dies: the other ends soon, and names it. The end is the same to the bit."""
    out = tmp_path / "ended"
    started = start(given, out, "--loop.save-every", 100, processes=2)
    # Before its first step: jax looks once a second, and steps are quick.
    while "rows and tokens of a step" not in pathlib.Path(f"{out}.0.txt").read_text():
        assert all(process.poll() is None for process in started)
        time.sleep(0.05)
    started[1].send_signal(signal.SIGTERM)
    for number, process in enumerate(started):
        told = pathlib.Path(f"{out}.{number}.txt")
        assert process.wait(600) == 128 + signal.SIGTERM, told.read_text()[-3000:]
        assert "signal 15: run it again to go on" in told.read_text()
    [saved] = [path for path in (out / "checkpoints").iterdir() if path.name.isdigit()]
    saved = int(saved.name)
    assert 0 < saved < STEPS - 4 and (out / f"checkpoints/{saved}/data/host-1").exists()
    assert [row["step"] for row in steps(out)] == [*range(1, saved + 1)]

    for signal_, number, at in ((signal.SIGSTOP, 1, saved + 1), (signal.SIGKILL, 0, saved + 3)):
        started = start(given, out, processes=2)
        reached(started, out, at)
        started[number].send_signal(signal_)
        lost = time.monotonic()
        assert started[1 - number].wait(120) == 1
        assert time.monotonic() - lost < 60
        started[number].kill()
        started[number].wait()
        one, other = (f"process {i} of 2 on {platform.node()}" for i in (1 - number, number))
        assert f"{one}: lost {other}" in pathlib.Path(f"{out}.{1 - number}.txt").read_text()

    finish(start(given, out, processes=2), out)
    wanted = parameters(undisturbed)
    for name, value in parameters(out).items():
        np.testing.assert_array_equal(value, wanted[name], err_msg=name)


def test_sigterm_to_a_whole_job_saves(given, tmp_path):
    """As SLURM sends it: to the workers that make batches, too, before it is agreed on a step."""
    out = tmp_path / "ended"
    long = ["--optimizer.steps", 1000, "--loop.save-every", 1000]
    started = start(given, out, "--data.workers", 1, *long, processes=2)
    reached(started, out, 2)
    jobs = [psutil.Process(process.pid) for process in started]
    for each in [*(child for job in jobs for child in job.children(recursive=True)), *jobs]:
        each.send_signal(signal.SIGTERM)
    for number, process in enumerate(started):
        told = pathlib.Path(f"{out}.{number}.txt")
        assert process.wait(600) == 128 + signal.SIGTERM, told.read_text()[-3000:]
    [saved] = (path.name for path in (out / "checkpoints").iterdir() if path.name.isdigit())
    assert 2 <= int(saved) < 1000


@pytest.mark.parametrize(
    ("first", "axis", "then"),
    [
        ("undisturbed", ("tensor", 2), {"devices": 4}),
        ("alone", ("context", 4), {"processes": 2, "devices": 2}),
    ],
)
def test_a_run_goes_on_elsewhere(given, request, undisturbed, tmp_path, first, axis, then):
    """With fewer processes or devices, or other axes, of which one reaches over processes: the same
    samples in the same order, so the same losses."""
    begun = request.getfixturevalue(first)
    out = shutil.copytree(begun, tmp_path / "moved")
    for path in (out / "checkpoints").iterdir():
        if path.name.isdigit() and int(path.name) > HALF:
            shutil.rmtree(path)
    name, size = axis
    finish(start(given, out, f"--mesh.ici-{name}-parallelism", size, **then), out)
    assert steps(out)[:HALF] == steps(begun)[:HALF]  # with the seconds that they took
    ours, theirs = ([row["loss"] for row in steps(each)] for each in (out, undisturbed))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_processes_that_nobody_introduces_are_told_how(given, tmp_path):
    """One line and status 2, rather than a wait for a cluster that is not there."""
    out = tmp_path / "alone"
    [process] = start(given, out, "--distributed")
    assert process.wait(300) == 2
    line = pathlib.Path(f"{out}.0.txt").read_text()
    assert "wanted --hosts.coordinator HOST:PORT" in line and "Traceback" not in line
