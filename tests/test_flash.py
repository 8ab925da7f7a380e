"""Flash attention is attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen2audio_jax import flash, layers, sharding

LENGTH = 200  # no multiple of a block


def example():
    """Queries of four heads on two of keys; a row of two samples, and one that is padded."""
    draw = lambda seed, heads: jax.random.normal(jax.random.key(seed), (2, LENGTH, heads, 16))
    two = np.repeat([1, 2], [90, 110])
    padded = np.repeat([1, 0], [150, 50])
    return draw(0, 4), draw(1, 2), draw(2, 2), jnp.array([two, padded])


def gradients(q, k, v, segments, offset):
    how = {"k_segments": segments, "offset": offset}
    how["q_segments"] = segments if offset == 0 else jnp.ones_like(segments)
    weight = jnp.cos(jnp.arange(q.size).reshape(q.shape)) * (how["q_segments"] > 0)[..., None, None]
    total = lambda *qkv: (layers.attend(*qkv, **how) * weight).sum()
    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(q, k, v)


@pytest.mark.parametrize("offset", [0, None], ids=["decoder", "encoder"])
def test_flash_is_dot_product(offset):
    """Samples of a row apart, padding and clips' ends unheard: the value, and all gradients."""
    wanted = gradients(*example(), offset)
    with flash.using("flash"):
        found = gradients(*example(), offset)
    for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4)


def test_flash_on_a_mesh_is_flash():
    """Rows, heads and queries on devices of their own; keys are whole."""
    q, k, v, segments = example()
    how = {"q_segments": segments, "k_segments": segments, "offset": 0}
    attend = lambda q, k, v: layers.attend(q, k, v, **how)
    wanted = attend(q, k, v)
    with flash.using("flash"), jax.set_mesh(sharding.mesh(data=2, tensor=2, context=2)):
        found = jax.jit(attend)(q, k, v)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=2e-4)


def test_who_chooses_for_himself_gets_flash_on_tpus_alone():
    """A CPU has none; and keys of a cache are read as ever."""
    q, k, *_ = example()
    assert not flash.serves(q, k, 0)
    with flash.using("flash"):
        assert flash.serves(q, k, 0) and not flash.serves(q[:, :1], k, jnp.array(3))
    with flash.using("dot_product"):
        assert not flash.serves(q, k, 0)


def test_blocks_of_queries_are_attention(monkeypatch):
    """Where scores would not fit they are made for some queries at a time."""
    q, k, v, segments = example()
    mask = segments[:, :, None] == segments[:, None]
    grouped = q.reshape(2, LENGTH, 2, 2, 16)
    wanted = layers._attend(grouped, k, v, mask)
    monkeypatch.setattr(flash, "SCORES", q[..., 0].size * LENGTH // 7)
    np.testing.assert_allclose(
        flash.by_queries(layers._attend, grouped, k, v, mask), wanted, rtol=1e-5, atol=1e-6
    )
