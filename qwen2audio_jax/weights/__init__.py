"""Checkpoints in and out: Hugging Face's folders and ours."""

import os
import pathlib
from collections.abc import Callable
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from flax import nnx

from qwen2audio_jax.config import Config
from qwen2audio_jax.model import Qwen2Audio
from qwen2audio_jax.weights import huggingface, settings, table
from qwen2audio_jax.weights.source import locate

# How the parameter with this key is read: all of it, or as a view of which a part is copied.
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
    """Makes a model of what `read` gives, each parameter straight where it belongs."""
    make = lambda: Qwen2Audio(config, scan_layers=scan_layers, dtype=dtype, rngs=nnx.Rngs(0))
    graph, state = nnx.split(nnx.eval_shape(make))
    place = _placement(state, mesh)
    total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    with bar(total, "loading", progress) as shown:

        def put(path: tuple, leaf: Any) -> jax.Array:
            keys = keys_of(path, leaf, config)
            array = jax.make_array_from_callback(
                leaf.shape, place(path), lambda index: _part(keys, read, index, leaf)
            )
            shown.update(array.nbytes)
            return array.block_until_ready()

        state = jax.tree_util.tree_map_with_path(put, state)
    return nnx.merge(graph, state)
