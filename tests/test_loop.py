"""The loop trains once a batch, keeps a history, and stops at the first number that is none."""

import jax.numpy as jnp
import numpy as np
import pytest
import small
from flax import nnx

from qwen2audio_jax import Qwen2Audio
from qwen2audio_jax.training import loop
from qwen2audio_jax.training import loss as losses
from qwen2audio_jax.training.optimizer import OptimizerConfig

STEPS = 3


@pytest.fixture
def model():
    return Qwen2Audio(small.CONFIG, rngs=nnx.Rngs(0))


def batches():
    inputs = small.inputs([9], total=16, length=6)
    for _ in range(STEPS):
        yield inputs | {
            "labels": np.where(inputs["attention_mask"] == 1, inputs["input_ids"], -100)
        }


def test_every_batch_is_one_step_of_the_history(model):
    """The model moves, the caller's stays, and `every` sees each state on the way."""
    before = np.asarray(model.projector.kernel[...]).copy()
    seen = []
    config = OptimizerConfig(learning_rate=0.01, steps=STEPS, warmup_steps=1)
    trained, history = loop.train(
        model,
        batches(),
        config,
        every=lambda number, model: seen.append((number, np.asarray(model.projector.kernel[...]))),
    )
    assert [number for number, _ in seen] == [1, 2, 3]
    np.testing.assert_array_equal(seen[0][1], before)  # warm-up begins at a rate of 0
    assert not np.array_equal(seen[1][1], before)
    np.testing.assert_array_equal(seen[2][1], trained.projector.kernel[...])
    assert [set(row) for row in history] == [
        {"loss", "accuracy", "tokens", "grad_norm", "skipped", "learning_rate", "seconds"}
    ] * STEPS
    np.testing.assert_allclose(
        [row["learning_rate"] for row in history], [0, 0.01, 0.005], rtol=1e-5
    )
    assert history[-1]["loss"] < history[0]["loss"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loss_that_is_no_number_stops_the_training(model, value):
    """At the step where it happens, which the message names."""

    def breaks(model, batch):
        first = (batch["number"] == 0) * model.projector.bias.sum()
        total = first + jnp.where(batch["number"] == 1, value, 0.0)
        return losses.Sums(total, jnp.array(1), {"accuracy": jnp.array(0.0), "tokens": 1})

    config = OptimizerConfig(steps=STEPS, warmup_steps=1)
    with pytest.raises(FloatingPointError, match=f"the loss is {value} at step 2"):
        loop.train(model, ({"number": i} for i in range(STEPS)), config, loss=breaks)
