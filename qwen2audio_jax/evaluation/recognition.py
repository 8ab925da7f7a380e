"""How well a model recognises short clips: what it heard, and its word error rate."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from qwen2audio_jax import prompt
from qwen2audio_jax.audio import SAMPLE_RATE
from qwen2audio_jax.evaluation import metrics
from qwen2audio_jax.generate import generate
from qwen2audio_jax.model import Qwen2Audio
from qwen2audio_jax.processor import Processor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """A set of clips, heard."""

    references: tuple[str, ...]
    heard: tuple[str, ...]

    @property
    def clips(self) -> int:
        return len(self.references)

    @property
    def word_error_rate(self) -> float:
        return metrics.word_error_rate(self.references, self.heard)


def score(
    model: Qwen2Audio,
    processor: Processor,
    waves: Sequence[Float[np.ndarray, " _"]],
    references: Sequence[str],
    *,
    batch: int = 50,
    language: str = "en",
    max_new_tokens: int = 32,
) -> Score:
    """Transcribes greedily with the authors' prompt for recognition, and compares.

    Args:
      waves: clips of at most 30 s, mono at 16 kHz.
      references: what is said in each.
    """
    order = sorted(range(len(waves)), key=lambda i: len(waves[i]))  # less padding in a batch
    heard = [""] * len(waves)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        inputs = processor(
            text=[prompt.transcription(language)] * len(chosen),
            audio=[(waves[i], SAMPLE_RATE) for i in chosen],
        )
        texts = processor.decode(generate(model, inputs, max_new_tokens=max_new_tokens))
        for i, text in zip(chosen, texts, strict=True):
            heard[i] = text.strip()
    return Score(references=tuple(references), heard=tuple(heard))
