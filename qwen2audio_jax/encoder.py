"""log-mel -> audio states, pooled to 40 ms: Whisper's encoder with a pooling layer.

Source: Whisper (arXiv:2212.04356), section 2.2; Qwen2-Audio (arXiv:2407.10759), section 2.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from qwen2audio_jax import layers, spread
from qwen2audio_jax.config import EncoderConfig
from qwen2audio_jax.remat import name

Frames = Int[Array, " C"] | Int[np.ndarray, " C"]


def positions_of(frames: Frames) -> Frames:
    """Encoder positions that a clip of so many mel frames fills."""
    return (frames + 1) // 2


def states_of(frames: Frames) -> Frames:
    """Audio states, and so audio tokens, that a clip of so many mel frames becomes."""
    return positions_of(frames) // 2


def sinusoids(positions: int, width: int) -> Float[np.ndarray, "P E"]:
    """Whisper's fixed position embedding: sines, then cosines."""
    frequencies = np.exp(-np.log(10_000) / (width // 2 - 1) * np.arange(width // 2))
    angles = np.arange(positions)[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


class Attention(nnx.Module):
    """Every position looks at every valid position."""

    def __init__(self, c: EncoderConfig, *, dtype: Any, rngs: nnx.Rngs):
        heads = (c.heads, c.head_width)
        make = lambda bias: layers.Linear(c.width, heads, use_bias=bias, dtype=dtype, rngs=rngs)
        self.query = make(True)
        self.key = make(False)  # Whisper: no bias
        self.value = make(True)
        self.out = layers.Linear(heads, c.width, axis=(-2, -1), dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "C P E"], valid: Bool[Array, "C P"]
    ) -> Float[Array, "C P E"]:
        heads = lambda x, kind: name(spread.constrain(x, "C positions N H"), kind)
        heard = layers.attend(
            heads(self.query(x), "query"),
            heads(self.key(x), "key"),
            heads(self.value(x), "value"),
            # what lies after a clip looks at the clip too, as in the reference
            q_segments=jnp.ones(valid.shape, jnp.int32),
            k_segments=valid.astype(jnp.int32),
        )
        return name(self.out(spread.constrain(heard, "C positions N H")), "out")


class Block(nnx.Module):
    """Attention, then a two-layer MLP, each behind its norm and beside a residual."""

    def __init__(self, c: EncoderConfig, *, dtype: Any, rngs: nnx.Rngs):
        norm = lambda: nnx.LayerNorm(
            c.width, epsilon=c.norm_eps, use_fast_variance=False, param_dtype=dtype, rngs=rngs
        )
        self.attention_norm = norm()
        self.attention = Attention(c, dtype=dtype, rngs=rngs)
        self.mlp_norm = norm()
        self.up = layers.Linear(c.width, c.hidden, dtype=dtype, rngs=rngs)
        self.down = layers.Linear(c.hidden, c.width, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "C P E"], valid: Bool[Array, "C P"]
    ) -> Float[Array, "C P E"]:
        x = spread.constrain(x, "C P E")
        x = spread.constrain(x + self.attention(self.attention_norm(x), valid), "C P E")
        up = name(spread.constrain(self.up(self.mlp_norm(x)), "C positions F"), "up")
        return x + name(self.down(gelu(up)), "down")


@jax.custom_vjp
def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """With the error function, in float32.

    `jax.nn.gelu` takes 1 - erf, which XLA on CPU computes in three passes over memory.
    """
    wide = x.astype(jnp.float32)
    return (wide * (0.5 + 0.5 * jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


def _gelu_backward(x, cotangent):
    """Keeps `x` alone: jax would keep two more arrays as large, and write them going forward."""
    wide = x.astype(jnp.float32)
    density = jnp.exp(-0.5 * wide * wide) * (2 * jnp.pi) ** -0.5
    slope = 0.5 + 0.5 * jax.lax.erf(wide * 0.5**0.5) + wide * density
    return ((cotangent * slope).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


class Encoder(nnx.Module):
    """Two convolutions halve the frames, blocks look around, pooling halves them again."""

    def __init__(
        self, c: EncoderConfig, *, scan: bool = True, dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        self.config = c
        conv = lambda width, stride: nnx.Conv(
            width,
            c.width,
            (3,),
            strides=stride,
            padding=((1, 1),),
            kernel_init=nnx.initializers.he_normal(),
            param_dtype=dtype,
            preferred_element_type=jnp.float32,  # rounded once, as layers.Linear
            rngs=rngs,
        )
        self.conv1 = conv(c.mels, 1)
        self.conv2 = conv(c.width, 2)
        # stored in checkpoints, never trained
        self.positions = nnx.Param(jnp.asarray(sinusoids(c.positions, c.width), dtype))
        self.blocks = layers.stack(
            lambda rngs: Block(c, dtype=dtype, rngs=rngs), c.layers, scan=scan, rngs=rngs
        )
        self.norm = nnx.LayerNorm(
            c.width, epsilon=c.norm_eps, use_fast_variance=False, param_dtype=dtype, rngs=rngs
        )

    def look_nearby(self) -> None:
        """Makes untrained attention local: keys that resemble queries find what resembles them.

        Positions that are near have similar sinusoids. Speech is learned sooner from there than
        from attention that looks everywhere alike.
        """
        for block in self.blocks if isinstance(self.blocks, nnx.List) else [self.blocks]:
            attention = block.attention
            attention.key.kernel[...] = 3 * attention.query.kernel[...]

    def stem(self, mel: Float[Array, "C M T"]) -> Float[Array, "C P E"]:
        """Convolutions and positions: what the first block reads."""
        frames = mel.shape[-1]
        if mel.shape[1] != self.config.mels:
            raise ValueError(f"wanted {self.config.mels} mel bands, got {mel.shape[1]}")
        if frames % 2 or not 4 <= frames <= 2 * self.config.positions:
            raise ValueError(
                f"wanted an even number of frames from 4 to {2 * self.config.positions}, "
                f"got {frames}"
            )
        dtype = self.conv1.kernel.dtype
        x = spread.constrain(jnp.swapaxes(mel, 1, 2).astype(dtype), "C T M")
        for conv in (self.conv1, self.conv2):
            x = gelu(conv(x).astype(dtype))
        return x + self.positions[: x.shape[1]]

    def __call__(
        self, mel: Float[Array, "C M T"], frames: Int[Array, " C"], *, remat: str = "none"
    ) -> Float[Array, "C A E"]:
        """Hears clips.

        Args:
          mel: log-mel, T even. Exact for any T of at least 2 * positions_of(frames) + 2, or the
            full 30 s, as long as the frames after a clip hold what padding to 30 s gives them.
          frames: how many of each clip's frames are sound rather than padding.
          remat: what blocks keep for the backward pass, as in `remat.POLICIES`.

        Returns:
          One state per 40 ms, of which the first states_of(frames) are valid.
        """
        x = self.stem(mel)
        valid = jnp.arange(x.shape[1]) < positions_of(frames)[:, None]
        step = lambda block, x, _: (block(x, valid), None)
        x, _ = layers.run(self.blocks, step, x, None, policy=remat)
        return self.pool(x)

    def pool(self, x: Float[Array, "C P E"]) -> Float[Array, "C A E"]:
        """Means over pairs of positions, then the final norm."""
        pairs = x[:, : x.shape[1] // 2 * 2].reshape(x.shape[0], -1, 2, x.shape[2])
        # halves added: XLA on CPU takes thirty times longer for a mean over so short an axis
        return self.norm(0.5 * pairs[:, :, 0] + 0.5 * pairs[:, :, 1])
