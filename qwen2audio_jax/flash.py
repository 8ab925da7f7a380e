"""Attention that never holds its scores: splash attention on TPUs, cuDNN's on GPUs.

Source: FlashAttention (arXiv:2205.14135); jax.experimental.pallas.ops.tpu.splash_attention;
jax.nn.dot_product_attention.
"""

import math
import re
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from qwen2audio_jax import spread

LANES = 128  # what blocks are multiples of
BLOCK = 512  # the largest
SHORTEST = 256  # queries from which it pays
SCORES = 2**27  # of plain attention, that may exist on a device at the same time

GPUS = ("gpu", "cuda")  # as jax calls them
CUDNN = "cudnn"
HALVES = (jnp.bfloat16, jnp.float16)
WIDEST = 128  # of its heads

Attention = Literal["autoselected", "dot_product", "flash"]

# How programs that are traced within `using` attend.
_CHOICE = jax.make_user_context("autoselected")


def using(attention: Attention) -> Any:
    """A context: `dot_product`, `flash`, or `autoselected`, which is flash where it pays.

    Where `flash` cannot serve, because keys are cached, it is `dot_product` too.
    """
    return _CHOICE(attention)


def serves(q: Float[Array, "B L N H"], k: Float[Array, "B slots K H"], offset: Any) -> bool:
    """Whether `attend` is to be taken for these shapes, on what is compiled for.

    Raises:
      ValueError: `flash` is asked for on a device that has none, or in arithmetic or on a mesh for
        which it has none.
    """
    choice, on = _CHOICE.value, spread.platform()
    if choice == "flash" and on not in ("tpu", "cpu", *GPUS):
        raise ValueError(
            f"attention=flash is for TPUs and GPUs, got {on}; wanted dot_product there"
        )
    if choice == "flash" and on in GPUS:
        if q.dtype not in HALVES:
            raise ValueError(f"attention=flash on GPUs wants bfloat16, got {q.dtype}")
        if not _has_width(q):
            raise ValueError(
                f"attention=flash on GPUs wants heads of eights, up to {WIDEST} wide, "
                f"got {q.shape[-1]}"
            )
    ordered = offset is None or (isinstance(offset, int) and offset == 0)
    fits = ordered and q.shape[1] == k.shape[1]
    if choice == "autoselected":
        # without a mesh nobody could tell the kernel how arrays are split over several devices
        alone = jax.device_count() == 1 or not jax.sharding.get_abstract_mesh().empty
        runs = on == "tpu" or (on in GPUS and _cudnn_has(q))
        return fits and alone and runs and q.shape[1] >= SHORTEST
    return fits and choice == "flash"


def _cudnn_has(q: Float[Array, "B L N H"]) -> bool:
    """Whether cuDNN's kernel is there for such heads, and on the GPU that is here."""
    mesh = jax.sharding.get_abstract_mesh()
    whole = mesh.empty or mesh.shape.get("context", 1) == 1
    # AMD's are told by a name in the number's place
    capability = re.match(r"\d+", getattr(jax.local_devices()[0], "compute_capability", ""))
    ampere = capability is not None and int(capability[0]) >= 8
    return ampere and whole and q.dtype in HALVES and _has_width(q)


def _has_width(q: Float[Array, "B L N H"]) -> bool:
    return q.shape[-1] % 8 == 0 and q.shape[-1] <= WIDEST


def attend(
    q: Float[Array, "B L N H"],
    k: Float[Array, "B L K H"],
    v: Float[Array, "B L K H"],
    *,
    q_segments: Int[Array, "B L"],
    k_segments: Int[Array, "B L"],
    causal: bool,
) -> Float[Array, "B L N H"]:
    """As `layers.attend`; on a CPU by Pallas's interpreter, which is slow and there for tests.

    Every device attends for its own rows, heads and queries. Without order all queries are of one
    segment, and its keys come first, as a clip's do.
    """
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {} if mesh.empty else mesh.shape
    rows, queries = ("B", "L") if causal else ("C", "positions")  # as the towers split them
    if k.shape[2] % sizes.get("tensor", 1):  # too few to split: one for each query head
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
        k, v = (spread.constrain(x, f"{rows} keys K H") for x in (k, v))
    if spread.platform() in GPUS:
        if sizes.get("context", 1) > 1:
            raise ValueError("attention=flash on GPUs wants a mesh without context parallelism")
        return _cudnn(q, k, v, q_segments, k_segments, causal)
    length = q.shape[1]
    more = -length % (LANES * (sizes.get("context", 1) if causal else 1))
    pad = lambda x: jnp.pad(x, [(0, 0), (0, more), *[(0, 0)] * (x.ndim - 2)])
    # scaled in float32 and rounded once; heads in front
    q = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
    qs, ks, vs = (jnp.swapaxes(pad(x), 1, 2) for x in (q, k, v))
    q_spec = spread.spec(f"{rows} N {queries} H", qs.shape, sizes)
    k_spec = spread.spec(f"{rows} K keys H", ks.shape, sizes)
    kernel = _kernel(qs, causal, *(_parts(axes, sizes) for axes in q_spec[1:3]))
    inputs = (qs, ks, vs, pad(q_segments), pad(k_segments))
    run = _all_rows
    if spread.devices() > 1:
        heads_and_queries = NamedSharding(mesh, PartitionSpec(*q_spec[1:3]))
        kernel_spec = kernel.manual_sharding_spec(heads_and_queries)
        segments = PartitionSpec(q_spec[0], q_spec[2]), PartitionSpec(k_spec[0])
        run = jax.shard_map(
            _all_rows,
            in_specs=(kernel_spec, q_spec, k_spec, k_spec, *segments),
            out_specs=q_spec,
            check_vma=False,
        )
    with jax.named_scope("causal" if causal else "whole"):
        out = run(kernel, *inputs)
    return jnp.swapaxes(out, 1, 2)[:, :length].astype(v.dtype)


def _cudnn(q, k, v, q_segments, k_segments, causal):
    """A clip's keys are told by their number, so that no [B L L] exists.

    A decoder's rows may be packed, or padded on either side, which is known only when the program
    runs: jax makes a bias of their mask, [B L L] without heads, and before 0.11.2 has its gradient
    computed, too, which nobody asks for. cuDNN's backward pass wants even lengths.
    """
    length = q.shape[1]
    pad = lambda x: jnp.pad(x, [(0, 0), (0, length % 2), *[(0, 0)] * (x.ndim - 2)])
    if causal:
        how = {"mask": pad(q_segments)[:, None, :, None] == pad(k_segments)[:, None, None]}
    else:
        count = (k_segments == q_segments[:, :1]).sum(axis=1, dtype=jnp.int32)
        # of no key nothing finite is made; jax's own number of queries would be split over nothing
        counts = jnp.maximum(count, 1), jnp.full_like(count, q.shape[1] + length % 2)
        keys, queries = (spread.constrain(x, "C") for x in counts)
        how = {"key_value_seq_lengths": keys, "query_seq_lengths": queries}
    out = jax.nn.dot_product_attention(
        pad(q), pad(k), pad(v), is_causal=causal, implementation=CUDNN, **how
    )
    return out[:, :length]


def _all_rows(kernel, q, k, v, q_segments, k_segments):
    def row(q, k, v, q_segments, k_segments):
        return kernel(q, k, v, segment_ids=splash().SegmentIds(q_segments, k_segments))

    return jax.vmap(row)(q, k, v, q_segments, k_segments)


def _kernel(q, causal, head_shards, q_seq_shards):
    heads, length = q.shape[1:3]
    mask = (splash().CausalMask if causal else splash().FullMask)((length, length))
    block = largest_block(length // q_seq_shards)
    return splash().make_splash_mha(
        splash().MultiHeadMask([mask] * heads),
        head_shards=head_shards,
        q_seq_shards=q_seq_shards,
        block_sizes=splash().BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            use_fused_bwd_kernel=True,  # five products rather than seven
        ),
        interpret=spread.platform() == "cpu",
    )


def largest_block(length: int) -> int:
    """The largest multiple of `LANES` up to `BLOCK` that divides a padded length."""
    return next(n for n in range(BLOCK, 0, -LANES) if length % n == 0)


def splash() -> Any:
    """The library, which takes a while to import and which only flash attention needs."""
    from jax.experimental.pallas.ops.tpu import splash_attention

    return splash_attention


def _parts(axes, sizes):
    return math.prod(sizes[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))


def by_queries(
    attend: Callable, q: Array, k: Array, v: Array, mask: Array, *, split: int = 1
) -> Array:
    """`attend(q, k, v, mask)`, plain attention, some queries at a time, forward and backward.

    Where keys are cached, so that no kernel serves.

    Args:
      split: devices that share rows and heads.
    """
    scores = q[..., 0].size * k.shape[1] / split
    parts = 2 ** max(math.ceil(math.log2(scores / SCORES)), 0)
    size = -(-q.shape[1] // parts)
    pad = -q.shape[1] % size
    padded = lambda x: jnp.pad(x, [(0, 0), (0, pad), *[(0, 0)] * (x.ndim - 2)])
    cut = lambda x: jnp.moveaxis(x.reshape(len(x), -1, size, *x.shape[2:]), 1, 0)
    some = jax.checkpoint(lambda block: attend(block[0], k, v, block[1]))
    out = jax.lax.map(some, (cut(padded(q)), cut(padded(mask))))
    return jnp.moveaxis(out, 0, 1).reshape(len(q), -1, *q.shape[2:])[:, : q.shape[1]]
