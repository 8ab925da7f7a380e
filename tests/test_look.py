"""Attention to be looked at is the attention that the model computes with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from flax import nnx

from qwen2audio_jax import Qwen2Audio, look

LENGTHS = [30, 13]


@pytest.fixture(scope="module")
def model():
    return small.shaken(Qwen2Audio(small.CONFIG, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def inputs():
    return small.inputs(LENGTHS, length=16)


def test_decoder_attention_is_the_model_s(model, inputs):
    """Per layer and head: the values weighted by it are what the block saw."""

    @jax.jit
    def both(attention_mask, **others):
        weights = look.decoder_attention(model, attention_mask=attention_mask, **others)
        positions = jnp.maximum(jnp.cumsum(attention_mask, axis=1) - 1, 0)
        x, seen, ours = model.embed(**others), [], []
        for block, looks in zip(look.blocks_of(model.decoder.blocks), weights, strict=True):
            h = block.attention_norm(x)
            values = jnp.repeat(block.attention.value(h), 2, axis=2)
            seen.append(block.attention(h, positions, attention_mask, None, None)[0])
            ours.append(block.attention.out(jnp.einsum("bnls,bsnh->blnh", looks, values)))
            x, _ = block(x, positions, attention_mask)
        return weights, jnp.stack(seen), jnp.stack(ours)

    weights, seen, ours = both(**inputs)
    assert weights.shape == (2, 2, 4, 16, 16)
    np.testing.assert_allclose(ours, seen, rtol=1e-3, atol=1e-4)


def test_decoder_attention_looks_back_and_never_at_padding(model, inputs):
    """Each token's looks add up to one, over itself and what came before it in its row."""
    listed = small.listed(model)
    weights = np.asarray(jax.jit(lambda x: look.decoder_attention(listed, **x))(inputs))
    real = inputs["attention_mask"].astype(bool)
    allowed = np.tri(16, dtype=bool) & (real[:, :, None] == real[:, None])
    assert not weights[:, ~allowed[:, None].repeat(4, 1)].any()
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)


def test_encoder_attention_stays_within_the_clip(model, inputs):
    """No position looks at what lies behind the clip; each looks at all of the clip."""
    clips = {name: inputs[name] for name in ("input_features", "feature_attention_mask")}
    weights = np.asarray(jax.jit(lambda x: look.encoder_attention(model, **x))(clips))
    assert weights.shape == (2, 2, 2, 20, 20)
    for clip, frames in enumerate(LENGTHS):
        n = (frames + 1) // 2
        assert not weights[:, clip, ..., n:].any() and weights[:, clip, ..., :n].all()
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
