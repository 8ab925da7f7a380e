"""What training minimises."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qwen2audio_jax.decoder import Decoder
from qwen2audio_jax.model import Qwen2Audio

IGNORED = -100  # the label of a token that is given rather than learned, as in PyTorch
CHUNK = 1024  # tokens whose logits exist at the same time


def next_token(
    model: Qwen2Audio, batch: Mapping[str, Any], *, remat: bool = False
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Cross entropy of every learned token given what comes before it, in float32.

    Args:
      batch: what a `Processor` makes with `labels=True`, padded right.
      remat: recompute each block in the backward pass rather than keep its activations.

    Returns:
      The mean over learned tokens, and what to log: `tokens` learned, `accuracy` of the likeliest.
    """
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    x, _ = model.hidden(**inputs, remat=remat)
    learned = (batch["labels"] != IGNORED) & (batch["attention_mask"] == 1)
    labels = jnp.where(learned, batch["labels"], IGNORED)[:, 1:]
    nll, hits = token_losses(model.decoder, x[:, :-1], labels)
    tokens = (labels != IGNORED).sum()
    mean = lambda total: total / jnp.maximum(tokens, 1)
    return mean(nll.sum()), {"tokens": tokens, "accuracy": mean(hits.sum())}


def token_losses(
    decoder: Decoder, x: Float[Array, "B L D"], labels: Int[Array, "B L"]
) -> tuple[Float[Array, "B L"], Int[Array, "B L"]]:
    """Each label's negative log-probability, and whether it was the likeliest; 0 where ignored.

    Logits exist for `CHUNK` tokens at a time, forward and backward: [B L V] is never held.
    """
    tokens = labels.size
    chunks = -(-tokens // CHUNK)
    size = -(-tokens // chunks)
    pad = chunks * size - tokens
    x = jnp.pad(x.reshape(tokens, -1), ((0, pad), (0, 0))).reshape(chunks, size, -1)
    flat = jnp.pad(labels.ravel(), (0, pad), constant_values=IGNORED).reshape(chunks, size)

    @jax.checkpoint
    def one(chunk):
        x, labels = chunk
        logits = decoder.logits(x)
        kept = labels != IGNORED
        wanted = jnp.take_along_axis(logits, jnp.where(kept, labels, 0)[:, None], axis=1)[:, 0]
        nll = jax.nn.logsumexp(logits, axis=1) - wanted
        hit = logits.argmax(axis=1) == labels
        return jnp.where(kept, nll, 0), (kept & hit).astype(jnp.int32)

    nll, hits = jax.lax.map(one, (x, flat))
    unpad = lambda x: x.ravel()[:tokens].reshape(labels.shape)
    return unpad(nll), unpad(hits)
