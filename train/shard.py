"""Writes a manifest and its clips into ArrayRecord shards, which a training reads in any order.

    python -m train.shard clips/manifest.jsonl:train shards      # one split; all processors
    python -m train.shard gs://bucket/rows.jsonl shards --rows 4096 --workers 16

A clip's file is stored as it is, after a look whether it can be heard; rows that cannot be used
are left out, told by reason, and listed in shards/left_out.jsonl. A run that was killed goes on
where it was. Train on the result with `shards` in the manifest's place; another split of the
manifest may be held out.
"""

import collections
import concurrent.futures
import concurrent.futures.process
import dataclasses
import json
import multiprocessing
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import tyro

from qwen2audio_jax.data import sources
from qwen2audio_jax.data.chats import is_conversation, is_pair
from qwen2audio_jax.data.example import BadSample, why
from qwen2audio_jax.data.workers import settle
from qwen2audio_jax.progress import Progress
from train import command

_given: tuple[Any, ...] = ()  # a worker's: settings, source, how many shards


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What to write, and where."""

    manifest: Annotated[str, tyro.conf.Positional]
    """JSONL on this disk, gs:// or s3://; `rows.jsonl:train` for the rows of one split."""
    out: Annotated[pathlib.Path, tyro.conf.Positional]
    """The folder for the shards."""
    rows: int = 1000
    """Of the manifest, in a shard."""
    audio: tuple[str, ...] = ("audio",)
    """The fields that name clips, beside those of conversations; none for text alone."""
    workers: int = os.cpu_count() or 1
    """Processes; 0 to work in this one."""
    fatal: bool = False
    """Whether a row that cannot be used ends the run."""


@dataclasses.dataclass(frozen=True)
class Written:
    """A shard that is done: its number, how many rows it holds, those that were left out, and how
    many of what it holds are without a clip."""

    shard: int
    rows: int
    left_out: list[dict]
    mute: int = 0


def main(settings: Settings) -> None:
    for name, least in (("rows", 1), ("workers", 0)):
        if (got := getattr(settings, name)) < least:
            raise ValueError(f"wanted --{name} of at least {least}, got {got}")
    sources.on_disk(settings.out)
    path, split = _split(settings.manifest)
    source = sources.Manifest(path, split=split, audio=settings.audio)
    _check_fields(source)
    settings.out.mkdir(parents=True, exist_ok=True)
    shards = -(-len(source) // settings.rows)
    done = _resume(settings, source)
    todo = [shard for shard in range(shards) if shard not in done]
    with (
        open(settings.out / sources.PROGRESS, "a") as noted,
        Progress(shards, desc="writing", unit=" shards", initial=len(done)) as progress,
    ):
        for written in _write_all(settings, source, shards, todo):
            # After the shard itself: what is noted here exists.
            noted.write(json.dumps(dataclasses.asdict(written)) + "\n")
            noted.flush()
            os.fsync(noted.fileno())
            done[written.shard] = written
            progress.update()
    _tell(settings, [done[shard] for shard in range(shards)])


def _check_fields(source: sources.Manifest) -> None:
    """Refuses fields that no row has: clips of others would stay names of files, without sound.

    Few rows may have one; all are looked at where none has, but those of conversations.
    """
    missing, known = dict.fromkeys(source.audio), {}
    for index in range(len(source) if missing else 0):
        try:
            row = source[index]
        except BadSample:  # left out when it is to be written
            continue
        if is_conversation(row) or is_pair(row):
            return
        known |= dict.fromkeys(row)
        missing = {name: None for name in missing if name not in row}
        if not missing:
            return
    if missing and known:
        wanted = f"wanted --audio of its fields ({', '.join(known)}; nothing behind it: no clips)"
        raise ValueError(f"{source.path}: {wanted}, got {', '.join(missing)}")


def _split(spec: str) -> tuple[str, str | None]:
    path, colon, split = spec.rpartition(":")
    return (path, split) if colon and path.endswith((".jsonl", ".json")) else (spec, None)


def _resume(settings: Settings, source: sources.Manifest) -> dict[int, Written]:
    """What an earlier run has done, if it was about the same rows; else notes what this one is."""
    path = settings.out / sources.PROGRESS
    plan = {"manifest": settings.manifest, "crc": source.crc, "rows": settings.rows}
    plan["audio"] = list(settings.audio)
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]  # the last line may be cut
    if not whole:
        # Also from where else it is named: what is trained on may not be held out.
        here = {} if "://" in settings.manifest else {"path": os.path.abspath(settings.manifest)}
        path.write_text(json.dumps(plan | here) + "\n")
        return {}
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    first, *done = map(json.loads, whole.splitlines())
    for name, ours in plan.items():
        if first[name] != ours:
            raise ValueError(f"{settings.out} holds other shards: {name} {first[name]}, not {ours}")
    return {row["shard"]: Written(**row) for row in done}


def _write_all(
    settings: Settings, source: sources.Manifest, shards: int, todo: list[int]
) -> Iterator[Written]:
    if not settings.workers:
        yield from (write(settings, source, shards, shard) for shard in todo)
        return
    context = multiprocessing.get_context("spawn")  # jax does not survive a fork
    # To each process once: of a large manifest the index of lines alone is hundreds of megabytes.
    given = context, _begin, (settings, source, shards)
    with concurrent.futures.ProcessPoolExecutor(settings.workers, *given) as pool:
        jobs = [pool.submit(_with_given, write, shard) for shard in todo]
        try:
            for job in concurrent.futures.as_completed(jobs):
                yield job.result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise ChildProcessError(
                "a worker that writes shards was killed (out of memory?): wanted fewer --workers, "
                f"got {settings.workers}"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _begin(*given: Any) -> None:
    """What a worker does first: keeps what all of its shards are of."""
    settle()
    global _given
    _given = given


def _with_given(call: Callable[..., Written], shard: int) -> Written:
    return call(*_given, shard)


def write(settings: Settings, source: sources.Manifest, shards: int, shard: int) -> Written:
    """Writes one shard: whole, or not at all."""
    left_out, mute = [], 0

    def rows():
        nonlocal mute
        first = shard * settings.rows
        for index in range(first, min(first + settings.rows, len(source))):
            try:
                row = source[index]
                yield sources.as_record(sources.embed(row, settings.audio))
                mute += not sources.clips(row, settings.audio)
            except Exception as error:
                reason, message = why(error)
                if settings.fatal:
                    raise
                told = {"line": source.line(index), "reason": reason, "message": message}
                left_out.append(told)

    path = settings.out / f"{shard:05}-of-{shards:05}{sources.SUFFIX}"
    return Written(shard, sources.write(path, rows()), left_out, mute)


def _tell(settings: Settings, written: list[Written]) -> None:
    left_out = [row for each in written for row in each.left_out]
    lines = [json.dumps(row) + "\n" for row in left_out]
    (settings.out / "left_out.jsonl").write_text("".join(lines), "utf-8")
    print(f"{sum(each.rows for each in written)} rows in {len(written)} shards in {settings.out}")
    if mute := sum(each.mute for each in written):
        print(f"{mute} of them without a clip")
    for reason, count in collections.Counter(row["reason"] for row in left_out).most_common():
        print(f"{count} left out: {reason}")


if __name__ == "__main__":
    command.run(main, Settings, "train.shard", __doc__)
