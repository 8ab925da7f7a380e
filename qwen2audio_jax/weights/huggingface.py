"""Hugging Face's folders: safetensors, one file or an index with shards.

Only the headers are read to know whether a checkpoint is whole. A tensor is mapped when it is
asked for and let go with its last reference, so that memory holds one at a time.

Source: the format, https://huggingface.co/docs/safetensors.
"""

import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from qwen2audio_jax.config import Config
from qwen2audio_jax.weights import table

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PATTERNS = ("*.safetensors", INDEX, "*.json", "*.jinja", "*.txt")
FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
SHARD_BYTES = 4 * 10**9
DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Tensor(NamedTuple):
    """Where a tensor lies."""

    file: pathlib.Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """Maps the tensor: its pages are read when they are looked at."""
        return np.memmap(self.file, self.dtype, "r", self.offset, self.shape)


def is_in(folder: pathlib.Path) -> bool:
    """Whether a folder holds a checkpoint's tensors, besides its settings."""
    return any((folder / name).is_file() for name in (SINGLE, INDEX))


def shards(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files that hold a checkpoint's tensors, in order; a single file wins over an index.

    Raises:
      ValueError: there are none, or the index is damaged or names files that are not there.
    """
    if (folder / SINGLE).is_file():  # first, as transformers does
        return [folder / SINGLE]
    if (path := folder / INDEX).is_file():
        files = [folder / name for name in dict.fromkeys(_weight_map(path).values())]
        if missing := [file.name for file in files if not file.is_file()]:
            raise ValueError(f"{path} names shards that are not there: {', '.join(missing)}")
        return files
    hint = "; that of the run there is in its model/" if (folder / "model").is_dir() else ""
    raise ValueError(f"wanted {SINGLE} or {INDEX} in {folder}, got neither{hint}")


def header(file: pathlib.Path) -> tuple[bytes, dict[str, Any]]:
    """A file's header: as it stands, with the eight bytes of its length, and parsed.

    Raises:
      ValueError: it is cut short, or is no header.
    """
    with file.open("rb") as f:
        start = f.read(8)
        length, size = int.from_bytes(start, "little"), file.stat().st_size
        if len(start) < 8 or length > size - 8:
            raise ValueError(f"{file} is damaged: truncated or no safetensors file: {size} bytes")
        raw = f.read(length)
    try:
        parsed = json.loads(raw)
        for name, info in parsed.items():
            if name != "__metadata__":
                begin, end = info["data_offsets"]
                if not all(type(n) is int and n >= 0 for n in (begin, end, *info["shape"])):
                    raise ValueError(f"{name} has shape {info['shape']}, bytes {begin} to {end}")
                info["dtype"].isupper()
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} has a damaged header: {error!r}") from error
    return start + raw, parsed


def find(folder: pathlib.Path, config: Config) -> dict[str, Tensor]:
    """Every tensor of a whole checkpoint, by its name on disk.

    Raises:
      ValueError: tensors are unknown, missing, of the wrong shape or type, or cut short; the
        message names them all.
    """
    found, problems = listed(folder, table.on_disk)
    tied = {table.HEAD} if config.decoder.tied else set()
    wanted = {entry.name: entry.their_shape for entry in table.entries(config)}
    problems += compare(found, wanted, tied)
    if problems:
        raise ValueError(f"{folder} is no whole model: {'; '.join(problems)}")
    if tied:
        check_tied(found, table.HEAD, table.EMBEDDING, folder)
    return found


def listed(
    folder: pathlib.Path, named: Callable[[str], str | None]
) -> tuple[dict[str, Tensor], list[str]]:
    """Where a checkpoint's tensors lie, and what is wrong with its files.

    Args:
      named: what a tensor is to be called; None: it is not asked for.

    Raises:
      ValueError: there are no files, or they have no headers.
    """
    found, problems = {}, []
    for file in shards(folder):
        raw, parsed = header(file)
        size = file.stat().st_size
        for theirs, info in parsed.items():
            if theirs == "__metadata__":
                continue
            begin, end = info["data_offsets"]
            if len(raw) + end > size:
                problems.append(
                    f"{theirs} is truncated: it ends at byte {len(raw) + end} "
                    f"of {file.name}, which has {size}"
                )
            if (name := named(theirs)) is None:
                continue
            dtype, shape = DTYPES.get(info["dtype"]), tuple(info["shape"])
            if dtype is None:
                problems.append(f"{theirs} is {info['dtype']}, wanted one of {', '.join(DTYPES)}")
                dtype = np.dtype(np.float32)
            elif end - begin != math.prod(shape) * dtype.itemsize:
                problems.append(f"{theirs} of shape {shape} takes {end - begin} bytes")
            if name in found:
                problems.append(f"{theirs} is there twice")
            found[name] = Tensor(file, len(raw) + begin, dtype, shape)
        problems += _uncovered(file.name, parsed, size - len(raw))
    return found, problems


def _uncovered(file: str, parsed: Mapping[str, Any], size: int) -> list[str]:
    """Where the bytes after a header belong to no tensor, or to two."""
    spans = [info["data_offsets"] for name, info in parsed.items() if name != "__metadata__"]
    problems, last = [], 0
    for begin, end in [*sorted(spans), [size, size]]:
        if begin > last:
            problems.append(f"{file} has {begin - last} bytes of data that belong to no tensor")
        elif begin < last and begin < size:
            problems.append(f"{file} has {last - begin} bytes of data that belong to two tensors")
        last = max(last, end)
    return problems


def compare(
    found: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], known: Collection[str] = ()
) -> list[str]:
    """Tensors that are unknown, missing or of the wrong shape.

    Args:
      known: those that may be there, or not.
    """
    problems = [f"{name} is unknown" for name in found if name not in wanted and name not in known]
    problems += [f"{name} is missing" for name in wanted if name not in found]
    problems += [
        f"{name} has shape {found[name].shape}, wanted {shape}"
        for name, shape in wanted.items()
        if name in found and found[name].shape != shape
    ]
    return problems


def check_tied(
    found: Mapping[str, Tensor], head: str, embedding: str, folder: pathlib.Path
) -> None:
    """A tied model may store its head too: transformers 5 never ties this architecture.

    Raises:
      ValueError: it does, and the head is not the embedding.
    """
    if head in found and not np.array_equal(found[head].read(), found[embedding].read()):
        raise ValueError(f"{folder}: the config ties {head} to {embedding}, but they differ")


class Layout(NamedTuple):
    """What a folder's files hold: per shard its name and its header, as bytes."""

    headers: dict[str, bytes]
    index: bytes | None


def layout(folder: pathlib.Path) -> Layout:
    """The layout that a folder's files have."""
    headers = {file.name: header(file)[0] for file in shards(folder)}
    return Layout(headers, None if SINGLE in headers else (folder / INDEX).read_bytes())


def plan(tensors: Iterable[tuple[str, np.dtype, tuple[int, ...]]]) -> Layout:
    """Spreads tensors over shards, for a model that comes from no folder."""
    groups, room = [], 0
    for name, dtype, shape in tensors:
        nbytes = math.prod(shape) * dtype.itemsize
        if not groups or nbytes > room:
            groups.append([])
            room = SHARD_BYTES
        groups[-1].append((name, dtype, shape, nbytes))
        room -= nbytes
    count = len(groups)
    files = [
        SINGLE if count == 1 else f"model-{i + 1:05}-of-{count:05}.safetensors"
        for i in range(count)
    ]
    if count == 1:
        return Layout({SINGLE: _header(groups[0])}, None)
    index = {
        "metadata": {"total_size": sum(t[3] for group in groups for t in group)},
        "weight_map": {
            t[0]: file for file, group in zip(files, groups, strict=True) for t in group
        },
    }
    headers = {file: _header(group) for file, group in zip(files, groups, strict=True)}
    return Layout(headers, (json.dumps(index, indent=2) + "\n").encode())


def _header(group: Iterable[tuple[str, np.dtype, tuple[int, ...], int]]) -> bytes:
    content, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, dtype, shape, nbytes in group:
        offsets = [offset, offset := offset + nbytes]
        content[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": offsets}
    raw = json.dumps(content, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def order(header: bytes) -> Iterator[str]:
    """The tensors of a file, in the order of their bytes."""
    content = json.loads(header[8:])
    content.pop("__metadata__", None)
    return iter(sorted(content, key=lambda name: content[name]["data_offsets"]))


def write(
    folder: pathlib.Path,
    layout: Layout,
    read: Callable[[str], np.ndarray],
    advance: Callable[[int], Any],
) -> None:
    """Writes the files of `layout`.

    Args:
      read: gives the tensor of a name on disk, in the dtype that the layout says.
      advance: is told the bytes written.

    Raises:
      ValueError: a tensor is not of the type and shape that the layout says.
    """
    for name, raw in layout.headers.items():
        infos = json.loads(raw[8:])
        with (folder / name).open("wb") as f:
            f.write(raw)
            for tensor in order(raw):
                content = np.ascontiguousarray(read(table.on_disk(tensor)))
                wanted = infos[tensor]["dtype"], tuple(infos[tensor]["shape"])
                if wanted != (got := (NAMES.get(content.dtype, content.dtype), content.shape)):
                    raise ValueError(f"{tensor}: wanted {wanted} as in the header, got {got}")
                f.write(content.reshape(-1).view(np.uint8))
                advance(content.nbytes)
                del content  # before the next one is read
            f.flush()
            os.fsync(f.fileno())
    if layout.index is not None:
        (folder / INDEX).write_bytes(layout.index)


def _weight_map(path: pathlib.Path) -> dict[str, str]:
    try:
        return dict(json.loads(path.read_text("utf-8"))["weight_map"])
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is a damaged index: {error!r}") from error
