"""Checkpoints in and out: Hugging Face's folders and ours."""

import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from flax import nnx

from qwen2audio_jax import sharding
from qwen2audio_jax.config import Config
from qwen2audio_jax.model import Qwen2Audio
from qwen2audio_jax.weights import huggingface, settings, table
from qwen2audio_jax.weights.source import locate

# gives the parameter of a key of `table`, as a view of which parts are copied
Read = Callable[[str], np.ndarray]


def load(
    source: str | os.PathLike,
    *,
    dtype: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    scan_layers: bool = False,
    progress: bool = False,
) -> Qwen2Audio:
    """Reads a model, one tensor at a time.

    Args: as in `Qwen2Audio.from_pretrained`.

    Raises:
      ValueError: there is no checkpoint, or it is not whole; the message names what is wrong.
    """
    folder = locate(os.fspath(source), huggingface.PATTERNS)
    config = settings.read(folder)
    tensors = huggingface.find(folder, config)
    names = {entry.key: entry for entry in table.entries(config)}
    read = lambda key: names[key].to_ours(tensors[names[key].name].read())
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return fill(config, read, dtype=dtype, mesh=mesh, scan_layers=scan_layers, progress=progress)


def fill(
    config: Config,
    read: Read,
    *,
    dtype: Any,
    mesh: jax.sharding.Mesh | None,
    scan_layers: bool,
    progress: bool,
) -> Qwen2Audio:
    """Makes a model of what `read` gives, each part of a parameter straight where it belongs."""
    make = lambda: Qwen2Audio(config, scan_layers=scan_layers, dtype=dtype, rngs=nnx.Rngs(0))
    graph, state = nnx.split(nnx.eval_shape(make))
    if mesh is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        places = jax.tree.map(lambda _: device, state)
    else:
        places = sharding.shardings(state, mesh)

    def put(path: tuple, leaf: jax.ShapeDtypeStruct, place: jax.sharding.Sharding) -> jax.Array:
        part = lambda index: _part(read, *table.split(path), leaf, index)
        array = jax.make_array_from_callback(leaf.shape, place, part).block_until_ready()
        shown.update(array.nbytes)
        return array

    with bar("loading", sum(_nbytes(x) for x in jax.tree.leaves(state)), progress) as shown:
        state = jax.tree_util.tree_map_with_path(put, state, places)
    return nnx.merge(graph, state)


def _part(
    read: Read, path: str, layer: int | None, leaf: jax.ShapeDtypeStruct, index: tuple[slice, ...]
) -> np.ndarray:
    """Copies what stands at `index` of a parameter, or of the same one of every layer, stacked."""
    if layer is not None or "blocks" not in path:
        return np.array(read(table.key(path, layer))[index], leaf.dtype)
    layers = range(leaf.shape[0])[index[0]]
    parts = (read(table.key(path, i))[index[1:]] for i in layers)
    shape = tuple(len(range(n)[s]) for n, s in zip(leaf.shape, index, strict=True))
    stacked = np.empty(shape, leaf.dtype)
    for i, part in enumerate(parts):
        stacked[i] = part
    return stacked


def save(model: Qwen2Audio, folder: str | os.PathLike, *, progress: bool = False) -> None:
    """Writes config and weights in Hugging Face's format; other files in `folder` stay.

    Raises:
      ValueError: the parameters' dtype is not one that the format has.
    """
    folder = pathlib.Path(folder)
    arrays = {table.split(path): x for path, x in _leaves(model)}
    rows = {entry.name: entry for entry in table.entries(model.config)}
    if model.config.decoder.tied:
        # transformers 5 never ties this architecture's head, so it has to be there
        rows[table.HEAD] = rows[table.EMBEDDING]

    def read(name: str) -> np.ndarray:
        row = rows[name]
        whole = arrays.get((row.path, row.layer))
        return row.to_theirs(
            np.asarray(arrays[row.path, None][row.layer] if whole is None else whole)
        )

    dtype = np.dtype(model.dtype)
    if dtype not in huggingface.NAMES:
        raise ValueError(
            f"wanted parameters of {', '.join(map(str, huggingface.NAMES))}, got {dtype}"
        )
    layout = huggingface.plan((name, dtype, row.their_shape) for name, row in rows.items())
    folder.mkdir(parents=True, exist_ok=True)
    settings.write(model.config, folder, dtype.name)
    total = sum(row.count for row in rows.values()) * dtype.itemsize
    with bar("saving", total, progress) as shown:
        huggingface.write(folder, layout, read, shown.update)


def bar(what: str, total: int, progress: bool) -> tqdm.tqdm:
    """A progress bar that counts bytes."""
    return tqdm.tqdm(
        desc=what, total=total, unit="B", unit_scale=True, disable=not progress, mininterval=0.5
    )


def _leaves(model: Qwen2Audio) -> list[tuple[tuple, jax.Array]]:
    return jax.tree_util.tree_flatten_with_path(nnx.state(model, nnx.Param))[0]


def _nbytes(leaf: jax.ShapeDtypeStruct) -> int:
    return leaf.size * leaf.dtype.itemsize
