"""One step of training: gradient, update, what to log."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int


@flax.struct.dataclass
class State:
    """All that a step changes."""

    step: Int[Array, ""]
    params: Any
    opt_state: Any


def start(params: Any, optimizer: optax.GradientTransformation) -> State:
    """The state before the first step."""
    return State(jnp.zeros((), jnp.int32), params, optimizer.init(params))


@partial(jax.jit, static_argnames=("loss", "optimizer"), donate_argnames="state")
def update(
    state: State, batch: Any, *, loss: Callable, optimizer: optax.GradientTransformation
) -> tuple[State, dict]:
    """Moves the parameters once against the gradient of `loss(params, batch)`."""
    (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state.params, batch)
    delta, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, delta)
    metrics = {**metrics, "loss": value, "grad_norm": optax.tree.norm(grads)}
    return State(state.step + 1, params, opt_state), metrics
