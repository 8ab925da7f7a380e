"""How much arithmetic a step of training needs, and how much a device could do (MFU).

Counted are the model's own multiplications and additions over what is valid: padding, and blocks
that are computed again to save memory, are no use and count for nothing.

Source: PaLM (arXiv:2204.02311), appendix B.
"""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from qwen2audio_jax.config import Config, DecoderConfig
from qwen2audio_jax.processor import IGNORED
from qwen2audio_jax.training.chips import CHIPS
from qwen2audio_jax.training.optimizer import PARTS

# Dense bfloat16 operations per second, by how jax calls the device.
PEAKS = {
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
    "TPU v5e": CHIPS["v5e"].flops,  # before "TPU v5", which v5p is called
    **{chip.kind: chip.flops / chip.cores for chip in CHIPS.values()},
    "TPU v6": CHIPS["v6e"].flops,
}


def peak(dtype: str) -> float | None:
    """What all devices could do in a second; None where that is not known."""
    kind = jax.devices()[0].device_kind
    known = [rate for name, rate in PEAKS.items() if kind.startswith(name)]
    return known[0] * jax.device_count() if known and dtype == "bfloat16" else None


def of_step(
    config: Config,
    batch: Mapping[str, Any],
    trained: Collection[str],
    *,
    adapters: bool = False,
    reference: bool = False,
) -> float:
    """Operations of one step on a batch.

    Args:
      batch: of numpy's arrays.
      trained: of the parts "encoder", "projector", "decoder" and "embeddings".
      adapters: whether narrow matrices are trained in their place, whose own work is left out.
      reference: whether a second model reads the batch too.
    """
    (encoder, projector), read, head = forward(config, batch)
    # Gradients reach down to the lowest part that trains; those of weights cost as much again.
    own = {part: 1 + (part in trained and not adapters) for part in PARTS}
    hears = "encoder" in trained
    below = hears or "projector" in trained
    reads = bool(trained)
    total = (
        encoder * (own["encoder"] + hears)
        + projector * (own["projector"] + below)
        + read * (own["decoder"] + reads)
        + head * (own["embeddings"] + reads)
    )
    return float(total + reference * (encoder + projector + read + head))


def forward(config: Config, batch: Mapping[str, Any]) -> tuple[tuple[float, float], float, float]:
    """Operations to hear (encoder, projector), to read, and to foresee the learned tokens."""
    e, d = config.encoder, config.decoder
    frames = np.asarray(batch.get("feature_attention_mask", np.zeros((0, 1))))
    frames = frames.reshape(-1, frames.shape[-1]).sum(axis=1).astype(np.float64)
    positions = frames // 2
    stem = 2 * 3 * e.width * (frames * e.mels + positions * e.width)
    block = 2 * positions * e.width * (4 * e.width + 2 * e.hidden) + 4 * positions**2 * e.width
    encoder = (stem + e.layers * block).sum()
    projector = (2 * (positions // 2) * e.width * d.width).sum()

    lengths, learned = [np.zeros(0)], 0
    for side in ("", "chosen_", "rejected_"):
        if f"{side}input_ids" in batch:
            lengths.append(segments(batch, side))
            learned += int((np.asarray(batch[f"{side}labels"]) != IGNORED).sum())
    tokens = np.concatenate(lengths).astype(np.float64)
    wide = d.heads * d.head_width
    attention = 2 * tokens**2 * wide  # half of the scores are in the future
    read = (d.layers * (2 * tokens * _weights(d) + attention)).sum()
    return (encoder, projector), read, 2.0 * learned * d.width * d.vocabulary


def of_token(d: DecoderConfig, past: int) -> float:
    """Operations to say one more token after `past` others."""
    return 2.0 * (d.layers * _weights(d) + d.width * d.vocabulary) + of_past(d, past)


def of_past(d: DecoderConfig, past: int) -> float:
    """Of these, the operations of attention to the others."""
    return 4.0 * d.layers * d.heads * d.head_width * past


def _weights(d: DecoderConfig) -> int:
    """Of a block of the decoder, those that a token is multiplied with."""
    wide = d.heads * d.head_width
    return d.width * (2 * wide + 2 * d.kv_heads * d.head_width + 3 * d.hidden)


def segments(batch: Mapping[str, Any], side: str = "") -> Int[np.ndarray, " samples"]:
    """How long each sample of a batch is, in tokens."""
    mask = np.asarray(batch[f"{side}attention_mask"])
    numbers = mask * np.asarray(batch.get(f"{side}segment_ids", 1))
    rows = numbers.reshape(-1, numbers.shape[-1])
    counts = [np.bincount(row)[1:] for row in rows]
    lengths = np.concatenate(counts)
    return lengths[lengths > 0]
