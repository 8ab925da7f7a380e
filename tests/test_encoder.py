"""What a clip's audio states depend on: the clip, all of it, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from flax import nnx

from qwen2audio_jax import Qwen2Audio, look
from qwen2audio_jax import encoder as encoders
from qwen2audio_jax.encoder import Encoder, positions_of, sinusoids, states_of


@pytest.fixture(scope="module")
def encoder():
    return small.shaken(Encoder(small.ENCODER, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def hear(encoder):
    """The encoder, compiled."""
    return jax.jit(lambda mel, frames: encoder(mel, jnp.asarray(frames)))


def clip(frames, total, behind=-1.0, seed=0):
    """A picture of noise for so many frames, and a constant behind it."""
    picture = np.full((small.ENCODER.mels, total), behind, np.float32)
    rng = np.random.default_rng(seed)
    picture[:, :frames] = rng.standard_normal((small.ENCODER.mels, frames))
    return picture


def test_counts_are_the_reference_s():
    """For every length: halved by the second convolution, halved again by pooling."""
    frames = np.arange(1, 3001)
    np.testing.assert_array_equal(positions_of(frames), (frames - 1) // 2 + 1)
    np.testing.assert_array_equal(states_of(frames), ((frames - 1) // 2 + 1 - 2) // 2 + 1)
    np.testing.assert_array_equal(states_of(jnp.array([100, 3000])), [25, 750])


def test_positions_are_whisper_s_sinusoids():
    """Sines, then cosines, from one radian a position down to a ten-thousandth of that."""
    table = sinusoids(1500, 16)
    np.testing.assert_allclose(table[0], [0] * 8 + [1] * 8)
    np.testing.assert_allclose(table[1, [0, 7, 8]], [np.sin(1), np.sin(1e-4), np.cos(1)], rtol=1e-5)
    np.testing.assert_allclose(table[700, [7, 15]], [np.sin(0.07), np.cos(0.07)], rtol=1e-5)


@pytest.mark.parametrize("frames", [29, 30, 31, 32])
def test_what_follows_a_clip_is_inaudible(hear, frames):
    """Frames from 2 * n1 + 1 on leave the clip's own states unchanged, to the bit."""
    picture, n1 = clip(frames, 48), (frames + 1) // 2
    n = n1 // 2
    noisy = picture.copy()
    noisy[:, 2 * n1 + 1 :] = 1e3
    quiet, loud = hear(picture[None], [frames]), hear(noisy[None], [frames])
    np.testing.assert_array_equal(quiet[0, :n], loud[0, :n])
    assert not np.allclose(quiet[0, n + 1 :], loud[0, n + 1 :])


def test_all_of_a_clip_is_heard(hear):
    """Its first and its last frame each change every state."""
    picture = clip(32, 48)
    states = hear(picture[None], [32])
    for frame in (0, 31):
        changed = picture.copy()
        changed[:, frame] += 3.0
        difference = np.abs(hear(changed[None], [32]) - states)[0, :8].max(axis=-1)
        assert difference.min() > 1e-4, frame


@pytest.mark.parametrize("frames", [37, 38, 39, 40])
def test_a_short_picture_is_exact(hear, frames):
    """2 * n1 + 2 frames give the states that 3000 give, for odd and even n1."""
    n1 = (frames + 1) // 2
    n = n1 // 2
    short = hear(clip(frames, 2 * n1 + 2)[None], [frames])
    full = hear(clip(frames, 3000)[None], [frames])
    np.testing.assert_allclose(short[0, :n], full[0, :n], rtol=1e-5, atol=1e-5)


def test_clips_do_not_hear_each_other(hear):
    """In a batch each clip has the states that it has alone."""
    lengths = [48, 17, 30]
    pictures = np.stack([clip(n, 48, seed=n) for n in lengths])
    together = hear(pictures, lengths)
    for i, n in enumerate(lengths):
        alone = hear(pictures[i : i + 1], [n])[0]
        np.testing.assert_allclose(together[i], alone, rtol=1e-5, atol=1e-5)


def test_an_odd_last_position_is_dropped(encoder):
    """Pooling takes means over pairs, before the norm; what has no pair is gone."""
    x = jax.random.normal(jax.random.key(0), (2, 7, 16))
    pairs = (x[:, 0:6:2] + x[:, 1:6:2]) / 2
    np.testing.assert_allclose(encoder.pool(x), encoder.norm(pairs), rtol=1e-6, atol=1e-6)


def test_keys_have_no_bias(encoder):
    """As in Whisper; queries, values and the output have one."""
    attention = encoder.blocks.attention
    assert attention.key.bias is None
    assert attention.query.bias.shape == attention.value.bias.shape == (2, 2, 8)
    assert attention.out.bias.shape == (2, 16)


def test_a_list_of_blocks_equals_the_stack(encoder, hear):
    listed = small.listed(encoder)
    picture, frames = clip(40, 48)[None], jnp.array([40])
    np.testing.assert_allclose(
        jax.jit(listed.__call__)(picture, frames), hear(picture, frames), rtol=1e-5, atol=1e-5
    )


def test_rematerialised_gradients_are_the_same(encoder):
    """`remat` changes what is kept, not what comes out."""
    picture, frames = jnp.array(clip(30, 40)[None]), jnp.array([30])
    graph, params = nnx.split(encoder)

    def gradient(remat):
        loss = lambda p: (nnx.merge(graph, p)(picture, frames, remat=remat) ** 3).sum()
        return jax.jit(jax.value_and_grad(loss))(params)

    for a, b in zip(*map(jax.tree.leaves, (gradient("full"), gradient("none"))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_bfloat16_stays_bfloat16_and_near():
    """Parameters decide the dtype; the result is float32's within bfloat16's precision."""
    narrow = Encoder(small.ENCODER, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    wide = nnx.clone(narrow)
    for _, p in nnx.iter_graph(wide):
        if isinstance(p, nnx.Param):
            p.set_value(p[...].astype(jnp.float32))
    picture, frames = jnp.array(clip(30, 40)[None]), jnp.array([30])
    states = narrow(picture, frames)
    assert states.dtype == jnp.bfloat16
    np.testing.assert_allclose(states.astype(jnp.float32), wide(picture, frames), atol=0.1)


def test_gelu_is_the_exact_one():
    """With the error function: 5e-4 away from the usual approximation."""
    np.testing.assert_allclose(encoders.gelu(jnp.array([-1.0, 2.0])), [-0.15865526, 1.9544997])


@pytest.mark.parametrize("scan", [True, False])
def test_untrained_attention_can_begin_local(scan):
    """After `look_nearby` a position looks, on average, at half the distance it did."""
    model = Qwen2Audio(small.CONFIG, scan_layers=scan, rngs=nnx.Rngs(0))
    # silence: positions differ in when they are, not in what is heard
    clip = {
        "input_features": np.zeros((1, 8, 80), np.float32),
        "feature_attention_mask": np.ones((1, 80), np.int32),
    }
    away = np.abs(np.arange(40) - np.arange(40)[:, None])
    looks = lambda: np.asarray(jax.jit(lambda: look.encoder_attention(model, **clip))())
    distance = lambda: (looks()[0] * away).sum(axis=-1).mean()
    before = distance()
    model.encoder.look_nearby()
    assert distance() < 0.5 * before


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 80, 40), "wanted 8 mel bands, got 80"),
        ((1, 8, 41), "wanted an even number of frames from 4 to 3000, got 41"),
        ((1, 8, 2), "wanted an even number of frames from 4 to 3000, got 2"),
        ((1, 8, 3002), "wanted an even number of frames from 4 to 3000, got 3002"),
    ],
)
def test_pictures_of_another_size_are_refused(encoder, shape, message):
    with pytest.raises(ValueError, match=message):
        encoder(jnp.zeros(shape), jnp.array([2]))
