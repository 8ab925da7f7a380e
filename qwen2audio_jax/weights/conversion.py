"""Hugging Face's folder -> ours -> Hugging Face's, bit for bit, in the memory of a few tensors."""

import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from qwen2audio_jax import sharding
from qwen2audio_jax.config import Config
from qwen2audio_jax.weights import bar, folder, huggingface, orbax, settings, table
from qwen2audio_jax.weights.contiguous import contiguous


def from_huggingface(
    source: pathlib.Path,
    target: pathlib.Path,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> None:
    """Makes a folder of ours; tokenizer and other files are copied as they are.

    Args:
      dtype: to store parameters in; None: as they are, and the way back gives identical files.
      mesh: each parameter is stored in the parts that it has there, so that a device reads its own
        alone; any other mesh can read them, too.

    Raises:
      ValueError: `source` is no whole model, the mesh does not divide it, or `target` cannot take
        it.
      OSError: `target` cannot be written.
    """
    config = settings.read(source)
    if folder.is_ours(source):
        raise ValueError(f"{source} is a folder of ours already")
    if mesh is not None:
        sharding.check(config, mesh)
    tensors = huggingface.find(source, config)
    rows = {entry.name: entry for entry in table.entries(config)}
    total = sum(row.count * _itemsize(dtype, tensors[name].dtype) for name, row in rows.items())

    def one(row: table.Entry) -> np.ndarray | jax.Array:
        # the file's pages are let go where they were copied, before the copy is written
        view, stored = row.to_ours(bits(tensors[row.name].read())), tensors[row.name].dtype
        part = lambda index: _copied(view[index], stored, dtype)
        if mesh is None:
            return part(...)
        place = NamedSharding(mesh, sharding.spec(row.path, row.our_shape, mesh))
        where = place.addressable_devices_indices_map(row.our_shape).items()
        # one by one: a part may be copied once more, onto its device
        parts = [jax.device_put(part(i), device).block_until_ready() for device, i in where]
        return jax.make_array_from_single_device_arrays(row.our_shape, place, parts)

    # in the order of the files, so that disks read ahead
    ordered = sorted(rows.values(), key=lambda row: tensors[row.name][:2])
    arrays = ((row.key, one(row)) for row in ordered)
    with folder.fresh(target, total, source=source, overwrite=overwrite) as partial:
        with bar("converting", total, progress) as shown:
            orbax.write(partial, arrays, shown.update)
        if dtype is None:
            orbax.write_layout(partial, huggingface.layout(source))
        folder.copy_settings(source, partial)
        if dtype is not None:
            folder.set_dtype(partial, np.dtype(dtype).name)


def to_huggingface(
    source: pathlib.Path,
    target: pathlib.Path,
    *,
    adapted: Mapping[str, Callable[[np.ndarray], np.ndarray]] | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> None:
    """Makes a folder that transformers loads, in the files that it once came from, if any.

    Args:
      adapted: makes other tensors of some, by their names on disk: in float32, to be stored in
        each one's own type again. With it `source` may be in Hugging Face's format, too.

    Raises:
      ValueError: `source` is no whole folder of ours, or `target` cannot take it.
      OSError: `target` cannot be written.
    """
    config = settings.read(source)
    if adapted is None and not folder.is_ours(source):
        raise ValueError(f"wanted a folder of ours, with {folder.CHECKPOINT}/ in it, got {source}")
    layout, total, tensors = (_ours if folder.is_ours(source) else _theirs)(source, config)

    def read(name: str) -> np.ndarray:
        tensor = next(tensors)
        if not adapted or name not in adapted:
            return tensor
        return adapted[name](tensor.astype(np.float32)).astype(tensor.dtype)

    with folder.fresh(target, total, source=source, overwrite=overwrite) as partial:
        with bar("converting", total, progress) as shown:
            huggingface.write(partial, layout, read, shown.update)
        folder.copy_settings(source, partial)


Stored = tuple[huggingface.Layout, int, Iterator[np.ndarray]]


def _ours(source: pathlib.Path, config: Config) -> Stored:
    """The files that a folder of ours came from or would have, their bytes, their tensors."""
    found = orbax.find(source, config)
    rows = {entry.name: entry for entry in table.entries(config)}
    if config.decoder.tied:
        rows[table.HEAD] = rows[table.EMBEDDING]
    layout = orbax.read_layout(source) or huggingface.plan(
        (name, found[row.key].dtype, row.their_shape) for name, row in rows.items()
    )
    names = _names(layout)
    total = sum(rows[name].count * found[rows[name].key].dtype.itemsize for name in names)
    return layout, total, _stream(source, [(rows[name], found[rows[name].key]) for name in names])


def _theirs(source: pathlib.Path, config: Config) -> Stored:
    """The files of a folder of Hugging Face's, their bytes, their tensors."""
    found, layout = huggingface.find(source, config), huggingface.layout(source)
    total = sum(tensor.nbytes for tensor in found.values())
    return layout, total, (found[name].read() for name in _names(layout))


def _names(layout: huggingface.Layout) -> list[str]:
    """The tensors on disk, in the order in which they are written."""
    return [table.on_disk(n) for raw in layout.headers.values() for n in huggingface.order(raw)]


def _stream(
    source: pathlib.Path, wanted: list[tuple[table.Entry, jax.ShapeDtypeStruct]]
) -> Iterator[np.ndarray]:
    """Reads tensors in this order, as many at once as `orbax.GROUP_BYTES` hold."""
    place = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    while wanted:
        size, count = 0, 0
        for _, leaf in wanted:
            size += leaf.size * leaf.dtype.itemsize
            if count and size > orbax.GROUP_BYTES:
                break
            count += 1
        group, wanted = wanted[:count], wanted[count:]
        leaves = {
            row.key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
            for row, leaf in group
        }
        arrays = orbax.read(source, leaves)
        for row, leaf in group:
            array = row.to_theirs(bits(np.asarray(arrays[row.key])))
            yield _in_order(array).view(leaf.dtype)
        del arrays, array  # before the next ones are read


def bits(array: np.ndarray) -> np.ndarray:
    """The same bits as integers, which numpy rearranges faster than bfloat16."""
    return array.view(np.dtype(f"u{array.dtype.itemsize}"))


def _copied(view: np.ndarray, stored: np.dtype, dtype: Any) -> np.ndarray:
    """Bits of a tensor as what they are, in memory's order; None: in the type that they have."""
    return _in_order(view).view(stored) if dtype is None else contiguous(view.view(stored), dtype)


def _in_order(array: np.ndarray) -> np.ndarray:
    return array if array.flags.c_contiguous else contiguous(array, array.dtype)


def _itemsize(dtype: Any, stored: np.dtype) -> int:
    return (stored if dtype is None else np.dtype(dtype)).itemsize
