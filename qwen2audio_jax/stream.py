"""tokens -> text, as they come."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

from qwen2audio_jax.cache import Cache
from qwen2audio_jax.constraint import Choices
from qwen2audio_jax.generate import GREEDY, constrain, decode, listen, prefill, room, unpad
from qwen2audio_jax.model import Qwen2Audio
from qwen2audio_jax.processor import Processor
from qwen2audio_jax.sampling import Sampling, rules_for
from qwen2audio_jax.stop import StopStrings, split


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
) -> Iterator[str]:
    """Answers one prompt piece by piece, with the tokens that `generate` would give.

    Args: as in `generate`.

    Yields:
      Text, in whole characters. All pieces together are the answer up to the first stop string,
      of which no part is shown.

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

    def answer() -> Iterator[str]:
        logits, cache = prefill(model, rows, heard, limit)
        made = decode(
            model, rows, logits, cache, rules, limit, stops=stops, nodes=nodes, paced=True
        )
        yield from read(processor, made, stop)

    return answer()


def read(
    processor: Processor, made: Generator[tuple, None, Cache], stop: Sequence[str]
) -> Generator[str, None, Cache]:
    """Reads what `decode` makes of one row, up to a stop string; returns what `decode` returns."""
    words, held, stopped = processor.detokenizer(), "", False
    while True:
        try:
            tokens, _ = next(made)
        except StopIteration as end:
            if not stopped and (rest := split(held + words.flush(), stop)[:2]) != ("", ""):
                # what was held back turns out to begin no stop string
                yield "".join(rest)
            return end.value
        if stopped:
            continue
        text = held + "".join(map(words, tokens[0].tolist()))
        text, held, stopped = split(text, stop)
        if text:
            yield text
