"""Folders that appear whole or not at all."""

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any

WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".index"}

CHECKPOINT = "checkpoint"  # the folder within a folder of ours that holds its weights


def is_ours(path: pathlib.Path) -> bool:
    return (path / CHECKPOINT).is_dir()


@contextlib.contextmanager
def fresh(
    path: pathlib.Path,
    nbytes: int,
    *,
    source: pathlib.Path,
    others: Iterable[pathlib.Path] = (),
    overwrite: bool,
) -> Iterator[pathlib.Path]:
    """Gives a hidden folder beside `path` which takes its name when the block has ended well.

    Args:
      nbytes: what it will hold, roughly.
      source, others: what is read meanwhile.
      overwrite: whether `path` may have content, which is then replaced.

    Raises:
      ValueError: `path` has content, cannot be replaced, is a source or within it or around it,
        or its disk has too little room for `nbytes`.
      OSError: nothing can be written beside `path`.
    """
    path = path.resolve()
    partial, old = (path.with_name(f".{path.name}.{what}") for what in ("partial", "old"))
    if old.is_dir() and not path.exists():  # the last run was killed between its two renames
        old.rename(path)
    _check(path, nbytes, [each.resolve() for each in (source, *others)], overwrite)
    for left in (partial, old):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise OSError(f"cannot write beside {path}: {error}") from error
    try:
        yield partial
        if path.is_dir():
            path.rename(old)
        try:
            partial.rename(path)
        except BaseException:
            if old.is_dir():
                old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check(
    path: pathlib.Path, nbytes: int, sources: Iterable[pathlib.Path], overwrite: bool
) -> None:
    if path.exists() and not path.is_dir():
        raise ValueError(f"wanted a folder to write to, got the file {path}")
    for source in sources:
        if path.is_relative_to(source) or source.is_relative_to(path):
            raise ValueError(f"wanted a folder apart from {source} to write to, got {path}")
    if os.path.ismount(path):
        raise ValueError(f"{path} is a mount point, which cannot be replaced: name a folder in it")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise ValueError(f"{path} is not empty; --overwrite replaces it")
    disk = next(folder for folder in path.parents if folder.exists())
    free = shutil.disk_usage(disk).free
    if nbytes > free:
        raise ValueError(
            f"{path} needs {nbytes / 1e9:.3f} GB, its disk has {free / 1e9:.3f} GB free"
        )


@contextlib.contextmanager
def staged(path: pathlib.Path, stale: Callable[[str], Any]) -> Iterator[pathlib.Path]:
    """Gives a hidden folder in `path` whose files move up when the block has ended well.

    The old config.json goes first and the new one comes last: nothing loads without it, so that
    a process that is killed in between leaves no mixture of two models.

    Args:
      stale: tells from a file's name whether it goes with the old config.json.
    """
    partial, last = path / ".partial", "config.json"
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    (path / last).unlink(missing_ok=True)
    for file in list(path.iterdir()):
        if stale(file.name):
            file.unlink()
    for file in sorted(partial.iterdir(), key=lambda file: file.name == last):
        file.replace(path / file.name)
    partial.rmdir()


def copy_settings(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies every file that holds no weights, byte for byte."""
    for file in sorted(source.iterdir()):
        weights = file.suffix in WEIGHTS or file.name.endswith(".safetensors.index.json")
        if file.is_file() and not weights:
            shutil.copyfile(file, target / file.name)


def set_dtype(folder: pathlib.Path, dtype: str) -> None:
    """Lets config.json say what the weights now are, where it says anything."""
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    for section in (config, config.get("text_config") or {}, config.get("audio_config") or {}):
        for field in ("dtype", "torch_dtype"):
            if field in section:
                section[field] = dtype
    path.write_text(json.dumps(config, indent=2) + "\n", "utf-8")
