"""tokens -> text, as they come."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

from qwen2audio_jax.cache import Cache
from qwen2audio_jax.constraint import Choices
from qwen2audio_jax.generate import GREEDY, constrain, decode, listen, prefill, room, unpad
from qwen2audio_jax.model import Qwen2Audio
from qwen2audio_jax.processor import Processor
from qwen2audio_jax.sampling import Sampling, rules_for
from qwen2audio_jax.stop import StopStrings, split


class Pieces(Iterator[str]):
    """An answer's text as it comes, in whole characters.

    Attributes:
      tokens: what has been made so far, special ones too.
    """

    def __init__(self, make: Callable[[list[int]], Iterator[str]], ends: Sequence[int], limit: int):
        self.tokens: list[int] = []
        self._ends, self._limit, self._pieces = frozenset(ends), limit, make(self.tokens)

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def cut(self) -> bool:
        """Whether the answer is as long as it may be, and words may be missing."""
        return len(self.tokens) >= self._limit and self._ends.isdisjoint(self.tokens)


def stream(
    model: Qwen2Audio,
    processor: Processor,
    inputs: Mapping[str, Any],
    *,
    max_new_tokens: int | None = None,
    min_new_tokens: int = 0,
    sampling: Sampling = GREEDY,
    end_tokens: Sequence[int] | None = None,
    stop: Sequence[str] = (),
    choices: Choices | None = None,
) -> Pieces:
    """Answers one prompt piece by piece, with the tokens that `generate` would give.

    Args: as in `generate`.

    Returns:
      The pieces. All together are the answer up to the first stop string, of which no part is
      shown.

    Raises:
      ValueError: as in `generate`; also for more than one prompt.
    """
    rows = unpad(inputs)
    if len(rows) != 1:
        raise ValueError(f"wanted one prompt to stream an answer to, got {len(rows)}")
    limit = room(model, rows, max_new_tokens)
    rules = rules_for(model.config, sampling, min_new_tokens=min_new_tokens, end_tokens=end_tokens)
    rules, nodes = constrain(rules, choices, processor, 1, min_new_tokens, limit)
    stops = StopStrings(stop, processor, 1) if stop else None
    heard = listen(model, inputs)

    def answer(tokens: list[int]) -> Iterator[str]:
        logits, cache = prefill(model, rows, heard, limit)
        made = decode(
            model, rows, logits, cache, rules, limit, stops=stops, nodes=nodes, paced=True
        )
        yield from read(processor, made, stop, tokens)

    return Pieces(answer, model.config.end_tokens if end_tokens is None else end_tokens, limit)


def read(
    processor: Processor,
    made: Generator[tuple, None, Cache],
    stop: Sequence[str],
    taken: list[int],
) -> Generator[str, None, Cache]:
    """Reads what `decode` makes of one row, up to a stop string; returns what `decode` returns.

    Args:
      taken: gets every token that is made.
    """
    words, held, stopped = processor.detokenizer(), "", False
    while True:
        try:
            tokens, _ = next(made)
        except StopIteration as end:
            if not stopped and (rest := split(held + words.flush(), stop)[:2]) != ("", ""):
                # what was held back turns out to begin no stop string
                yield "".join(rest)
            return end.value
        taken.extend(tokens[0].tolist())
        if stopped:
            continue
        text = held + "".join(map(words, tokens[0].tolist()))
        text, held, stopped = split(text, stop)
        if text:
            yield text
