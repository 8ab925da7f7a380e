"""Several processes train as one does; one that dies ends all, and nothing is lost."""

import json
import os
import pathlib
import platform
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.numpy
import soundfile
import tiny

pytest.importorskip("grain")

from qwen2audio_jax.training import log

ROOT = pathlib.Path(__file__).resolve().parent.parent
WORDS = ("low", "mid", "high", "top")
STEPS = 8
LOST = (3, 8)  # clips that are nowhere

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def given(tmp_path_factory, chirp):
    """A model; conversations about clips, and pairs of answers to the same."""
    folder = tmp_path_factory.mktemp("given")
    tiny.save(folder / "model")
    rows, pairs = [], []
    for i in range(24):
        soundfile.write(folder / f"{i}.wav", chirp(0.3, i), 16_000)
        wave = "lost.wav" if i in LOST else f"{i}.wav"
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


def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(given, out, *args, stage="sft", processes=1, devices=1):
    """Starts a training on so many processes of so many devices each."""
    rows = given / f"{stage}.jsonl"
    command = [sys.executable, "-m", f"train.{stage}", "tiny", "--model", given / "model"]
    command += ["--out", out, "--data.train", f"{rows}:train", "--data.held-out", f"{rows}:test"]
    command += ["--data.workers", 0, "--data.augmented", 0, "--data.masked", 0]
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
                    cwd=ROOT,
                    stdout=told,
                    stderr=told,
                    env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)},
                )
            )
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
    finish(start(given, out, processes=2), out)
    return out


def alike(one, other):
    """Whether two runs have the same losses and parameters within rounding."""
    for name in ("loss", "grad_norm", "tokens"):
        ours, theirs = ([row[name] for row in steps(each)] for each in (one, other))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    theirs = parameters(other)
    for name, value in parameters(one).items():
        np.testing.assert_allclose(value, theirs[name], atol=1e-5, err_msg=name)


def test_two_processes_are_one(given, undisturbed, tmp_path):
    """The same losses and parameters as of one process with as many devices, and the same data."""
    out = tmp_path / "one"
    finish(start(given, out, devices=2), out)
    assert all(row["tokens"] > 0 for row in steps(undisturbed))
    alike(out, undisturbed)
    assert left_out(undisturbed) == left_out(out) and left_out(out)[-1] > 0
    assert trained_on(undisturbed) == trained_on(out) and "missing audio" in trained_on(out)


@pytest.mark.parametrize(("stage", "args"), [("sft", ["--lora.r", 2]), ("dpo", [])])
def test_adapters_and_preferences_too(given, tmp_path, stage, args):
    """Devices of a process share rows by heads, processes share the parameters; as in one."""
    args = [*args, "--mesh.ici-tensor-parallelism", 2]
    one, two = tmp_path / "one", tmp_path / "two"
    finish(start(given, two, *args, stage=stage, processes=2, devices=2), two)
    finish(start(given, one, *args, stage=stage, devices=4), one)
    alike(one, two)


def test_a_process_that_dies_ends_all_and_the_run_goes_on(given, undisturbed, tmp_path):
    """Or that hangs: soon, with a line that names it; the end is the same to the bit."""
    out = tmp_path / "killed"
    for signal_, at in ((signal.SIGSTOP, 3), (signal.SIGKILL, 5)):
        started = start(given, out, processes=2)
        while not (out / log.LOG).exists() or len(steps(out)) < at:
            assert all(process.poll() is None for process in started)
            time.sleep(0.05)
        started[1].send_signal(signal_)
        lost = time.monotonic()
        assert started[0].wait(120) == 1
        assert time.monotonic() - lost < 60
        started[1].kill()
        started[1].wait()
        line = f"process 0 of 2 on {platform.node()}: lost process 1 of 2 on {platform.node()}: "
        assert line in pathlib.Path(f"{out}.0.txt").read_text()
    finish(start(given, out, processes=2), out)
    wanted = parameters(undisturbed)
    for name, value in parameters(out).items():
        np.testing.assert_array_equal(value, wanted[name], err_msg=name)


def test_a_process_that_is_to_end_ends_all_at_one_step(given, undisturbed, tmp_path):
    """SIGTERM to one: both save the same step and say so; the end is the same to the bit."""
    out = tmp_path / "preempted"
    started = start(given, out, "--loop.save-every", 100, processes=2)
    # Its first step is compiled then; jax looks for the signal once a second.
    while not (out / log.LOG).exists():
        assert all(process.poll() is None for process in started)
        time.sleep(0.05)
    started[1].send_signal(signal.SIGTERM)
    for number, process in enumerate(started):
        told = pathlib.Path(f"{out}.{number}.txt")
        assert process.wait(600) == 128 + signal.SIGTERM, told.read_text()[-3000:]
        assert "signal 15: run it again to go on" in told.read_text()
    [saved] = [path for path in (out / "checkpoints").iterdir() if path.name.isdigit()]
    assert 0 < int(saved.name) < STEPS and (saved / "data" / "host-1").exists()
    assert [row["step"] for row in steps(out)] == [*range(1, int(saved.name) + 1)]
    finish(start(given, out, "--loop.save-every", 100, processes=2), out)
    wanted = parameters(undisturbed)
    for name, value in parameters(out).items():
        np.testing.assert_array_equal(value, wanted[name], err_msg=name)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"processes": 2}, {}),
        ({"devices": 8}, {"devices": 4, "tensor": 2}),
        ({"devices": 4, "context": 2}, {"processes": 2, "devices": 2}),
    ],
)
def test_a_run_goes_on_elsewhere(given, undisturbed, tmp_path, first, then):
    """With fewer processes or devices, or other axes: the same samples in the same order, so the
    same losses."""
    out = tmp_path / "moved"

    def begin(*args, tensor=1, context=1, **where):
        mesh = ["--mesh.ici-tensor-parallelism", tensor, "--mesh.ici-context-parallelism", context]
        return start(given, out, *args, *mesh, **where)

    started = begin("--loop.save-every", STEPS // 2, **first)
    while not (out / "checkpoints" / str(STEPS // 2)).exists():
        assert all(process.poll() is None for process in started)
        time.sleep(0.05)
    for process in started:
        process.kill()
        process.wait()
    finish(begin(**then), out)
    ours, theirs = ([row["loss"] for row in steps(each)] for each in (out, undisturbed))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_processes_that_nobody_introduces_are_told_how(given, tmp_path):
    """One line and status 2, rather than a wait for a cluster that is not there."""
    out = tmp_path / "alone"
    [process] = start(given, out, "--distributed")
    assert process.wait(300) == 2
    line = pathlib.Path(f"{out}.0.txt").read_text()
    assert "wanted --hosts.coordinator HOST:PORT" in line and "Traceback" not in line
