"""Qwen2Audio: sound and text in, scores of the next word out."""

import contextlib
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from qwen2audio_jax import encoder, merge, spread
from qwen2audio_jax.cache import Cache
from qwen2audio_jax.config import Config
from qwen2audio_jax.decoder import Decoder
from qwen2audio_jax.encoder import Encoder
from qwen2audio_jax.projector import Projector


class Qwen2Audio(nnx.Module):
    """The path encoder -> projector -> merge -> decoder.

    Args:
      config: sizes; `config.preset("tiny")` and others.
      scan_layers: hold each tower's blocks as one stack with a leading layer axis, as training
        does; False holds a list of blocks, which generates faster.
      dtype: of the parameters, and so of the arithmetic between the float32 islands.
      rngs: where random parameters come from.
    """

    def __init__(
        self,
        config: Config,
        *,
        scan_layers: bool = True,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.scan_layers = scan_layers
        self.encoder = Encoder(config.encoder, scan=scan_layers, dtype=dtype, rngs=rngs)
        self.projector = Projector(config, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(config.decoder, scan=scan_layers, dtype=dtype, rngs=rngs)

    @property
    def dtype(self) -> Any:
        return self.projector.kernel.dtype

    def listen(
        self,
        input_features: Float[Array, "C M T"],
        feature_attention_mask: Int[Array, "C T"],
        *,
        remat: str = "none",
    ) -> tuple[Float[Array, "C A D"], Int[Array, " C"]]:
        """What was heard, in the decoder's terms, and how many states of each clip are valid."""
        frames = feature_attention_mask.sum(axis=1).astype(jnp.int32)
        states = self.encoder(input_features, frames, remat=remat)
        return self.projector(states), encoder.states_of(frames)

    def embed(
        self,
        input_ids: Int[Array, "B L"],
        input_features: Float[Array, "C M T"] | None = None,
        feature_attention_mask: Int[Array, "C T"] | None = None,
        *,
        remat: str = "none",
    ) -> Float[Array, "B L D"]:
        """Tokens' embeddings, with what was heard in the place of the audio tokens."""
        if input_features is None:
            return self.decoder.embed(input_ids)
        heard = self.listen(input_features, feature_attention_mask, remat=remat)
        return self.place(input_ids, *heard)

    def place(
        self,
        input_ids: Int[Array, "B L"],
        states: Float[Array, "C A D"],
        counts: Int[Array, " C"],
    ) -> Float[Array, "B L D"]:
        """Tokens' embeddings, with what `listen` gave in the place of the audio tokens."""
        slots = input_ids == self.config.audio_token
        return merge.merge(self.decoder.embed(input_ids), slots, states, counts)

    def hidden(
        self,
        input_ids: Int[Array, "B L"],
        attention_mask: Int[Array, "B L"],
        input_features: Float[Array, "C M T"] | None = None,
        feature_attention_mask: Int[Array, "C T"] | None = None,
        *,
        segment_ids: Int[Array, "B L"] | None = None,
        cache: Cache | None = None,
        remat: str = "none",
    ) -> tuple[Float[Array, "B L D"], Cache | None]:
        """The decoder's last states, from which `decoder.logits` makes scores, and the cache."""
        x = self.embed(input_ids, input_features, feature_attention_mask, remat=remat)
        return self.read(x, attention_mask, segment_ids=segment_ids, cache=cache, remat=remat)

    def read(
        self,
        x: Float[Array, "B L D"],
        attention_mask: Int[Array, "B L"],
        *,
        segment_ids: Int[Array, "B L"] | None = None,
        cache: Cache | None = None,
        remat: str = "none",
    ) -> tuple[Float[Array, "B L D"], Cache | None]:
        """As `hidden`, from merged embeddings.

        Args:
          segment_ids: which sample of a packed row a token belongs to, 1 and up, 0 for padding;
            samples do not see each other, and each is read as if it stood alone.
        """
        mask = attention_mask.astype(jnp.int32)
        positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        if segment_ids is not None:
            mask *= segment_ids
            positions = _restarted(positions, mask)
        if cache is not None:
            positions += cache.segments.sum(axis=1, keepdims=True)
        return self.decoder(x, positions, mask, cache, remat=remat)

    def __call__(
        self,
        input_ids: Int[Any, "B L"],
        attention_mask: Int[Any, "B L"] | None = None,
        input_features: Float[Any, "C M T"] | None = None,
        feature_attention_mask: Int[Any, "C T"] | None = None,
        labels: Int[Any, "B L"] | None = None,
    ) -> Float[Array, "B L V"]:
        """Scores of the next word after every token, in float32.

        Args: what a `Processor` makes, ours or transformers', of numpy's, jax's or torch's
          arrays; the names and shapes are the reference's. `labels` are accepted, so that a
          training batch can be passed whole, and change nothing: `training.loss` reads them.

        Raises:
          ValueError: the audio tokens are not as many as the clips' audio states.
        """
        if attention_mask is None:
            attention_mask = np.ones(input_ids.shape, np.int32)
        ids, mask = as_array(input_ids, np.int32), as_array(attention_mask, np.int32)
        features = as_array(input_features, np.float32)
        feature_mask = as_array(feature_attention_mask, np.int32)
        self.check(ids, feature_mask)
        with self.on_mesh():
            return _logits(self, ids, mask, features, feature_mask)

    def on_mesh(self) -> contextlib.AbstractContextManager:
        """A context in which the compiler knows of the devices that this model is spread over."""
        return spread.on(self.projector.kernel.get_value())

    def check(self, input_ids, feature_attention_mask) -> None:
        """Refuses tokens that do not exist, or more or fewer for audio than states, if it can."""
        if feature_attention_mask is None:
            feature_attention_mask = np.zeros((0, 0), np.int32)
        if merge.concrete(input_ids, feature_attention_mask):
            ids, vocabulary = np.asarray(input_ids), self.config.decoder.vocabulary
            if ids.size and not 0 <= ids.min() <= ids.max() < vocabulary:
                got = f"{ids.min()} to {ids.max()}"
                raise ValueError(f"wanted tokens of a vocabulary of {vocabulary}, got {got}")
            frames = np.asarray(feature_attention_mask).sum(axis=1).astype(np.int32)
            slots = ids == self.config.audio_token
            merge.check(slots, encoder.states_of(frames))

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike,
        *,
        dtype: Any = None,
        mesh: jax.sharding.Mesh | None = None,
        scan_layers: bool = False,
        progress: bool = False,
    ) -> "Qwen2Audio":
        """Loads `"tiny"`, a folder in Hugging Face's format or in ours, or a hub id.

        Args:
          dtype: of the parameters, float32, bfloat16 or float16; None: float32 on CPUs, bfloat16
            elsewhere.
          mesh: spread the parameters over these devices; `sharding.mesh` makes one.
          scan_layers: as in the constructor.
          progress: show a progress bar.

        Raises:
          ValueError: nothing is there, or what is there is not a whole model; the message names
            every tensor that is unknown, missing, of the wrong shape or cut short. Or `dtype` or
            `mesh` is none that the model can have.
        """
        from qwen2audio_jax import weights  # weights know the model, not the model them

        return weights.load(
            source, dtype=dtype, mesh=mesh, scan_layers=scan_layers, progress=progress
        )

    def save_pretrained(self, folder: str | os.PathLike, *, progress: bool = False) -> None:
        """Writes config and weights in Hugging Face's format, which transformers loads.

        Raises:
          ValueError: `folder` is one of ours, or the format has no name for a parameter's dtype.
        """
        from qwen2audio_jax import weights

        weights.save(self, folder, progress=progress)


def as_array(x: Any, dtype: Any) -> jax.Array | np.ndarray | None:
    """Takes an array from outside, torch's say, in the type that was compiled for; jax's stay."""
    return x if x is None or isinstance(x, jax.Array) else np.asarray(x, dtype)


def _restarted(positions: Int[Array, "B L"], segments: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """Positions counted from the start of each segment."""
    starts = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return positions - jax.lax.cummax(jnp.where(starts, positions, 0), axis=1)


@jax.jit
def _logits(model, input_ids, attention_mask, input_features, feature_attention_mask):
    x, _ = model.hidden(input_ids, attention_mask, input_features, feature_attention_mask)
    return model.decoder.logits(x)
