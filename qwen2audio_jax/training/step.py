"""One step of training: gradient, update, what to log."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from qwen2audio_jax.training.loss import Sums
from qwen2audio_jax.training.optimizer import name_of


@flax.struct.dataclass
class State:
    """All that a step changes.

    Attributes:
      step: batches seen.
      params: what trains.
      opt_state: the optimizer's; of its averaged parameters too, if it keeps such.
      skipped: batches that moved nothing, because their gradient was not finite.
    """

    step: Any  # arrays, or what stands for them: shapes, shardings
    params: Any
    opt_state: Any
    skipped: Any


def start(params: Any, optimizer: optax.GradientTransformation) -> State:
    """The state before the first step."""
    zero = lambda: jnp.zeros((), jnp.int32)
    return State(zero(), params, optimizer.init(params), zero())


def split(model: nnx.Module, trains: Callable[[str], bool]) -> tuple[nnx.GraphDef, Any, Any]:
    """A model's structure, the parameters that train, and those that stay as they are.

    Args:
      trains: of a parameter's path, as `OptimizerConfig.trains`.
    """
    return nnx.split(model, lambda path, _: trains(name_of(path)), ...)


def bind(loss: Callable[..., Sums], graph: nnx.GraphDef, *, dtype: Any = None) -> Callable:
    """`loss(model, batch)` as the function of parameters that `update` wants.

    Args:
      dtype: of the arithmetic, where that is not the parameters' own.

    Returns:
      A function of what trains, a batch, and `update`'s `fixed`: what does not train, and, for a
      loss that takes a `reference` model, what trains as it was in the beginning.
    """

    def of_params(params, batch, frozen, reference=None):
        merge = lambda *states: nnx.merge(graph, *(cast(state, dtype) for state in states))
        model = merge(params, frozen)
        if reference is None:
            return loss(model, batch)
        return loss(model, batch, reference=merge(reference, frozen))

    return of_params


def cast(tree: Any, dtype: Any) -> Any:
    """A tree whose floating-point arrays have this dtype; None: their own."""
    if dtype is None:
        return tree
    return jax.tree.map(lambda x: x.astype(dtype) if _is_float(x) else x, tree)


@partial(
    jax.jit,
    static_argnames=("loss", "optimizer", "gradient_accumulation_steps"),
    donate_argnames="state",
)
def update(
    state: State,
    batch: Any,
    fixed: tuple = (),
    *,
    loss: Callable[..., Sums],
    optimizer: optax.GradientTransformation,
    gradient_accumulation_steps: int = 1,
) -> tuple[State, dict]:
    """Moves the parameters once against the gradient of `loss(params, batch, *fixed)`.

    A gradient that is not finite moves nothing, neither parameters nor the optimizer's state, and
    is counted.

    Args:
      fixed: what else the loss reads and no step changes.
      gradient_accumulation_steps: if more than 1, every array of the batch leads with an axis of
        so many parts, which are gone through one after another; the step is that of all at once.

    Returns:
      The next state, and what to log: the loss's metrics, `loss`, `grad_norm` and `skipped` so far.

    Raises:
      ValueError: the batch does not lead with `gradient_accumulation_steps` parts.
    """
    grads, sums = _gradient(
        lambda params, batch: loss(params, batch, *fixed),
        state.params,
        batch,
        gradient_accumulation_steps,
    )
    norm = optax.tree.norm(cast(grads, jnp.float32))  # a sum in shorter ones stops growing
    finite = jnp.isfinite(norm)
    delta, opt_state = optimizer.update(grads, state.opt_state, state.params)
    moved = _moved(state.params, delta, state.step), opt_state
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), moved, (state.params, state.opt_state)
    )
    skipped = state.skipped + ~finite
    metrics = {**sums.means(), "grad_norm": norm, "skipped": skipped}
    return State(state.step + 1, params, opt_state, skipped), metrics


def _moved(params, delta, step):
    """The parameters after an update.

    Those of bfloat16 are rounded up or down by chance, as often as they are near to either: most
    updates are less than half of their last bit, and would get lost every time.
    """
    leaves, tree = jax.tree.flatten(optax.apply_updates(cast(params, jnp.float32), delta))
    dtypes = [old.dtype for old in jax.tree.leaves(params)]
    return jax.tree.unflatten(
        tree,
        [
            _rounded(new, step * len(leaves) + i) if dtype == jnp.bfloat16 else new.astype(dtype)
            for i, (new, dtype) in enumerate(zip(leaves, dtypes, strict=True))
        ],
    )


def _rounded(x, salt):
    """A float32 array in bfloat16, right on average: what it loses is what carries in its place."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + (_noise(x.shape, salt) >> 16)
    kept = jax.lax.bitcast_convert_type(bits & np.uint32(0xFFFF0000), jnp.float32)
    return kept.astype(jnp.bfloat16)


def _noise(shape, salt):
    """Numbers below 2**32 for all places of an array, others for another salt.

    Murmur3's finaliser twice, rather than jax.random: of hundreds of arrays that takes minutes to
    compile. Each device makes those of its own part.
    """
    x, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        x += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride & 0xFFFFFFFF)
        stride *= shape[axis]
    return _mixed(x + _mixed(jnp.asarray(salt).astype(jnp.uint32) + 1))


def _mixed(x):
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _gradient(loss, params, batch, parts):
    """The gradient of a batch's mean, and its sums."""

    def of_mean(params, batch, weight=None):
        sums = loss(params, batch)
        return sums.mean(weight), sums

    gradient = jax.grad(of_mean, has_aux=True)
    if parts == 1:
        return gradient(params, batch)
    if found := {len(x) for x in jax.tree.leaves(batch)} - {parts}:
        raise ValueError(f"wanted a batch in {parts} parts to accumulate, got one in {found}")
    # Each part is divided by the weight of all. Weights are read off the labels, so XLA drops
    # the model from this first pass.
    weight = jax.lax.map(lambda part: loss(params, part).weight, batch).sum(axis=0)

    def add(total, part):
        return jax.tree.map(jnp.add, total, gradient(params, part, weight)), None

    first = jax.tree.map(lambda x: x[0], batch)
    wide = lambda x: jnp.promote_types(x.dtype, jnp.float32) if _is_float(x) else x.dtype
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, wide(x)), jax.eval_shape(gradient, params, first, weight)
    )
    return jax.lax.scan(add, zeros, batch)[0]


def _is_float(x):
    return jnp.issubdtype(x.dtype, jnp.floating)
