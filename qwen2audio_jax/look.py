"""What happens inside: attention as numbers, for pictures and notebooks."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from qwen2audio_jax import encoder, layers
from qwen2audio_jax.model import Qwen2Audio


def blocks_of(blocks: nnx.Module) -> list[nnx.Module]:
    """A tower's blocks one by one, however they are held."""
    if isinstance(blocks, nnx.List):
        return list(blocks)
    count = len(jax.tree.leaves(blocks)[0])
    return [jax.tree.map(lambda x, i=i: x[i], blocks) for i in range(count)]


def decoder_attention(
    model: Qwen2Audio, input_ids, attention_mask, input_features=None, feature_attention_mask=None
) -> Float[Array, "layers B N L L"]:
    """How much each token looks at each token before it, per layer and head."""
    given = (input_ids, input_features, feature_attention_mask)
    x = model.embed(*jax.tree.map(jnp.asarray, given))
    segments = jnp.asarray(attention_mask, jnp.int32)
    positions = jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)
    seen = []
    for block in blocks_of(model.decoder.blocks):
        attention, h = block.attention, block.attention_norm(x)
        turn = lambda heads: layers.rotate(heads, positions, model.config.decoder.rope_theta)
        seen.append(
            layers.attention_weights(
                turn(attention.query(h)),
                turn(attention.key(h)),
                q_segments=segments,
                k_segments=segments,
                offset=0,
            )
        )
        x, _ = block(x, positions, segments)
    return jnp.stack(seen)


def encoder_attention(
    model: Qwen2Audio, input_features, feature_attention_mask
) -> Float[Array, "layers C N P P"]:
    """How much each position of a clip looks at each other, per layer and head."""
    x = model.encoder.stem(jnp.asarray(input_features))
    frames = jnp.asarray(feature_attention_mask).sum(axis=1)
    valid = jnp.arange(x.shape[1]) < encoder.positions_of(frames)[:, None]
    seen = []
    for block in blocks_of(model.encoder.blocks):
        attention, h = block.attention, block.attention_norm(x)
        seen.append(
            layers.attention_weights(
                attention.query(h),
                attention.key(h),
                q_segments=jnp.ones(valid.shape, jnp.int32),
                k_segments=valid.astype(jnp.int32),
            )
        )
        x = block(x, valid)
    return jnp.stack(seen)
