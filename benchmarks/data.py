"""Measures the data pipeline: hours of audio per hour and core, stage by stage and as a whole.

    python -m benchmarks.data                                # made sound, clips of 1 to 30 s
    python -m benchmarks.data --manifest clips/rows.jsonl    # your own (audio, text)

Every stage runs alone in one thread, over the same clips; `pipeline` is what training iterates,
from shards to packed batches, in this process and then with worker processes. An hour of a core is
one of its own time, whatever else the machine does; with workers it is the clock's.
"""

import dataclasses
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterable

import numpy as np
import soundfile

from benchmarks import sides
from qwen2audio_jax import audio, mel
from qwen2audio_jax.data import augment, sources
from qwen2audio_jax.data.instruction import Task
from qwen2audio_jax.data.mixture import Mixture, Part
from qwen2audio_jax.data.pack import Bucket
from train import command

TASK = Task.parse("[AUDIO:audio] Detect the language and recognize the speech: -> [TEXT:text]")
BUCKETS = (
    Bucket(rows=4, tokens=2048, clips=48, frames=1000),
    Bucket(rows=4, tokens=2048, clips=16, frames=3000),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    manifest: str | None = None
    """Recordings to read; by default 16-bit FLAC is made."""
    processor: str = "tiny"
    clips: int = 64
    """How many are measured, over and over."""
    seconds: float = 20.0
    """How long each figure is measured."""
    workers: int = 1
    """Processes of the last figure."""
    out: pathlib.Path | None = None
    """A JSON file for the figures; a table is put beside it."""


def main(settings: Settings) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = rows_of(settings, pathlib.Path(folder))
        sources.write(
            pathlib.Path(folder) / f"clips{sources.SUFFIX}",
            (sources.as_record(sources.embed(row)) for row in rows),
        )
        figures = measure(settings, sources.open_source(folder))
    lines = ["| stage | hours of sound an hour and core |", "|---|---|"]
    lines += [f"| {name} | {rate:,.0f} |" for name, rate in figures.items()]
    print("\n".join(lines))
    if settings.out:
        heard = settings.manifest or f"{settings.clips} clips of 1 to 30 s, 16-bit FLAC"
        content = {**sides.machine(), "clips": str(heard), "hours_per_hour": figures}
        sides.save(settings.out, content, f"The data pipeline on {heard}", ["\n".join(lines)])


def rows_of(settings: Settings, folder: pathlib.Path) -> list[dict]:
    """Rows whose clips are files."""
    if settings.manifest:
        source = sources.open_source(settings.manifest)
        return [source[i] for i in range(min(settings.clips, len(source)))]
    rows = []
    for i, seconds in enumerate(np.linspace(1, 30, settings.clips)):
        path = folder / f"{i}.flac"
        soundfile.write(path, sides.make_clip(float(seconds)), audio.SAMPLE_RATE)
        rows.append(
            {"audio": str(path), "text": "so many words as are said " * int(seconds // 4 + 1)}
        )
    return rows


def measure(settings: Settings, source: sources.RandomAccess) -> dict[str, float]:
    """Hours of audio per hour and core, by stage."""
    records = [source[i] for i in range(len(source))]
    waves = [audio.load(record["audio"]) for record in records]
    lengths = [len(wave) / audio.SAMPLE_RATE for wave in waves]
    rng = np.random.default_rng(0)
    stages: dict[str, Callable[[int], object]] = {
        "read": lambda i: source[i],
        "decode": lambda i: audio.load(records[i]["audio"]),
        "mel": lambda i: mel.log_mel(waves[i], frames=mel.frames(len(waves[i]))),
        "augment": lambda i: augment.augment(waves[i], rng),
    }
    figures = {}
    for name, stage in stages.items():
        figures[name] = rate(settings, ((stage(i), lengths[i])[1] for i in forever(len(waves))))
    for workers in dict.fromkeys((0, settings.workers)):
        name = f"pipeline, {workers} workers" if workers else "pipeline, this process"
        figures[name] = pipeline(settings, source, workers) / max(workers, 1)
    figures["pipeline, all augmented and masked"] = pipeline(settings, source, 0, changed=1.0)
    return figures


def forever(count: int) -> Iterable[int]:
    while True:
        yield from range(count)


def rate(
    settings: Settings, heard: Iterable[float], clock: Callable[[], float] = time.process_time
) -> float:
    """Seconds of audio per second, of a stage that says how much it has just heard."""
    began, total = clock(), 0.0
    for seconds in heard:
        total += seconds
        if (passed := clock() - began) > settings.seconds:
            return total / passed
    raise ValueError("the stage ended")


def pipeline(
    settings: Settings, source: sources.RandomAccess, workers: int, *, changed: float = 0.0
) -> float:
    part = Part(
        name="speech", source=source, compile=TASK.compile, augmented=changed, masked=changed
    )
    mixture = Mixture(parts=(part,), processor=settings.processor, buckets=BUCKETS, workers=workers)
    batches = iter(mixture)
    for _ in range(mixture.ahead + 2):  # processes have started, queues are full
        next(batches)

    def heard():
        before = batches.counts["speech"]["seconds"]
        for _ in batches:
            now = batches.counts["speech"]["seconds"]
            yield now - before
            before = now

    try:
        return rate(settings, heard(), time.perf_counter if workers else time.process_time)
    finally:
        print(f"{batches.report()}\n")
        batches.close()


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    command.run(main, Settings, "benchmarks.data", __doc__)
