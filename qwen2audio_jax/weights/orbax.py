"""Our folders: an Orbax checkpoint beside the config and tokenizer files, so that one is whole.

    config.json, tokenizer.json, ...   as they came
    checkpoint/                        every parameter of every layer by its key in `table`
    huggingface/                       the headers of the files it came from, to give them back

Layers are stored one by one and stacked when a scanned model asks for it.
"""

import contextlib
import logging
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from qwen2audio_jax.config import Config
from qwen2audio_jax.weights import huggingface, table
from qwen2audio_jax.weights.folder import CHECKPOINT

LAYOUT = "huggingface"
CHUNK_BYTES = 64 * 2**20
GROUP_BYTES = 512 * 2**20  # what is in flight at once, but for a tensor that is larger


def find(folder: pathlib.Path, config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and stored dtype of every parameter, by its key.

    Raises:
      ValueError: the checkpoint is damaged, or parameters are unknown, missing or of the wrong
        shape; the message names them all.
    """
    path = folder / CHECKPOINT
    try:
        with quietly():
            found = ocp.metadata(path).metadata
        found = {key: jax.ShapeDtypeStruct(x.shape, x.dtype) for key, x in found.items()}
    except Exception as error:  # whatever Orbax and TensorStore raise
        raise ValueError(f"{path} is a damaged checkpoint: {_line(error)}") from error
    wanted = {entry.key: entry.our_shape for entry in table.entries(config)}
    problems = [f"{key} is unknown" for key in found if key not in wanted]
    problems += [f"{key} is missing" for key in wanted if key not in found]
    problems += [
        f"{key} has shape {found[key].shape}, wanted {shape}"
        for key, shape in wanted.items()
        if key in found and found[key].shape != shape
    ]
    if problems:
        raise ValueError(f"{folder} is no whole model: {'; '.join(problems)}")
    return found


def read(folder: pathlib.Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Reads some parameters, each in the dtype and to the sharding that is asked for."""
    path, context = folder / CHECKPOINT, ocp.Context()
    context.pytree.loading.partial_load = True
    try:
        with quietly(), context:
            return ocp.load(path, dict(wanted))
    except Exception as error:
        raise ValueError(f"{path} is a damaged checkpoint: {_line(error)}") from error


def write(
    folder: pathlib.Path,
    arrays: Iterable[tuple[str, np.ndarray | jax.Array]],
    advance: Callable[[int], Any],
) -> None:
    """Writes parameters as they come; the checkpoint is there when all of them are.

    Args:
      arrays: keys and contents; no more than `GROUP_BYTES` or one array is held. One that lies on
        several devices is stored in the parts that they hold.
      advance: is told the bytes written.

    Raises:
      OSError: they cannot be written.
    """
    path = folder / CHECKPOINT
    group: dict[str, np.ndarray | jax.Array] = {}
    context = ocp.Context()
    # random-looking mantissas hardly compress, and time goes into trying
    context.array.saving.use_compression = False
    # small pieces, so that no device reads much more than the part that it holds
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    # one device writes what all have
    context.array.saving.use_replica_parallel = False
    context.memory.write_concurrent_bytes = GROUP_BYTES
    context.memory.deepcopy_host_arrays = False  # nobody changes these arrays

    def flush() -> None:
        if group:
            ocp.partial.save(path, group)
            advance(sum(x.nbytes for x in group.values()))
            group.clear()

    try:
        with quietly(), context:
            for key, array in arrays:
                if sum(x.nbytes for x in group.values()) + array.nbytes > GROUP_BYTES:
                    flush()
                group[key] = array
                del array
            flush()
            ocp.partial.finalize(path)
    except Exception as error:
        raise OSError(f"cannot write {path}: {_line(error)}") from error


def write_layout(folder: pathlib.Path, layout: huggingface.Layout) -> None:
    (folder / LAYOUT).mkdir()
    for name, header in layout.headers.items():
        (folder / LAYOUT / f"{name}.header").write_bytes(header)
    if layout.index is not None:
        (folder / LAYOUT / huggingface.INDEX).write_bytes(layout.index)


def read_layout(folder: pathlib.Path) -> huggingface.Layout | None:
    """How the files looked that this checkpoint came from; None if it came from none."""
    files = sorted((folder / LAYOUT).glob("*.header"))
    index = folder / LAYOUT / huggingface.INDEX
    headers = {file.name.removesuffix(".header"): file.read_bytes() for file in files}
    return (
        huggingface.Layout(headers, index.read_bytes() if index.is_file() else None)
        if files
        else None
    )


def _line(error: Exception) -> str:
    """What went wrong; TensorStore puts every file that it happened in before that."""
    return " ".join(str(error).split()).rpartition('": ')[2][:300] or type(error).__name__


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keeps Orbax and TensorStore from printing what they also raise, from several threads."""
    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda unraisable: None
    try:
        yield
    except Exception:
        hook = _without_late_writes(hook)
        raise
    finally:
        logger.setLevel(level)
        sys.unraisablehook = hook


def _without_late_writes(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`hook`, but for writes that end after the first one's failure has closed their event loop."""

    def late(unraisable):
        return isinstance(unraisable.exc_value, RuntimeError) and str(
            unraisable.exc_value
        ).startswith("Event loop is closed")

    return lambda unraisable: None if late(unraisable) else hook(unraisable)
