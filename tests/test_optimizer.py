"""AdamW moves what it should, as far as it should."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
from flax import nnx

from qwen2audio_jax import Qwen2Audio
from qwen2audio_jax.training.optimizer import OptimizerConfig, by_path


@pytest.fixture(scope="module")
def params():
    return nnx.state(small.shaken(Qwen2Audio(small.CONFIG, rngs=nnx.Rngs(0))))


def flat(tree):
    paths = jax.tree.leaves(by_path(tree, lambda path: path))
    return dict(zip(paths, map(np.asarray, jax.tree.leaves(tree)), strict=True))


def step(config, params, grads, count=1):
    """How far each parameter moves in `count` steps with the same gradient."""
    optimizer = config.make()

    @jax.jit
    def run(params, grads):
        state, moved = optimizer.init(params), params
        for _ in range(count):
            updates, state = optimizer.update(grads, state, moved)
            moved = optax.apply_updates(moved, updates)
        return jax.tree.map(jnp.subtract, moved, params)

    return flat(run(params, grads))


def test_paths_are_the_table_s(params):
    """Parameters are named as everywhere else."""
    names = flat(params)
    assert "encoder.positions" in names and "encoder.blocks.attention.query.kernel" in names
    assert "decoder.embedding.embedding" in names and "projector.bias" in names


def test_without_gradients_only_matrices_decay(params):
    """Kernels and embeddings shrink by rate * decay; norms, biases and positions stay."""
    config = OptimizerConfig(learning_rate=0.1, steps=10, warmup_steps=0, weight_decay=0.5)
    moved = step(config, params, jax.tree.map(jnp.zeros_like, params))
    for path, before in flat(params).items():
        decays = path.rpartition(".")[2] in ("kernel", "embedding")
        np.testing.assert_allclose(
            moved[path], -0.05 * before if decays else 0 * before, rtol=1e-4, atol=1e-7
        )


def test_frozen_parameters_never_move(params):
    """A prefix freezes itself and all below it, and nothing that merely begins alike."""
    config = OptimizerConfig(warmup_steps=0, frozen=("encoder.conv1", "decoder.blocks.mlp"))
    moved = step(config, params, jax.tree.map(jnp.ones_like, params))
    still = {path for path, delta in moved.items() if not delta.any()}
    assert still == {
        path for path in moved if path.startswith(("encoder.conv1.", "decoder.blocks.mlp."))
    }
    assert "decoder.blocks.mlp_norm.scale" not in still and "encoder.positions" not in still
    assert not step(OptimizerConfig(warmup_steps=0), params, params)["encoder.positions"].any()


def test_the_learning_rate_warms_up_and_falls_as_a_cosine():
    """Linear to the peak, half of the way down in the middle, the final fraction at the end."""
    config = OptimizerConfig(learning_rate=2.0, steps=110, warmup_steps=10, final_fraction=0.1)
    rates = [float(config.schedule()(i)) for i in (0, 5, 10, 60, 110, 500)]
    np.testing.assert_allclose(rates, [0, 1, 2, 1.1, 0.2, 0.2], rtol=1e-5)


def test_a_warm_up_that_never_ends_is_refused():
    with pytest.raises(ValueError, match="fewer warm-up steps than the 50 steps, got 50"):
        OptimizerConfig(steps=50, warmup_steps=50)


def test_long_gradients_are_clipped():
    """Beyond `clip_norm` only the direction counts; below it the length does."""
    tree = {"a": {"kernel": jnp.zeros(3)}}
    grads = lambda size: {"a": {"kernel": size * jnp.array([0.6, 0.0, 0.8])}}
    config = OptimizerConfig(weight_decay=0.0, warmup_steps=0, clip_norm=1.0)
    state = lambda size: config.make().update(grads(size), config.make().init(tree), tree)[1]
    first = lambda size: np.concatenate([x.ravel() for x in jax.tree.leaves(state(size))])
    np.testing.assert_allclose(first(1.0), first(1e3), rtol=1e-5)
    assert not np.allclose(first(0.5), first(1.0))
