"""Folders that appear whole or not at all."""

import contextlib
import json
import pathlib
import shutil
from collections.abc import Iterator

WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".index"}

CHECKPOINT = "checkpoint"  # the folder within a folder of ours that holds its weights


def is_ours(path: pathlib.Path) -> bool:
    return (path / CHECKPOINT).is_dir()


@contextlib.contextmanager
def fresh(path: pathlib.Path, nbytes: int, *, overwrite: bool) -> Iterator[pathlib.Path]:
    """Gives a hidden folder beside `path` which takes its name when the block has ended well.

    Args:
      nbytes: what it will hold, roughly.
      overwrite: whether `path` may have content, which is then replaced.

    Raises:
      ValueError: `path` has content, or its disk has too little room for `nbytes`.
    """
    path = path.absolute()
    if path.exists() and not path.is_dir():
        raise ValueError(f"wanted a folder to write to, got the file {path}")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise ValueError(f"{path} is not empty; --overwrite replaces it")
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if nbytes > free:
        raise ValueError(
            f"{path} needs {nbytes / 1e9:.3f} GB, its disk has {free / 1e9:.3f} GB free"
        )
    partial, old = (path.with_name(f".{path.name}.{what}") for what in ("partial", "old"))
    for left in (partial, old):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if path.is_dir():
            path.rename(old)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


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
