"""audio states into their token slots."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qwen2audio_jax import spread


def merge(
    text: Float[Array, "B L D"],
    slots: Bool[Array, "B L"],
    states: Float[Array, "C A D"],
    counts: Int[Array, " C"],
) -> Float[Array, "B L D"]:
    """Puts each clip's valid states, in order, where the batch has its audio tokens, in order.

    Args:
      text: the tokens' embeddings.
      slots: which tokens are audio tokens, over the whole batch as many as `counts` adds up to
        (`check` says so outside of jit).
      states: what was heard.
      counts: how many of each clip's states are valid.
    """
    ends = jnp.cumsum(counts)
    rank = (jnp.cumsum(slots.ravel()) - 1).reshape(slots.shape)
    clip = jnp.searchsorted(ends, rank, side="right")
    clip = jnp.clip(clip, 0, len(counts) - 1)
    state = jnp.clip(rank - (ends - counts)[clip], 0, states.shape[1] - 1)
    # A row's clips may be on any device: columns of all states are looked up, then brought to the
    # rows, for no device has room for all states of a pod.
    # First by clips: else the product that makes them would gather what is heard by all.
    columns = ("data", "fsdp", "context")
    states = spread.constrain(states.astype(text.dtype), "C A D")
    states = spread.constrain(states, "clips A D", D=columns)
    heard = spread.constrain(states[clip, state], "B L D", D=columns)
    heard = spread.constrain(heard, "B L D")
    return jnp.where(slots[..., None], heard, text)


def check(slots: Bool[np.ndarray, "B L"], counts: Int[np.ndarray, " C"]) -> None:
    """Refuses a prompt whose audio tokens are not as many as its clips' audio states.

    Raises:
      ValueError: they differ; the message gives both numbers.
    """
    if slots.sum() != counts.sum():
        raise ValueError(
            f"the prompt has {int(slots.sum())} audio tokens, its {len(counts)} clips have "
            f"{int(counts.sum())} audio states"
        )


def concrete(*arrays: jax.Array | np.ndarray) -> bool:
    """Whether values can be looked at: not inside of jit, and wholly on this process."""
    return not any(
        isinstance(a, jax.core.Tracer) or not getattr(a, "is_fully_addressable", True)
        for a in arrays
    )
