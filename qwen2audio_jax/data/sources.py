"""Where samples come from, by name: manifests, ArrayRecord shards, data sets that tfds prepared.

A source is anything with `len(source)` and `source[i] -> dict`; worker processes get a pickled
copy. Audio stays what a row says (a path, a URL, bytes, samples) until a sample is compiled.
"""

import codecs
import collections
import contextlib
import dataclasses
import functools
import json
import mmap
import os
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import msgpack
import numpy as np
from etils import epath

from qwen2audio_jax.audio import content
from qwen2audio_jax.data import prepared, storage
from qwen2audio_jax.data.chats import AUDIOS
from qwen2audio_jax.data.example import BadSample, hear_fetched, on_disk

MESSAGES = ("messages", "prompt", "chosen", "rejected")  # fields whose parts name clips
NAMED = ("audio", "audio_url", "input_audio", "path", "url")  # how a part names its clip
# What no folder goes in front of; the name of a clip may have the time in it, with colons.
ELSEWHERE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/|data:|~|/")
SUFFIX = ".array_record"
UNFINISHED = ".unfinished"  # ends the name of a shard that is being written
PROGRESS = "progress.jsonl"  # beside shards: of which manifest they are, and which are done
NUMBERED = re.compile(r"(?P<before>.*?)\d+-of-(?P<count>\d+)(?P<after>.*)")
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # as PowerShell begins a file with
FEW = 10  # rows of a manifest that are tried at once: it may be no manifest at all


@dataclasses.dataclass(frozen=True)
class Made:
    """Samples by number, of which there is no end."""

    make: Callable[[int], dict[str, Any]]
    count: int  # that are told apart

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.make(index)


@runtime_checkable
class RandomAccess(Protocol):
    """What a mixture draws from.

    One whose rows have better names than their numbers has a method `where(index) -> str`, too.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


def where(source: RandomAccess, row: int) -> str:
    """What to call a row in messages: "line 54 of rows.jsonl", or "row 53"."""
    return source.where(row) if hasattr(source, "where") else f"row {row}"


def open_source(
    spec: str | os.PathLike, *, audio: Sequence[str] = ("audio",), rate: int | None = None
) -> RandomAccess:
    """Opens samples by name.

    Args:
      spec: `rows.jsonl`, or `rows.jsonl:test` for the rows whose "split" is test, on this disk, a
        web server, or any storage that fsspec knows (gs://, s3://; it is copied to where this host
        keeps temporary files, TMPDIR, until the process ends); ArrayRecord shards on a disk: one, a
        pattern (`train-*.array_record`) or a folder of them; or `tfds:name/config:split`, as
        tensorflow-datasets prepared it (`tfds:librispeech:train_clean100[:10%]`).
      audio: a manifest's fields that name clips: relative paths start at the manifest's folder,
        as those in conversations do.
      rate: sampling rate of a tfds data set that states none.

    Raises:
      FileNotFoundError: there is no such file or data set.
      OSError: its storage does not answer, or refuses.
      ValueError: it has no samples, or is of no kind that can be read.
      ImportError: the package for its storage, or for its clips', is not installed.
    """
    text = os.fspath(spec)
    storage.reachable(text)
    if text.startswith("tfds:"):
        return prepared.open_split(text.removeprefix("tfds:"), rate=rate)
    if manifest := re.fullmatch(r"(.+\.jsonl?)(?::([^:/]+))?", text):
        return Manifest(manifest[1], split=manifest[2], audio=audio)
    if storage.elsewhere(text):
        on_disk(text, "shards on a disk (mount the bucket), or a .jsonl manifest")
    if SUFFIX in text or os.path.isdir(text):
        return Shards(text)
    wanted = f"a .jsonl manifest, {SUFFIX} shards or tfds:name/config:split"
    raise ValueError(f"wanted {wanted}, got {text}")


class Manifest:
    """JSON Lines. Rows are parsed when they are asked for; what cannot be is a `BadSample`."""

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        split: str | None = None,
        audio: Sequence[str] = ("audio",),
    ):
        self.path, self.audio = os.fspath(path), tuple(audio)
        self._local = _local(self.path)
        self.lines = _lines(self._data)
        if self._data[:2] in UTF_16:
            raise ValueError(f"{self.path}: wanted UTF-8, got UTF-16")
        first = [self._bad(i) for i in range(min(len(self), FEW))]
        if all(first):
            if first and self._data[slice(*self.lines[0, 1:])].lstrip()[:1] == b"[":
                wanted = "an object a line, got one array of all (jq -c '.[]' makes lines of it)"
                raise ValueError(f"{self.path}: wanted {wanted}")
            raise ValueError(first[0] if first else f"{self.path}: no rows")
        if split is not None:
            self.lines = self.lines[self._of(split)]

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return each_clip(self._written(index), self.audio, lambda clip: _rooted(clip, self.path))

    def line(self, index: int) -> int:
        """The number of a row's line in the file."""
        return int(self.lines[index, 0])

    @property
    def crc(self) -> int:
        """Of the whole file: another one has another."""
        return zlib.crc32(self._data)

    def where(self, index: int) -> str:
        return f"line {self.line(index)} of {os.path.basename(self.path)}"

    def _written(self, index: int) -> dict[str, Any]:
        """The row as it is written."""
        number, start, stop = self.lines[index]
        try:
            row = json.loads(self._data[start:stop].decode("utf-8"))
            if not isinstance(row, dict):
                raise ValueError(f"wanted an object, got {type(row).__name__}")
        except (ValueError, RecursionError) as error:
            raise BadSample("bad row", f"{self.path}, line {number}: {error}") from None
        return row

    def _bad(self, index: int) -> str | None:
        """What is wrong with a row, as far as can be told without asking for its clips."""
        place = f"{self.path}, line {self.line(index)}"
        try:
            each_clip(self[index], self.audio, _reachable)
        except BadSample as error:
            return str(error)
        except ValueError as error:
            return f"{place}: {error}"
        except ImportError as error:  # no row's fault
            raise ImportError(f"{error} ({place})") from None
        return None

    def _of(self, split: str) -> list[bool]:
        """Which rows are of a split: also those of which nobody can tell, to be counted as bad."""
        nobody_knows = object()

        def of(index: int) -> Any:
            try:
                found = self._written(index).get("split")
                return found if found is None else str(found)  # on the command line all are texts
            except BadSample:
                return nobody_knows

        splits = [of(i) for i in range(len(self))]
        if split not in splits:
            known = {each for each in splits if each not in (None, nobody_knows)}
            there = ", ".join(sorted(known)) or "none"
            raise ValueError(f"{self.path}: no rows with split {split!r}; splits in it: {there}")
        return [each in (split, nobody_knows) for each in splits]

    @functools.cached_property
    def _data(self) -> mmap.mmap | bytes:
        with open(self._local, "rb") as file:
            try:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError:  # an empty file cannot be mapped
                return b""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_data"}


def _local(path: str) -> str:
    """Where a manifest lies on this host's disk."""
    try:
        if storage.elsewhere(path):
            return storage.copied(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"no manifest at {path}") from None
    if os.path.isdir(path):
        raise ValueError(f"wanted a manifest, got a folder: {path}")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no manifest at {path}")
    return path


def _lines(data: mmap.mmap | bytes) -> np.ndarray:
    """Number, start and stop of each line that is not blank."""
    lines, number = [], 0
    start = len(codecs.BOM_UTF8) if data[:3] == codecs.BOM_UTF8 else 0
    while start < len(data):
        number += 1
        stop = data.find(b"\n", start)
        stop = len(data) if stop < 0 else stop
        if data[start:stop].strip():
            lines.append((number, start, stop))
        start = stop + 1
    return np.array(lines, np.int64).reshape(-1, 3)


def each_clip(row: dict[str, Any], audio: Sequence[str], change: Callable) -> dict[str, Any]:
    """The row with `change(clip)` in place of each clip, in `audio` fields and in conversations."""
    row = {**row, **{name: change(row[name]) for name in audio if row.get(name) is not None}}
    told = {name: _in_messages(row[name], change) for name in MESSAGES if name in row}
    if told and AUDIOS not in audio and isinstance(row.get(AUDIOS), list):
        told[AUDIOS] = [change(clip) for clip in row[AUDIOS]]
    return row | told


def clips(row: dict[str, Any], audio: Sequence[str] = ("audio",)) -> list[Any]:
    """All clips of a row, as `each_clip` finds them."""
    found: list[Any] = []
    each_clip(row, audio, found.append)
    return found


def _in_messages(messages: Any, change: Callable) -> Any:
    if isinstance(messages, list):
        return [_in_messages(message, change) for message in messages]
    if not isinstance(messages, dict):
        return messages
    if "content" in messages:
        return {**messages, "content": _in_messages(messages["content"], change)}
    clips = {name: messages[name] for name in NAMED if messages.get(name) is not None}
    return messages | {name: change(clip) for name, clip in clips.items()}


def _reachable(clip: Any) -> None:
    path = (clip.get("path") or clip.get("url")) if isinstance(clip, Mapping) else clip
    if isinstance(path, str):
        storage.reachable(path)


def _rooted(clip: Any, manifest: str) -> Any:
    if isinstance(clip, str) and clip and not ELSEWHERE.match(clip):
        return storage.beside(manifest, clip)
    if isinstance(clip, dict) and not clip.get("bytes"):
        names = [name for name in ("path", "url") if clip.get(name)]
        return clip | {name: _rooted(clip[name], manifest) for name in names}
    return clip


def embed(row: dict[str, Any], audio: Sequence[str] = ("audio",)) -> dict[str, Any]:
    """The row with each clip's file in it, as it is; clips on web servers stay URLs.

    Raises:
      BadSample: a clip is missing, is no sound or is too long.
    """

    def file(clip: Any) -> Any:
        _, found = hear_fetched(clip)
        if not isinstance(found, str | bytes):
            return clip
        if isinstance(found, bytes) or found.startswith(("http:", "https:", "data:")):
            return found
        return content(found)

    return each_clip(row, audio, file)


class Shards:
    """ArrayRecord files whose records are samples, in msgpack or JSON; `write` makes them."""

    def __init__(self, spec: str):
        on_disk(spec, "shards on a disk (mount the bucket)")
        import grain  # an extra

        self.paths = shards(spec)
        if not self.paths:
            raise FileNotFoundError(f"no {SUFFIX} shards at {spec}")
        if epath.Path(spec).is_dir():  # who names shards may want some
            _complete(self.paths)
        self._records = grain.sources.ArrayRecordDataSource(self.paths)

    @property
    def stamp(self) -> str:
        """The files' names, sizes and times: as long as it is the same, so are the rows."""
        files = [(os.path.basename(path), os.stat(path)) for path in self.paths]
        return " ".join(f"{name} {file.st_size} {file.st_mtime_ns}" for name, file in files)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            record = self._records[index]
            return json.loads(record) if record[:1] == b"{" else msgpack.unpackb(record)
        except (ValueError, RuntimeError, msgpack.UnpackException) as error:
            message = f"{os.path.dirname(self.paths[0])}, record {index}: {error}"
            raise BadSample("bad row", message) from None


def shards(spec: str) -> list[str]:
    """The files that a folder, or a pattern, is of on a disk; none, if it is of nothing there."""
    folder, pattern = epath.Path(spec), f"*{SUFFIX}*"
    if not folder.is_dir():
        folder, pattern = folder.parent, folder.name
    paths = sorted(os.fspath(path) for path in folder.glob(pattern))
    return [path for path in paths if not path.endswith(UNFINISHED)]


def manifest_of(folder: str) -> str | None:
    """What a folder of shards was written from, as `open_source` takes it; None: nobody noted."""
    try:
        with open(os.path.join(folder, PROGRESS), encoding="utf-8") as file:
            noted = json.loads(file.readline())
    except (OSError, ValueError):
        return None
    return noted.get("path", noted.get("manifest")) if isinstance(noted, dict) else None


def _complete(paths: Sequence[str]) -> None:
    """Refuses a folder in which a shard is missing, of those that say of how many they are."""
    numbered = (NUMBERED.fullmatch(path) for path in paths)
    sets = collections.Counter(
        found.group("before", "count", "after") for found in numbered if found
    )
    for (before, count, after), got in sets.items():
        if got != int(count):
            these = f"{before}*-of-{count}{after}"
            raise ValueError(f"wanted all {int(count)} shards {these}, got {got}: some are missing")


def as_record(row: Mapping[str, Any]) -> bytes:
    """A row as a record of a shard.

    Raises:
      BadSample: it has what no record can hold: half a letter, a number of over 64 bits.
    """
    try:
        return msgpack.packb(dict(row))
    except (ValueError, TypeError, OverflowError) as error:
        raise BadSample("bad row", f"{type(error).__name__}: {error}") from None


def write(path: epath.PathLike, records: Iterable[bytes]) -> int:
    """Writes records as one ArrayRecord shard, whole or not at all; gives how many there were."""
    from array_record.python import array_record_module  # an extra

    unfinished = f"{os.fspath(path)}{UNFINISHED}"
    # Groups of one: a row is read without the rows around it.
    writer = array_record_module.ArrayRecordWriter(unfinished, "group_size:1")
    count = 0
    try:
        for record in records:
            writer.write(record)
            count += 1
    finally:
        writer.close()
    _sync(unfinished)
    os.replace(unfinished, path)
    with contextlib.suppress(OSError):  # not of every file system
        _sync(os.path.dirname(path) or ".")
    return count


def _sync(path: str) -> None:
    """Has a disk hold what was written, whatever becomes of the machine."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
