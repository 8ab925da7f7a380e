"""Strings that end an answer, wherever its tokens part them."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from qwen2audio_jax.processor import Processor


class StopStrings:
    """Watches a batch of answers grow.

    As in the reference, an answer keeps the token that completes a stop string, with whatever
    else that token says. Special tokens are no text, here as in a stream: they end an answer as
    `end_tokens`.

    Attributes:
      stopped: rows that hold one.
    """

    def __init__(self, stop: Sequence[str], processor: Processor | None, rows: int):
        if processor is None:
            raise ValueError(f"stop strings {list(stop)} want processor= to read tokens with")
        self.stop = check(stop)
        self.processor = processor
        self.answers: list[list[int]] = [[] for _ in range(rows)]
        self.stopped: Bool[np.ndarray, " rows"] = np.zeros(rows, bool)
        self.lengths = np.zeros(rows, np.int32)

    def __call__(
        self, tokens: Int[np.ndarray, "rows some"], lengths: Int[np.ndarray, " rows"]
    ) -> Int[np.ndarray, " rows"]:
        """Takes the answers' next tokens and their `lengths` so far, and gives their true ones."""
        for b, answer in enumerate(self.answers):
            if self.stopped[b]:
                continue
            first = len(answer)
            answer.extend(tokens[b, : lengths[b] - first].tolist())
            self.lengths[b] = lengths[b]
            if self._holds(answer):
                ends = (n for n in range(first + 1, len(answer)) if self._holds(answer[:n]))
                self.lengths[b] = next(ends, len(answer))
                self.stopped[b] = True
        return self.lengths.copy()

    def _holds(self, tokens: list[int]) -> bool:
        text = self.processor.decode(tokens)[0]
        return any(stop in text for stop in self.stop)


def check(stop: Sequence[str]) -> tuple[str, ...]:
    """Refuses what cannot stop anything."""
    if isinstance(stop, str) or not all(stop):
        raise ValueError(f"wanted a list of strings to stop at, none of them empty, got {stop!r}")
    return tuple(stop)


def split(text: str, stop: Sequence[str]) -> tuple[str, str, bool]:
    """Parts text into what may be shown, what may yet be the beginning of a stop string, and
    whether there was one, before which the first part ends."""
    found = [at for at in map(text.find, stop) if at >= 0]
    if found:
        return text[: min(found)], "", True
    heads = (stop[:n] for stop in stop for n in range(1, len(stop)))
    held = max((len(head) for head in heads if text.endswith(head)), default=0)
    return text[: len(text) - held], text[len(text) - held :], False
