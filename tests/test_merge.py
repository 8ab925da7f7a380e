"""Audio states stand in their slots, in order, and nowhere else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen2audio_jax import merge

# a row without a clip, a row with two, padding between slots, a row with the tail of the second
SLOTS = np.array([[0, 0, 0, 0, 0, 0], [1, 1, 0, 1, 0, 1], [1, 0, 0, 0, 1, 1]], bool)
COUNTS = np.array([2, 1, 4])  # of five states that each clip's row has room for


def example():
    text = np.arange(3 * 6 * 2, dtype=np.float32).reshape(3, 6, 2)
    states = -1000.0 - np.arange(3 * 5 * 2, dtype=np.float32).reshape(3, 5, 2)
    return text, states


def test_states_stand_in_order_over_clips_and_rows():
    """The n-th audio token of the batch gets the n-th valid state of the batch."""
    text, states = example()
    wanted = text.copy()
    wanted[SLOTS] = np.concatenate([clip[:n] for clip, n in zip(states, COUNTS, strict=True)])
    np.testing.assert_array_equal(jax.jit(merge.merge)(text, SLOTS, states, COUNTS), wanted)


def test_any_layout_is_filled_in_order():
    """So it is for random slots and counts, clips without a state among them."""
    rng = np.random.default_rng(0)
    filled = jax.jit(merge.merge)
    for _ in range(30):
        counts = rng.integers(0, 6, 4)
        slots = np.zeros(3 * 12, bool)
        slots[rng.choice(slots.size, counts.sum(), replace=False)] = True
        slots = slots.reshape(3, 12)
        text, states = rng.standard_normal((3, 12, 2)), rng.standard_normal((4, 5, 2))
        wanted = text.copy()
        wanted[slots] = np.concatenate([c[:n] for c, n in zip(states, counts, strict=True)])
        merged = filled(jnp.float32(text), jnp.array(slots), jnp.float32(states), jnp.array(counts))
        np.testing.assert_array_equal(merged, np.float32(wanted))


def test_gradients_reach_states_and_text_where_they_stand():
    """An invalid state and a replaced embedding move nothing."""
    text, states = map(jnp.array, example())
    total = lambda t, s: merge.merge(t, jnp.array(SLOTS), s, jnp.array(COUNTS)).sum()
    to_text, to_states = jax.grad(total, argnums=(0, 1))(text, states)
    np.testing.assert_array_equal(to_text[..., 0], ~SLOTS)
    np.testing.assert_array_equal(to_states[..., 0], np.arange(5) < COUNTS[:, None])


def test_states_take_the_text_s_dtype():
    """What was heard never widens the decoder's arithmetic."""
    text, states = map(jnp.array, example())
    merged = merge.merge(text.astype(jnp.bfloat16), jnp.array(SLOTS), states, jnp.array(COUNTS))
    assert merged.dtype == jnp.bfloat16


def test_counts_that_differ_are_refused_with_both_numbers():
    merge.check(SLOTS, COUNTS)
    with pytest.raises(ValueError, match="7 audio tokens, its 3 clips have 9 audio states"):
        merge.check(SLOTS, COUNTS + np.array([0, 0, 2]))


def test_values_inside_of_jit_cannot_be_looked_at():
    """`concrete` says whether `check` can run."""
    seen = []
    assert merge.concrete(np.zeros(2), jnp.zeros(2))
    jax.jit(lambda x: seen.append(merge.concrete(x)) or x)(jnp.zeros(2))
    assert seen == [False]
