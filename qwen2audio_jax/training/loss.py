"""What training minimises."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from qwen2audio_jax.decoder import Decoder
from qwen2audio_jax.model import Qwen2Audio
from qwen2audio_jax.processor import IGNORED

INPUTS = ("input_ids", "attention_mask", "input_features", "feature_attention_mask")
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
    inputs = {name: batch[name] for name in INPUTS if name in batch}
    x, _ = model.hidden(**inputs, remat=remat)
    return _mean_over_learned(model, x, batch)


def next_token_and_words(
    model: Qwen2Audio, batch: Mapping[str, Any], *, weight: float = 0.3, remat: bool = False
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """`next_token`, helped by CTC: the audio states alone should spell each clip's words.

    A decoder that starts from nothing first learns to guess without listening; until what is heard
    resembles words, listening does not pay. CTC through the decoder's own vocabulary makes the
    encoder's states resemble words from the start, with no parameter more.

    Args:
      batch: as in `next_token`, with `words` [C, N]: each clip's words, IGNORED behind them.
      weight: of CTC's mean over words, beside the mean over learned tokens.

    Returns:
      As `next_token`; its metrics have `ctc` too.

    Source: Graves et al. 2006, Connectionist Temporal Classification.
    """
    states, counts = model.listen(
        batch["input_features"], batch["feature_attention_mask"], remat=remat
    )
    x, _ = model.read(
        model.place(batch["input_ids"], states, counts), batch["attention_mask"], remat=remat
    )
    value, metrics = _mean_over_learned(model, x, batch)
    words = batch["words"]
    behind = jnp.arange(states.shape[1]) >= counts[:, None]
    losses = optax.ctc_loss(
        model.decoder.logits(states),
        behind.astype(jnp.float32),
        jnp.where(words == IGNORED, 0, words),
        (words == IGNORED).astype(jnp.float32),
        blank_id=model.config.pad_token,
    )
    ctc = losses.sum() / jnp.maximum((words != IGNORED).sum(), 1)
    return value + weight * ctc, {**metrics, "ctc": ctc}


def _mean_over_learned(model, x, batch):
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
