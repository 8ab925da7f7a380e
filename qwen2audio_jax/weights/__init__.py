"""Checkpoints in and out: Hugging Face's folders and ours."""

import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qwen2audio_jax import sharding, spread
from qwen2audio_jax.config import Config
from qwen2audio_jax.model import Qwen2Audio
from qwen2audio_jax.progress import Progress
from qwen2audio_jax.weights import huggingface, settings, table
from qwen2audio_jax.weights.contiguous import contiguous
from qwen2audio_jax.weights.folder import CHECKPOINT, is_ours, staged
from qwen2audio_jax.weights.source import locate

_SUPPORTED = " or ".join(sorted(map(str, huggingface.NAMES)))

# Reads parameters by their keys in `table`, all of one shape: each in this dtype, to this sharding.
Read = Callable[[list[str], tuple[int, ...], Any, jax.sharding.Sharding], list[jax.Array]]


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
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    dtype = _supported(dtype)
    folder = locate(os.fspath(source), huggingface.PATTERNS)
    config = settings.read(folder)
    if mesh is not None:
        sharding.check(config, mesh)
    read = _ours(folder, config) if is_ours(folder) else _theirs(folder, config)
    return fill(config, read, dtype=dtype, mesh=mesh, scan_layers=scan_layers, progress=progress)


def _supported(dtype: Any) -> np.dtype:
    try:
        if (known := jnp.dtype(dtype)) in huggingface.NAMES:
            return known
    except TypeError:  # numpy knows no such name
        pass
    raise ValueError(f"wanted dtype {_SUPPORTED}, got {dtype!r}")


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
    leaves, tree = jax.tree_util.tree_flatten_with_path(state)
    places = [table.split(path) for path, _ in leaves]
    layers: dict[str, list[int | None]] = {}
    for row in table.entries(config):
        layers.setdefault(row.path, []).append(row.layer)
    shapes = {row.path: row.our_shape for row in table.entries(config)}
    made: dict[tuple[str, int | None], jax.Array] = {}
    with bar("loading", sum(_nbytes(leaf) for _, leaf in leaves), progress) as shown:
        for path, numbers in layers.items():
            place = _place(path, shapes[path], mesh)
            keys = [table.key(path, i) for i in numbers]
            arrays = read(keys, shapes[path], dtype, place)
            shown.update(sum(x.nbytes for x in arrays))
            if scan_layers and numbers[0] is not None:
                made[path, None] = _stack(arrays, place)
            else:
                made |= zip(((path, i) for i in numbers), arrays, strict=True)
    return nnx.merge(graph, jax.tree.unflatten(tree, [made[place] for place in places]))


def _place(path: str, shape: tuple[int, ...], mesh: jax.sharding.Mesh | None):
    if mesh is None:
        return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.sharding.NamedSharding(mesh, sharding.spec(path, shape, mesh))


def _stack(arrays: list[jax.Array], place: jax.sharding.Sharding) -> jax.Array:
    """Puts the layers' parameters behind a leading layer axis, which is never split."""
    if isinstance(place, jax.sharding.NamedSharding):
        spec = jax.sharding.PartitionSpec(None, *place.spec)
        place = jax.sharding.NamedSharding(place.mesh, spec)
    stacked = jax.jit(lambda *layers: jnp.stack(layers), out_shardings=place)(*arrays)
    return stacked.block_until_ready()


def _theirs(folder: pathlib.Path, config: Config) -> Read:
    tensors = huggingface.find(folder, config)
    rows = {row.key: row for row in table.entries(config)}

    def one(key: str, shape: tuple[int, ...], dtype: Any, place: Any) -> jax.Array:
        view = rows[key].to_ours(tensors[rows[key].name].read())
        # a copy: jax would keep the file's own pages, which another process may change
        part = lambda index: contiguous(view[index], dtype)
        return jax.make_array_from_callback(shape, place, part).block_until_ready()

    return lambda keys, *how: [one(key, *how) for key in keys]


def _ours(folder: pathlib.Path, config: Config) -> Read:
    from qwen2audio_jax.weights import orbax  # here, because it takes seconds to import

    orbax.find(folder, config)

    def read(keys: list[str], shape: tuple[int, ...], dtype: Any, place: Any) -> list[jax.Array]:
        leaf = jax.ShapeDtypeStruct(shape, dtype, sharding=place)
        arrays = orbax.read(folder, dict.fromkeys(keys, leaf))
        return [arrays[key] for key in keys]

    return read


def save(model: Qwen2Audio, folder: str | os.PathLike, *, progress: bool = False) -> None:
    """Writes config and weights in Hugging Face's format, in place of those that were there.

    The old ones stay until the new ones are complete; other files in `folder` stay. On several
    hosts all have to call it: the first one writes, and a tensor at a time is gathered for it.

    Raises:
      ValueError: a parameter's dtype is not one that the format has, or `folder` is one of ours.
    """
    folder = pathlib.Path(folder)
    if is_ours(folder):
        raise ValueError(
            f"{folder} is a folder of ours, whose {CHECKPOINT}/ would be read in place of what is "
            "saved: name another"
        )
    arrays = {table.split(path): x for path, x in _leaves(model)}
    rows = {entry.name: entry for entry in table.entries(model.config)}
    if model.config.decoder.tied:
        # transformers 5 never ties this architecture's head, so it has to be there
        rows[table.HEAD] = rows[table.EMBEDDING]

    def held(row: table.Entry) -> jax.Array:
        """The parameter, or the stack that it is in."""
        return arrays.get((row.path, row.layer), arrays.get((row.path, None)))

    def read(name: str) -> np.ndarray:
        row, array = rows[name], held(rows[name])
        alone = (row.path, row.layer) in arrays
        return row.to_theirs(spread.whole(array if alone else array[row.layer]))

    tensors = [(name, np.dtype(held(row).dtype), row.their_shape) for name, row in rows.items()]
    for name, dtype, _ in tensors:
        if dtype not in huggingface.NAMES:
            raise ValueError(f"wanted parameters of {_SUPPORTED}, got {name} of {dtype}")
    layout = huggingface.plan(tensors)
    if jax.process_index():
        for header in layout.headers.values():
            for name in huggingface.order(header):
                read(table.on_disk(name))
        return
    total = sum(rows[name].count * dtype.itemsize for name, dtype, _ in tensors)
    with staged(folder, huggingface.FILES.fullmatch) as partial:
        settings.write(model.config, partial, np.dtype(model.dtype).name)
        with bar("saving", total, progress) as shown:
            huggingface.write(partial, layout, read, shown.update)


def bar(what: str, total: int, progress: bool) -> Progress:
    """Counts bytes."""
    return Progress(total, desc=what, unit="B", scale=True, shown=progress)


def _leaves(model: Qwen2Audio) -> list[tuple[tuple, jax.Array]]:
    return jax.tree_util.tree_flatten_with_path(nnx.state(model, nnx.Param))[0]


def _nbytes(leaf: jax.ShapeDtypeStruct) -> int:
    return leaf.size * leaf.dtype.itemsize
