"""merged embeddings -> logits: Qwen2's decoder.

Source: Qwen2 (arXiv:2407.10671), section 2.2; the 7B of Qwen2-Audio has Qwen-7B's geometry.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from qwen2audio_jax import layers, spread
from qwen2audio_jax.cache import Cache
from qwen2audio_jax.config import DecoderConfig
from qwen2audio_jax.remat import name


class Attention(nnx.Module):
    """Every token looks at itself and at what came before it in its segment."""

    def __init__(self, c: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.config = c
        make = lambda heads: layers.Linear(c.width, (heads, c.head_width), dtype=dtype, rngs=rngs)
        self.query = make(c.heads)
        self.key = make(c.kv_heads)
        self.value = make(c.kv_heads)
        self.out = nnx.LinearGeneral(
            (c.heads, c.head_width),
            c.width,
            axis=(-2, -1),
            use_bias=False,
            param_dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, x, positions, segments, past, cache):
        """Returns what was seen, and `past` with the tokens' own keys and values written."""
        theta = self.config.rope_theta
        heads = lambda x, letters, kind: name(spread.constrain(x, letters), kind)
        q = heads(layers.rotate(self.query(x), positions, theta), "B L N H", "query")
        k = heads(layers.rotate(self.key(x), positions, theta), "B slots K H", "key")
        v = heads(self.value(x), "B slots K H", "value")
        if cache is None:
            k_segments, offset = segments, 0
        else:
            write = lambda into, x: jax.lax.dynamic_update_slice_in_dim(
                into, x.astype(into.dtype), cache.length, axis=1
            )
            k, v = past = (write(past[0], k), write(past[1], v))
            k_segments, offset = write(cache.segments, segments), cache.length
            k, v = past = tuple(spread.constrain(x, "B slots K H") for x in past)
        seen = layers.attend(q, k, v, q_segments=segments, k_segments=k_segments, offset=offset)
        return name(self.out(spread.constrain(seen, "B L N H")), "out"), past


class Block(nnx.Module):
    """Attention, then a gated MLP, each behind its norm and beside a residual."""

    def __init__(self, c: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.attention_norm = layers.RMSNorm(c.width, c.norm_eps, dtype=dtype)
        self.attention = Attention(c, dtype=dtype, rngs=rngs)
        self.mlp_norm = layers.RMSNorm(c.width, c.norm_eps, dtype=dtype)
        self.mlp = layers.GatedMLP(c.width, c.hidden, dtype=dtype, rngs=rngs)

    def __call__(self, x, positions, segments, past=None, cache=None):
        x = spread.constrain(x, "B L D")
        seen, past = self.attention(self.attention_norm(x), positions, segments, past, cache)
        x = spread.constrain(x + seen, "B L D")
        return x + self.mlp(self.mlp_norm(x)), past


class Decoder(nnx.Module):
    """Reads embeddings from left to right and says what it expects next."""

    def __init__(
        self, c: DecoderConfig, *, scan: bool = True, dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        self.config = c
        table = lambda: nnx.Embed(
            c.vocabulary,
            c.width,
            embedding_init=nnx.initializers.normal(c.width**-0.5),
            param_dtype=dtype,
            rngs=rngs,
        )
        self.embedding = table()
        self.blocks = layers.stack(
            lambda rngs: Block(c, dtype=dtype, rngs=rngs), c.layers, scan=scan, rngs=rngs
        )
        self.norm = layers.RMSNorm(c.width, c.norm_eps, dtype=dtype)
        if not c.tied:
            self.head = table()

    def embed(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        # not called: it would widen a table that was cast to what it was made in
        x = layers.look_up(self.embedding.embedding[...], tokens)
        # looked up where the table's columns are, then brought to the rows: else all of it moves
        x = spread.constrain(x, "B L D", D=("fsdp", "context"))
        return spread.constrain(x, "B L D")

    def __call__(
        self,
        x: Float[Array, "B L D"],
        positions: Int[Array, "B L"],
        segments: Int[Array, "B L"],
        cache: Cache | None = None,
        *,
        remat: str = "none",
    ) -> tuple[Float[Array, "B L D"], Cache | None]:
        """Reads `x`, after what the cache holds.

        Args:
          x: merged embeddings.
          positions: each token's distance from the start of its segment.
          segments: 0 for padding, 1 and up for the samples of a row; tokens see their own
            segment only.
          cache: the past, with room for L more; None: there is none, and none is kept.
          remat: what blocks keep for the backward pass, as in `remat.POLICIES`.

        Returns:
          The last block's output, normed, and the cache with these tokens in it.
        """
        past = None if cache is None else cache.layers
        step = lambda block, x, past: block(x, positions, segments, past, cache)
        x, past = layers.run(self.blocks, step, x, past, policy=remat)
        if cache is not None:
            cache = Cache(
                layers=past,
                segments=jax.lax.dynamic_update_slice_in_dim(
                    cache.segments, segments, cache.length, axis=1
                ),
                length=cache.length + x.shape[1],
            )
        return self.norm(spread.constrain(x, "B L D")), cache

    def logits(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Scores of every word, in float32."""
        return jnp.einsum("...D,VD->...V", x, self.table, preferred_element_type=jnp.float32)

    @property
    def table(self) -> Float[Array, "V D"]:
        """What the last states are compared with."""
        return (self.embedding if self.config.tied else self.head).embedding[...]
