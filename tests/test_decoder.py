"""What a token's prediction depends on: its own segment up to itself, and distances in it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from flax import nnx

from qwen2audio_jax import DecoderConfig
from qwen2audio_jax.decoder import Decoder

LENGTH = 7
EMBEDDED = np.random.default_rng(0).standard_normal((2, LENGTH, 12)).astype(np.float32)


@pytest.fixture(scope="module")
def decoder():
    return small.shaken(Decoder(small.DECODER, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def read(decoder):
    """The decoder without a cache, compiled: embeddings, positions and segments to its output."""
    run = jax.jit(lambda x, positions, segments: decoder(x, positions, segments)[0])
    return lambda x, positions, segments: np.asarray(
        run(x, np.asarray(positions), np.asarray(segments))
    )


def whole(rows=2):
    """Positions and segments of rows without padding."""
    return np.tile(np.arange(LENGTH), (rows, 1)), np.ones((rows, LENGTH), int)


def test_the_future_is_unseen(read):
    """Changing a token changes its own output and later ones, and no earlier one."""
    changed = EMBEDDED.copy()
    changed[:, 4] += 1
    moved = np.abs(read(EMBEDDED, *whole()) - read(changed, *whole())).max(axis=-1)
    np.testing.assert_array_equal(moved[:, :4], 0)
    assert moved[:, 4:].min() > 1e-5


def test_padding_is_inaudible_on_either_side(read):
    """A sample of five tokens reads the same alone, padded right and padded left by anything."""
    x, _ = EMBEDDED
    sample, noise = x[:5], 1e3 * x[5:]
    rows = np.stack([np.concatenate([sample, noise]), np.concatenate([noise, sample])])
    positions = [[0, 1, 2, 3, 4, 4, 4], [0, 0, 0, 1, 2, 3, 4]]
    segments = [[1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1]]
    right, left = read(rows, positions, segments)
    alone = read(EMBEDDED, *whole())[0, :5]  # its future is unseen
    np.testing.assert_allclose(right[:5], alone, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(left[2:], alone, rtol=1e-4, atol=1e-5)


def test_packed_samples_see_only_themselves(read):
    """Two samples in one row read as each does at the start of a row of its own."""
    a, b = EMBEDDED[0, :4], EMBEDDED[1, :3]
    packed = np.stack([np.concatenate([a, b]), np.concatenate([a, b])])
    positions, segments = [[0, 1, 2, 3, 0, 1, 2]] * 2, [[1, 1, 1, 1, 2, 2, 2]] * 2
    out, alone = read(packed, positions, segments)[0], read(EMBEDDED, *whole())
    np.testing.assert_allclose(out[:4], alone[0, :4], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(out[4:], alone[1, :3], rtol=1e-4, atol=1e-5)


def test_only_distances_count(read):
    """All positions moved together change nothing; a gap between tokens does."""
    positions, segments = whole()
    near = read(EMBEDDED, positions, segments)
    np.testing.assert_allclose(
        read(EMBEDDED, positions + 100, segments), near, rtol=1e-3, atol=1e-4
    )
    apart = read(EMBEDDED, positions + 9 * (positions > 3), segments)
    assert np.abs(apart - near)[:, 4:].max() > 1e-3


def test_a_list_of_blocks_equals_the_stack(decoder, read):
    listed = small.listed(decoder)
    out = jax.jit(lambda x, p, s: listed(x, p, s)[0])(EMBEDDED, *whole())
    np.testing.assert_allclose(out, read(EMBEDDED, *whole()), rtol=1e-5, atol=1e-5)


def test_rematerialised_gradients_are_the_same(decoder):
    """`remat` changes what is kept, not what comes out."""
    graph, params = nnx.split(decoder)

    @functools.partial(jax.jit, static_argnums=1)
    def gradient(params, remat):
        read = lambda p: nnx.merge(graph, p)(*map(jnp.asarray, (EMBEDDED, *whole())), remat=remat)[
            0
        ]
        return jax.value_and_grad(lambda p: (read(p) ** 3).sum())(params)

    wanted = jax.tree.leaves(gradient(params, "none"))
    for policy in ("full", "minimal", "save_qkv_proj", "minimal_offloaded"):
        for a, b in zip(jax.tree.leaves(gradient(params, policy)), wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="no remat_policy 'most'; there are none, full, minimal"):
        gradient(params, "most")


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_float32_products_with_the_head(tied):
    """In bfloat16 too; a tied head is the embedding, an untied one is a table of its own."""
    c = DecoderConfig(
        **{**vars(small.DECODER), "tied": tied, "layers": 1},
    )
    decoder = Decoder(c, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert hasattr(decoder, "head") is not tied
    table = (decoder.embedding if tied else decoder.head).embedding[...]
    x = jnp.asarray(EMBEDDED, jnp.bfloat16)
    logits = decoder.logits(x)
    assert logits.dtype == jnp.float32
    wanted = np.asarray(x, np.float32) @ np.asarray(table, np.float32).T
    np.testing.assert_allclose(logits, wanted, rtol=1e-5, atol=1e-5)
