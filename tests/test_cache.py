"""A cache changes what an answer costs, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx

from qwen2audio_jax import Qwen2Audio, cache

CONFIG = reference.SHAPES["two_kv_heads"]
IDS = np.random.default_rng(0).integers(4, 300, (2, 12)).astype(np.int32)
MASK = np.array([[0] * 4 + [1] * 8, [1] * 12], np.int32)


@pytest.fixture(scope="module", params=[False, True], ids=["list", "scanned"])
def model(request):
    return Qwen2Audio(CONFIG, scan_layers=request.param, rngs=nnx.Rngs(0))


@jax.jit
def read(model, ids, mask, past):
    x, past = model.hidden(ids, mask, cache=past)
    return model.decoder.logits(x), past


def empty(model, slots, batch=2):
    return cache.empty(CONFIG.decoder, batch, slots, scan=model.scan_layers, dtype=jnp.float32)


@pytest.mark.parametrize("pieces", [(12,), (5, 7), (6, 1, 1, 4)], ids=str)
def test_cached_equals_uncached(model, pieces):
    """In pieces of any size, left-padded or not, in more slots than are needed."""
    expected = model(IDS, MASK)
    past, parts, start = empty(model, 20), [], 0
    for size in pieces:
        piece = slice(start, start + size)
        logits, past = read(model, IDS[:, piece], MASK[:, piece], past)
        parts.append(logits)
        start += size
    assert int(past.length) == 12
    logits = jnp.concatenate(parts, axis=1)
    kept = MASK.astype(bool)
    np.testing.assert_allclose(logits[kept], expected[kept], atol=1e-4)


def test_a_cache_may_be_rewound_grown_repeated_and_reordered(model):
    """What is read afterwards is what the tokens that are left would have given."""
    _, past = read(model, IDS, MASK, empty(model, 16))
    past = cache.grow(cache.rewind(past, jnp.int32(9)), 24)
    assert past.slots == 24
    second = cache.repeat(past, 2, rows=1, total=3)  # and an empty one
    assert second.segments.shape == (3, 24) and not second.segments[2].any()
    rows = np.array([1, 0, 0, 1])
    past = cache.repeat(cache.reorder(past, jnp.array([[1, 0]])), 2)
    past = cache.reorder(past, jnp.array([[0, 2, 3, 1]]))
    logits, past = read(model, IDS[rows, 3:6], np.ones((4, 3), np.int32), past)
    ids = np.concatenate([IDS[rows, :9], IDS[rows, 3:6]], axis=1)
    mask = np.concatenate([MASK[rows, :9], np.ones((4, 3), np.int32)], axis=1)
    np.testing.assert_allclose(logits, model(ids, mask)[:, 9:], atol=1e-4)
    assert int(past.length) == 12
