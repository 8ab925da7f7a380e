"""Keys and values already computed, so that a token attends to its past at the cost of one."""

from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from qwen2audio_jax import spread
from qwen2audio_jax.config import DecoderConfig


@flax.struct.dataclass
class Cache:
    """The past of a batch, in a fixed number of slots: an argument and a result, never state.

    Attributes:
      layers: per block its keys and values, each [B slots K H]: a list of pairs for a list of
        blocks, one pair with a leading layer axis for a scanned stack.
      segments: [B slots], the segment of what each slot holds; 0 where that is padding or nothing
        yet.
      length: slots in use; the next token goes into this one.
    """

    layers: Any
    segments: Any  # arrays, or what stands for them: shapes, shardings
    length: Any

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


@partial(jax.jit, static_argnames=("n", "rows", "total"))
def repeat(cache: Cache, n: int, *, rows: int | None = None, total: int | None = None) -> Cache:
    """Gives each of the first `rows`, or of all, `n` copies, one after the other.

    Args:
      total: rows of the result; what is behind the copies is empty. None: the copies alone.
    """

    def copied(x, batch):
        x = jnp.repeat(jax.lax.slice_in_dim(x, 0, rows, axis=batch), n, axis=batch)
        more = 0 if total is None else total - x.shape[batch]
        x = jnp.pad(x, [(0, more if axis == batch else 0) for axis in range(x.ndim)])
        letters = "B slots" if x.ndim == 2 else "layer " * batch + "B slots K H"
        return spread.constrain(x, letters)

    return _map(cache, copied)


def reorder(cache: Cache, parents: Int[Array, "B n"]) -> Cache:
    """Makes of each prompt's `n` rows others of the same prompt, so that no device needs another's.

    Args:
      parents: which of its prompt's rows each row is to be, from 0.
    """
    B, n = parents.shape

    def reordered(x, batch):
        take = jax.vmap(lambda x, index: jnp.take(x, index, axis=batch), (batch, 0), batch)
        each = x.reshape(*x.shape[:batch], B, n, *x.shape[batch + 1 :])
        return take(each, parents).reshape(x.shape)

    return _map(cache, reordered)


@partial(jax.jit, static_argnames="slots")
def grow(cache: Cache, slots: int) -> Cache:
    """Makes room for more tokens."""
    more = slots - cache.slots
    pad = lambda x, batch: jnp.pad(
        x, [(0, more if axis == batch + 1 else 0) for axis in range(x.ndim)]
    )
    return _map(cache, pad)


def rewind(cache: Cache, length: Int[Array, ""]) -> Cache:
    """Forgets what lies beyond the first `length` slots."""
    kept = jnp.arange(cache.slots) < length
    return cache.replace(segments=jnp.where(kept, cache.segments, 0), length=length)


def _map(cache, f):
    """Applies `f(array, batch_axis)` to all that has a row axis; the slots' axis is the next."""
    batch = 0 if isinstance(cache.layers, list) else 1
    return cache.replace(
        layers=jax.tree.map(lambda x: f(x, batch), cache.layers), segments=f(cache.segments, 0)
    )
