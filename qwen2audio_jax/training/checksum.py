"""Arrays -> numbers that differ where a bit does, however the arrays are split over devices."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen2audio_jax.training.optimizer import name_of


@jax.jit
def sums(arrays: dict[str, Any]) -> dict[str, Any]:
    """A number for each array; on several hosts all have to ask for them."""
    return {path: _sum(x) for path, x in arrays.items()}


def of(tree: Any) -> str:
    """Eight letters for a whole tree; likewise."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    # runs that began when names had no "value" in them are known by those
    name = lambda path: ".".join(word for word in name_of(path).split(".") if word != "value")
    found = jax.device_get(sums({name(path): leaf for path, leaf in leaves}))
    return f"{zlib.crc32(repr(sorted((k, int(x)) for k, x in found.items())).encode()):08x}"


def _sum(x: Any) -> Any:
    """Changes with every bit and with its place, however the array is split over devices."""
    if x.dtype == jnp.bool:
        x = x.astype(jnp.uint8)
    word = jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")
    bits = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
    place, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        iota = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        place = place + iota * np.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    # MurmurHash3's finalizer: regular weights would cancel out over regular arrays
    for factor, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
        place = (place ^ (place >> shift)) * np.uint32(factor)
    return (bits * (place ^ (place >> 16) | 1)).sum(dtype=jnp.uint32)
