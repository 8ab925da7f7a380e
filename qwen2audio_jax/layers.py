"""Norms, rotary positions, the gated MLP, attention, and how blocks are stacked.

Nothing here knows which tower it stands in.
"""

import functools
from collections.abc import Callable
from typing import Any

import einops
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from qwen2audio_jax import flash, remat, spread

# On CPUs XLA computes attention three times faster head by head, some hundred queries at a time,
# once all scores together outgrow the cache.
CPU_SCORES = 1024**2
CPU_QUERIES = 512

_NEVER = jnp.finfo(jnp.float32).min


def one_cpu() -> bool:
    """Whether a program will run on a single CPU, where XLA does best with plain matrices."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = jax.device_count() if mesh.empty else mesh.size
    return spread.platform() == "cpu" and devices == 1


class Linear(nnx.LinearGeneral):
    """An affine map that rounds once: product and bias are added in float32, as PyTorch does."""

    def __init__(self, inputs: Any, outputs: Any, *, dtype: Any = jnp.float32, **how: Any):
        super().__init__(inputs, outputs, param_dtype=dtype, dot_general=_dot_general, **how)

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*out"]:
        batch = x.shape[: x.ndim - len(self.in_features)]
        if one_cpu():
            x = x.reshape(-1, *self.in_features)
        y = super().__call__(x).astype(jnp.result_type(x, self.kernel))
        return y.reshape(*batch, *self.out_features)


@jax.custom_vjp
def look_up(table: Float[Array, "V D"], ids: Int[Array, "*ids"]) -> Float[Array, "*ids D"]:
    """Rows of a table, whose gradients are added up in float32, as PyTorch does.

    By itself jax would add them in the table's dtype: in bfloat16 a word that is met some thousand
    times in a batch would lose most of its gradient.
    """
    return jnp.take(table, ids, axis=0)


def _look_up_forward(table, ids):
    return look_up(table, ids), (table, ids)


def _look_up_backward(saved, gradients):
    table, ids = saved
    total = jnp.zeros(table.shape, jnp.float32).at[ids].add(gradients.astype(jnp.float32))
    return total.astype(table.dtype), None


look_up.defvjp(_look_up_forward, _look_up_backward)


def _dot_general(x, kernel, dimensions, **_):
    """As flax calls it: precision and sharding are not said here."""
    return _product(x, kernel, dimensions)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x, kernel, dimensions):
    """A product in float32 of factors that may be shorter.

    By itself jax would multiply in float32 on the way back, as what comes in there is: on GPUs half
    as fast, and nothing is gained, for it was rounded just before.
    """
    return jax.lax.dot_general(x, kernel, dimensions, preferred_element_type=jnp.float32)


def _product_forward(x, kernel, dimensions):
    return _product(x, kernel, dimensions), (x, kernel)


def _product_backward(dimensions, factors, cotangent):
    _, back = jax.vjp(lambda x, kernel: jax.lax.dot_general(x, kernel, dimensions), *factors)
    return back(cotangent.astype(jnp.result_type(*factors)))


_product.defvjp(_product_forward, _product_backward)


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
        make = lambda i, o: Linear(i, o, use_bias=False, dtype=dtype, rngs=rngs)
        self.gate = make(width, hidden)
        self.up = make(width, hidden)
        self.down = make(hidden, width)

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        gate = remat.name(spread.constrain(self.gate(x), "B L F"), "gate")
        up = remat.name(spread.constrain(self.up(x), "B L F"), "up")
        hidden = jax.nn.silu(gate.astype(jnp.float32)).astype(x.dtype) * up
        return remat.name(self.down(hidden), "down")


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
    if flash.serves(q, k, offset):
        return flash.attend(
            q, k, v, q_segments=q_segments, k_segments=k_segments, causal=offset is not None
        )
    mask = _visible(q_segments, k_segments, offset)
    rows, queries = ("B", "L") if offset is not None else ("C", "positions")  # as towers split them
    shape = q.shape[:3]
    q = einops.rearrange(q, "B L (K G) H -> B L K G H", K=k.shape[2])
    scores, on_cpu = q[..., 0].size * k.shape[1], spread.platform() == "cpu"
    if on_cpu and spread.devices() == 1 and scores > CPU_SCORES:
        out = _attend_by_head(q, k, v, mask)
    elif not on_cpu and scores > flash.SCORES * spread.parts(f"{rows} {queries} N", shape):
        # whose blocks of queries each device goes through one by one
        split = spread.parts(f"{rows} N", shape[::2])
        out = flash.by_queries(_attend, q, k, v, mask, split=split)
    else:
        out = _attend(q, k, v, mask)
    return einops.rearrange(out, "B L K G H -> B L (K G) H")


def attention_weights(
    q: Float[Array, "B L N H"],
    k: Float[Array, "B slots K H"],
    *,
    q_segments: Int[Array, "B L"],
    k_segments: Int[Array, "B slots"],
    offset: Int[Array, ""] | int | None = None,
) -> Float[Array, "B N L slots"]:
    """How much of each key `attend` gives to each query, to be looked at."""
    q = einops.rearrange(q, "B L (K G) H -> B L K G H", K=k.shape[2])
    weights = _weights(q, k, _visible(q_segments, k_segments, offset))
    return einops.rearrange(weights, "B K G L S -> B (K G) L S")


def _visible(q_segments, k_segments, offset):
    mask = q_segments[:, :, None] == k_segments[:, None, :]
    if offset is not None:
        mask &= jnp.arange(k_segments.shape[1]) <= offset + jnp.arange(q_segments.shape[1])[:, None]
    return mask


def _attend(q, k, v, mask):
    return jnp.einsum("BKGLS,BSKH->BLKGH", _weights(q, k, mask).astype(v.dtype), v)


def _weights(q, k, mask):
    scores = jnp.einsum("BLKGH,BSKH->BKGLS", q, k, preferred_element_type=jnp.float32)
    return jax.nn.softmax(
        jnp.where(mask[:, None, None], scores * q.shape[-1] ** -0.5, _NEVER), axis=-1
    )


@jax.custom_vjp
def _attend_by_head(q, k, v, mask):
    """As `_attend`, a head and a block of queries at a time, forward and backward."""
    return _forward_by_head(q, k, v, mask)[0]


def _forward_by_head(q, k, v, mask):
    heads = k.shape[2]
    qs, masks = _in_blocks(q * q.shape[-1] ** -0.5), _masks_in_blocks(mask)
    # keys already transposed, so that every product is of two plain matrices
    ks = einops.rearrange(k, "B S K H -> (B K) H S")
    vs = einops.rearrange(v, "B S K H -> (B K) S H")
    group, blocks = qs.shape[1], masks.shape[1]

    def one(i):
        head, block = i // group, i % group
        scores = jnp.dot(qs[head, block], ks[head], preferred_element_type=jnp.float32)
        scores = jnp.where(masks[head // heads, block % blocks], scores, _NEVER)
        top = scores.max(axis=-1)
        weights = jnp.exp(scores - top[:, None])
        seen = jnp.dot(weights.astype(v.dtype), vs[head], preferred_element_type=jnp.float32)
        total = weights.sum(axis=-1)
        # dividing H values rather than all the keys' weights spares a pass over them
        return (seen / total[:, None]).astype(v.dtype), top, total

    out, top, total = jax.lax.map(one, jnp.arange(len(qs) * group))
    out = _out_of_blocks(out.reshape(qs.shape), q.shape)
    return out, (q, k, v, mask, out, top, total)


def _backward_by_head(saved, cotangent):
    """Makes each block's weights again: keeping all would cost more time than that, and memory."""
    q, k, v, mask, out, top, total = saved
    heads, scale = k.shape[2], q.shape[-1] ** -0.5
    qs, masks = _in_blocks(q * scale), _masks_in_blocks(mask)
    top, total = (x.reshape(qs.shape[:-1]) for x in (top, total))
    ks = einops.rearrange(k, "B S K H -> (B K) S H")
    vs = einops.rearrange(v, "B S K H -> (B K) H S")
    gradients = _in_blocks(cotangent.astype(jnp.float32)) / total[..., None]
    means = (gradients * _in_blocks(out)).sum(axis=-1)
    gradients = gradients.astype(v.dtype)
    product = functools.partial(jnp.dot, preferred_element_type=jnp.float32)

    def one(head):
        key = ks[head].T

        def block(sums, i):
            query, gradient = qs[head, i], gradients[head, i]
            weights = jnp.exp(product(query, key) - top[head, i][:, None])
            weights = jnp.where(masks[head // heads, i % masks.shape[1]], weights, 0)
            back = weights * (product(gradient, vs[head]) - means[head, i][:, None])
            back, weights = back.astype(q.dtype), weights.astype(v.dtype)
            # [H S], so that of the two factors the small one is transposed
            dk, dv = sums[0] + product(query.T, back), sums[1] + product(gradient.T, weights)
            return (dk, dv), product(back, ks[head]).astype(q.dtype)

        zeros = jnp.zeros(vs.shape[1:], jnp.float32)
        sums, dq = jax.lax.scan(block, (zeros, zeros), jnp.arange(qs.shape[1]))
        return dq, *sums

    dq, dk, dv = jax.lax.map(one, jnp.arange(len(qs)))
    back = lambda x: einops.rearrange(x, "(B K) H S -> B S K H", K=heads)
    return (
        _out_of_blocks(dq, q.shape) * scale,
        back(dk).astype(k.dtype),
        back(dv).astype(v.dtype),
        None,
    )


_attend_by_head.defvjp(_forward_by_head, _backward_by_head)


def _block_size(length):
    return -(-length // -(-length // CPU_QUERIES))  # even blocks: little is padded


def _in_blocks(x):
    size = _block_size(x.shape[1])
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), (0, 0), (0, 0), (0, 0)))
    # heads in front
    return einops.rearrange(x, "B (block L) K G H -> (B K) (G block) L H", L=size)


def _masks_in_blocks(mask):
    size = _block_size(mask.shape[1])
    mask = jnp.pad(mask, ((0, 0), (0, -mask.shape[1] % size), (0, 0)))
    return einops.rearrange(mask, "B (block L) S -> B block L S", L=size)


def _out_of_blocks(x, shape):
    _, length, heads, group, _ = shape
    x = einops.rearrange(x, "(B K) (G block) L H -> B (block L) K G H", K=heads, G=group)
    return x[:, :length]


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
    *,
    policy: str = "none",
) -> tuple[Any, Any]:
    """Threads `x` through the blocks: `x, out = step(block, x, per_block[i])` for each.

    Args:
      per_block: what each block gets of its own: a list for a list of blocks, arrays with a
        leading layer axis for a scanned stack; None where there is nothing.
      policy: what a block keeps for its backward pass, by its name in `remat.POLICIES`.

    Returns:
      The last `x`, and every block's `out` in the form of `per_block`.
    """
    listed = isinstance(blocks, nnx.List)
    step = remat.wrap(step, policy, scanned=not listed)
    if listed:
        outs = []
        for i, block in enumerate(blocks):
            x, out = step(block, x, None if per_block is None else per_block[i])
            outs.append(out)
        return x, outs
    return jax.lax.scan(lambda x, xs: step(xs[0], x, xs[1]), x, (blocks, per_block))
