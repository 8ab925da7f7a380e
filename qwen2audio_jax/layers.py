"""Norms, rotary positions, the gated MLP, attention, and how blocks are stacked.

Nothing here knows which tower it stands in.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

# On CPUs XLA's attention over all queries at once is several times slower than over blocks of
# them: the scores of a block stay in the cache.
QUERY_BLOCK = 128


class RMSNorm(nnx.Module):
    """Scales to unit root mean square, in float32; the weight is applied in the input's dtype."""

    def __init__(self, width: int, eps: float, *, dtype: Any = jnp.float32):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width, dtype))

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return wide.astype(x.dtype) * self.scale[...]


class GatedMLP(nnx.Module):
    """SwiGLU: SiLU(x gate) * (x up), projected down."""

    def __init__(self, width: int, hidden: int, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        make = lambda i, o: nnx.Linear(i, o, use_bias=False, param_dtype=dtype, rngs=rngs)
        self.gate = make(width, hidden)
        self.up = make(width, hidden)
        self.down = make(hidden, width)

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


def rotate(
    x: Float[Array, "B L N H"], positions: Int[Array, "B L"], theta: float
) -> Float[Array, "B L N H"]:
    """Rotary position embedding, halves rotated against each other; angles in float32."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def attend(
    q: Float[Array, "B L N H"],
    k: Float[Array, "B slots K H"],
    v: Float[Array, "B slots K H"],
    *,
    q_segments: Int[Array, "B L"],
    k_segments: Int[Array, "B slots"],
    offset: Int[Array, ""] | int | None = None,
) -> Float[Array, "B L N H"]:
    """Softmax attention, in float32, scaled by 1/sqrt(H).

    A query sees the keys of its own segment: padding has a segment of its own, and so has each
    sample of a packed row.

    Args:
      q_segments: the segment of every query.
      k_segments: the segment of every key.
      offset: causal attention, the first query standing in this key slot; None: no order.

    Returns:
      The values seen by each query. A query that sees no key gets a finite, meaningless mean.
    """
    heads = lambda q, q_segments, offset: _attend_block(q, k, v, q_segments, k_segments, offset)
    length = q.shape[1]
    if jax.default_backend() != "cpu" or length <= QUERY_BLOCK:
        return heads(q, q_segments, offset)
    blocks = -(-length // QUERY_BLOCK)
    size = -(-length // blocks)  # even blocks: little is padded
    pad = blocks * size - length
    split = lambda x: jnp.moveaxis(
        jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2)).reshape(
            x.shape[0], blocks, size, *x.shape[2:]
        ),
        1,
        0,
    )
    starts = jnp.arange(blocks) * size
    out = jax.lax.map(
        lambda block: heads(block[0], block[1], None if offset is None else offset + block[2]),
        (split(q), split(q_segments), starts),
    )
    return jnp.moveaxis(out, 0, 1).reshape(q.shape[0], -1, *q.shape[2:])[:, :length]


def _attend_block(q, k, v, q_segments, k_segments, offset):
    B, L, N, H = q.shape
    K = k.shape[2]
    mask = q_segments[:, :, None] == k_segments[:, None, :]
    if offset is not None:
        mask &= jnp.arange(k.shape[1]) <= offset + jnp.arange(L)[:, None]
    q = q.reshape(B, L, K, N // K, H)
    scores = jnp.einsum("BLKGH,BSKH->BKGLS", q, k, preferred_element_type=jnp.float32) * H**-0.5
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("BKGLS,BSKH->BLKGH", weights, v).reshape(B, L, N, H)


def stack(
    make: Callable[[nnx.Rngs], nnx.Module], layers: int, *, scan: bool, rngs: nnx.Rngs
) -> nnx.Module:
    """Makes `layers` blocks: scanned, one block whose arrays lead with a layer axis; else a list.

    A scanned stack compiles in the time of one block, so training holds it. A list reads every
    weight in place, which decodes several times faster on a CPU, so inference holds that.
    """
    if scan:
        return nnx.vmap(make)(rngs.split(layers))
    return nnx.List([make(rngs) for _ in range(layers)])


def run(
    blocks: nnx.Module,
    step: Callable[[nnx.Module, Any, Any], tuple[Any, Any]],
    x: Any,
    per_block: Any,
) -> tuple[Any, Any]:
    """Threads `x` through the blocks: `x, out = step(block, x, per_block[i])` for each.

    Args:
      per_block: what each block gets of its own: a list for a list of blocks, arrays with a
        leading layer axis for a scanned stack; None where there is nothing.

    Returns:
      The last `x`, and every block's `out` in the form of `per_block`.
    """
    if isinstance(blocks, nnx.List):
        outs = []
        for i, block in enumerate(blocks):
            x, out = step(block, x, None if per_block is None else per_block[i])
            outs.append(out)
        return x, outs
    return jax.lax.scan(lambda x, xs: step(xs[0], x, xs[1]), x, (blocks, per_block))
