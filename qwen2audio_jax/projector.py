"""audio states -> decoder width: one linear layer."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from qwen2audio_jax import layers
from qwen2audio_jax.config import Config


class Projector(layers.Linear):
    """What the encoder heard, in the decoder's terms."""

    def __init__(self, c: Config, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        super().__init__(c.encoder.width, c.decoder.width, dtype=dtype, rngs=rngs)

    def __call__(self, states: Float[Array, "C A E"]) -> Float[Array, "C A D"]:
        return super().__call__(states)
