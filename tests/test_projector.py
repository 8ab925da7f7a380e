"""The projector is one affine map from the encoder's width to the decoder's."""

import jax
import jax.numpy as jnp
import numpy as np
import small
from flax import nnx

from qwen2audio_jax.projector import Projector


def test_the_projector_is_affine():
    """Each state by itself: kernel and bias, nothing else."""
    projector = small.shaken(Projector(small.CONFIG, rngs=nnx.Rngs(0)))
    states = np.array(jax.random.normal(jax.random.key(0), (2, 5, 16)))
    wanted = states @ np.array(projector.kernel[...]) + np.array(projector.bias[...])
    assert wanted.shape == (2, 5, 12)
    np.testing.assert_allclose(projector(jnp.asarray(states)), wanted, rtol=1e-5, atol=1e-6)


def test_the_projector_gives_its_own_dtype():
    """bfloat16 parameters and states give bfloat16, which the decoder reads."""
    projector = Projector(small.CONFIG, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert projector(jnp.ones((1, 2, 16), jnp.bfloat16)).dtype == jnp.bfloat16
