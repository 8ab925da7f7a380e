"""A step moves the parameters against the gradient and says what happened."""

import jax
import numpy as np
import optax
import pytest
import small
from flax import nnx

from qwen2audio_jax import Qwen2Audio
from qwen2audio_jax.training import loss, step
from qwen2audio_jax.training.optimizer import OptimizerConfig


def test_a_step_is_the_optimizer_s_update():
    """Plain gradient descent on a parabola, by hand."""
    optimizer = optax.sgd(0.1)
    state = step.start({"x": jax.numpy.array([1.0, -2.0])}, optimizer)

    def parabola(params, batch):
        return (params["x"] ** 2).sum() * batch, {"seen": batch}

    state, metrics = step.update(state, 2.0, loss=parabola, optimizer=optimizer)
    np.testing.assert_allclose(state.params["x"], [0.6, -1.2], rtol=1e-6)
    assert state.step == 1 and metrics["seen"] == 2.0
    np.testing.assert_allclose(metrics["loss"], 10.0)
    np.testing.assert_allclose(metrics["grad_norm"], np.hypot(4, 8), rtol=1e-6)


def test_one_batch_is_learned_by_heart():
    """Twenty steps on the same three rows: the loss falls to less than half, and tokens count."""
    graph, params = nnx.split(Qwen2Audio(small.CONFIG, rngs=nnx.Rngs(0)))
    inputs = small.inputs([30, 13, 21])
    learned = (inputs["attention_mask"] == 1) & (inputs["input_ids"] != small.CONFIG.audio_token)
    batch = inputs | {"labels": np.where(learned, inputs["input_ids"], loss.IGNORED)}
    optimizer = OptimizerConfig(learning_rate=0.03, steps=20, warmup_steps=2).make()
    state = step.start(params, optimizer)
    next_token = lambda params, batch: loss.next_token(nnx.merge(graph, params), batch)
    rows = []
    for _ in range(20):
        state, metrics = step.update(state, batch, loss=next_token, optimizer=optimizer)
        rows.append({name: float(x) for name, x in metrics.items()})
    assert int(state.step) == 20
    assert rows[0]["loss"] == pytest.approx(np.log(64), rel=0.3)
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    assert rows[-1]["accuracy"] > rows[0]["accuracy"]
    assert all(row["tokens"] == (batch["labels"][:, 1:] != loss.IGNORED).sum() for row in rows)
    assert all(np.isfinite(row["grad_norm"]) and row["grad_norm"] > 0 for row in rows)
