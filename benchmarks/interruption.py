"""Ends a training again and again, as badly as can be, and compares with one never interrupted.

    python -m benchmarks.interruption                     # fifteen times, ten of them kill -9
    python -m benchmarks.interruption --kills 2 --saves 1 --steps 8
    python -m benchmarks.interruption --processes 4 --kills 5 --saves 1 --steps 40

Both are `python -m train.sft` on clips made here. One is ended by kill -9 at random steps and
while it saves, by SIGTERM, and by a disk that takes no checkpoint, and is started again each time.
In the end parameters, and every step's loss and gradient, have to be the same to the bit.

That disk is a limit on how large a file may become: its error is another than a full disk's, which
tests/test_train.py has where it may mount one.

With several processes it is a random one that is killed: the others have to end by themselves, in
LIMIT seconds, and to say which is lost.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import pathlib
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import soundfile

from benchmarks import sides
from qwen2audio_jax.training import log
from qwen2audio_jax.training.checkpoint import CHECKPOINTS
from train import command

ROOT = pathlib.Path(__file__).resolve().parent.parent
WORDS = ("low", "middle", "high", "highest")
LARGEST_FILE = 300 * 1024  # bytes; no checkpoint's files are all so small
TOLD = {
    "kill": "kill -9 at a random step",
    "save": "kill -9 in a save",
    "term": "SIGTERM",
    "full": f"a disk that takes no checkpoint: files of {LARGEST_FILE // 1024} KiB at most",
}
SILENCE = 10  # seconds after which a process counts as lost
LIMIT = 60  # seconds that the others may go on for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How often, and how long."""

    kills: int = 10
    """Random steps to be killed at (kill -9)."""
    saves: int = 3
    """Saves to be killed in."""
    terms: int = 1
    """Random steps to get SIGTERM at."""
    full_disks: int = 1
    """Starts with a disk that takes no checkpoint: files of 300 KiB at most."""
    steps: int = 200
    save_every: int = 5
    """Steps between checkpoints."""
    model: str = "tiny"
    processes: int = 1
    """Of a run, as on as many hosts."""
    workers: int = 1
    """Processes that make batches, of each of these."""
    seed: int = 0
    """Of the moments."""
    out: pathlib.Path | None = None
    """A JSON file for what happened; a table is put beside it."""


def main(settings: Settings) -> None:
    """Raises SystemExit if anything differs."""
    result = measure(settings)
    print(json.dumps(result, indent=2))
    same = result["same"]
    if settings.out:
        ways = collections.Counter(event["way"] for event in result["events"])
        lines = ["| ended by | times |", "|---|---|"]
        lines += [f"| {TOLD[way]} | {count} |" for way, count in ways.items()]
        ends = ", ".join(f"{name} {'equal' if ok else 'DIFFER'}" for name, ok in same.items())
        several = f" in {settings.processes} processes" * (settings.processes > 1)
        about = f"{settings.steps} steps of train.sft{several}, started again each time: {ends}"
        sides.save(settings.out, {**sides.machine(), **result}, about, ["\n".join(lines)])
    if not all(same.values()):
        raise SystemExit("benchmarks.interruption: the runs differ")


def measure(settings: Settings) -> dict[str, object]:
    """What ended a run, and whether it came to the same as one that nothing ended."""
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        write_clips(folder)
        start = functools.partial(begin, settings, folder)
        whole, ended = folder / "whole", folder / "ended"
        print("never interrupted", flush=True)
        finish(start(whole))
        events = interrupt(settings, start, ended)
        print("to the end", flush=True)
        finish(start(ended))
        same = {
            "parameters": digest(whole) == digest(ended),
            "steps": exact(whole) == exact(ended),
        }
    return {
        "steps": settings.steps,
        "processes": settings.processes,
        "events": events,
        "same": same,
    }


def write_clips(folder: pathlib.Path, count: int = 40) -> None:
    """Tones, and conversations about how high they are."""
    rows = []
    for i in range(count):
        word, seconds = WORDS[i % len(WORDS)], 0.3 + 0.01 * i
        wave = 0.3 * np.sin(
            2 * np.pi * 200 * (1 + i % len(WORDS)) * np.arange(16_000 * seconds) / 16_000
        )
        soundfile.write(folder / f"{i}.wav", wave, 16_000)
        asked = [{"type": "audio", "audio": f"{i}.wav"}, {"type": "text", "text": "How high?"}]
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": word}]
        rows.append(json.dumps({"messages": messages}))
    (folder / "rows.jsonl").write_text("\n".join(rows), "utf-8")


def begin(
    settings: Settings, data: pathlib.Path, out: pathlib.Path, limit: int | None = None
) -> list[subprocess.Popen]:
    """Starts or goes on with a run, gives its processes; `limit` is how large a file may become."""
    command = [sys.executable, "-m", "train.sft", "tiny", "--model", settings.model]
    command += ["--out", out, "--data.train", data / "rows.jsonl", "--data.held-out"]
    command += ["--data.workers", settings.workers, "--no-tensorboard"]
    command += ["--loop.save-every", settings.save_every, "--optimizer.steps", settings.steps]
    command += ["--optimizer.warmup-steps", 2, "--loop.keep", 1]
    if settings.processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command += ["--hosts.coordinator", f"127.0.0.1:{port}", "--hosts.timeout", SILENCE]
        command += ["--hosts.count", settings.processes]
    limited = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    started = []
    for number in range(settings.processes):
        mine = ["--hosts.number", number] if settings.processes > 1 else []
        with open(told(out, number), "wb") as said:
            started.append(
                subprocess.Popen(
                    list(map(str, command + mine)),
                    cwd=ROOT,
                    stdout=said,
                    stderr=said,
                    preexec_fn=None if limit is None else limited,
                )
            )
    return started


def told(out: pathlib.Path, number: int) -> pathlib.Path:
    """What a process says, since its last start."""
    return out.with_suffix(f".{number}.log")


def finish(started: list[subprocess.Popen]) -> None:
    if any(statuses := [process.wait() for process in started]):
        raise SystemExit(f"benchmarks.interruption: wanted a run to end well, got {statuses}")


def interrupt(
    settings: Settings, start: Callable[..., list[subprocess.Popen]], out: pathlib.Path
) -> list[dict[str, object]]:
    """Ends a run in every way, in random order; gives how, and at which step.

    Raises:
      SystemExit: the others went on without the one that was killed, or did not say which it was.
    """
    rng = random.Random(settings.seed)
    ways = ["kill"] * settings.kills + ["save"] * settings.saves
    ways += ["term"] * settings.terms + ["full"] * settings.full_disks
    rng.shuffle(ways)
    events = []
    for number, way in enumerate(ways):
        # Moments that are spread over the run, so that there is always something left to end.
        moment = settings.steps * (number + rng.random()) / (len(ways) + 1)
        started = start(out, limit=LARGEST_FILE if way == "full" else None)
        lost = rng.randrange(len(started))
        if way != "full":
            wait = at_a_save if way == "save" else at_a_step
            wait(started[lost], out, moment)
            time.sleep(0 if way == "save" else rng.uniform(0, 0.1))
            started[lost].send_signal(signal.SIGTERM if way == "term" else signal.SIGKILL)
        since = time.monotonic()
        statuses = [process.wait() for process in started]
        event = {"way": way, "step": last_step(out), "statuses": statuses}
        event |= {"torn": bool(unfinished(out)), "lost": lost, "took_s": time.monotonic() - since}
        events.append(event)
        print(json.dumps(event), flush=True)
        if way in ("kill", "save"):
            check(settings, out, event)
    return events


def check(settings: Settings, out: pathlib.Path, event: dict[str, Any]) -> None:
    """Refuses survivors that go on, or that do not say which one they have lost."""
    lost = event["lost"]
    for number, status in enumerate(event["statuses"]):
        if number == lost:
            continue
        said, took = told(out, number).read_text("utf-8", "replace"), event["took_s"]
        if not status or took > LIMIT or f"lost process {lost}" not in said:
            raise SystemExit(
                f"benchmarks.interruption: wanted process {number} to end within {LIMIT} s and to "
                f"name process {lost}, got status {status} in {took:.0f} s: {said[-500:]}"
            )


def at_a_step(process: subprocess.Popen, out: pathlib.Path, step: float) -> None:
    """Waits until a run has logged this step."""
    while process.poll() is None and last_step(out) < step:
        time.sleep(0.01)


def at_a_save(process: subprocess.Popen, out: pathlib.Path, step: float) -> None:
    """Waits until a run is writing a checkpoint, at this step or later."""
    at_a_step(process, out, step)
    while process.poll() is None and not unfinished(out):
        time.sleep(0.0005)


def unfinished(out: pathlib.Path) -> list[pathlib.Path]:
    return list((out / CHECKPOINTS).glob("*tmp*"))


def last_step(out: pathlib.Path) -> int:
    rows = log.read(out / log.LOG)
    return int(rows[-1]["step"]) if rows else 0


def digest(out: pathlib.Path) -> str:
    """Of all parameters, in float32."""
    return hashlib.sha256((out / "model" / "model.safetensors").read_bytes()).hexdigest()


def exact(out: pathlib.Path) -> list[tuple[int, float, float, float]]:
    rows = [row for row in log.read(out / log.LOG) if "loss" in row]
    return [(row["step"], row["loss"], row["grad_norm"], row["tokens"]) for row in rows]


if __name__ == "__main__":
    command.run(main, Settings, "benchmarks.interruption", __doc__)
