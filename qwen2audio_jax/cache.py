"""Keys and values already computed, so that a token attends to its past at the cost of one."""

from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from qwen2audio_jax.config import DecoderConfig


@flax.struct.dataclass
class Cache:
    """The past of a batch, in a fixed number of slots: an argument and a result, never state.

    Attributes:
      layers: per block its keys and values, each [B slots K H]: a list of pairs for a list of
        blocks, one pair with a leading layer axis for a scanned stack.
      segments: the segment of what each slot holds; 0 where that is padding or nothing yet.
      length: slots in use; the next token goes into this one.
    """

    layers: Any
    segments: Int[Array, "B slots"]
    length: Int[Array, ""]

    @property
    def slots(self) -> int:
        return self.segments.shape[1]


def empty(c: DecoderConfig, batch: int, slots: int, *, scan: bool, dtype: Any) -> Cache:
    """A cache with room for `slots` tokens a row."""
    shape = (batch, slots, c.kv_heads, c.head_width)
    pair = lambda *lead: (jnp.zeros((*lead, *shape), dtype), jnp.zeros((*lead, *shape), dtype))
    return Cache(
        layers=pair(c.layers) if scan else [pair() for _ in range(c.layers)],
        segments=jnp.zeros((batch, slots), jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )


@partial(jax.jit, static_argnames="n")
def repeat(cache: Cache, n: int) -> Cache:
    """Gives every row `n` copies, one after the other."""
    axis = 0 if isinstance(cache.layers, list) else 1
    return cache.replace(
        layers=jax.tree.map(lambda x: jnp.repeat(x, n, axis=axis), cache.layers),
        segments=jnp.repeat(cache.segments, n, axis=0),
    )
