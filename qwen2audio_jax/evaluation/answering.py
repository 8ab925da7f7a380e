"""Prompts of any number and length -> answers, in batches of what is alike."""

import itertools
from collections.abc import Iterable, Sequence

from qwen2audio_jax.data.example import Example
from qwen2audio_jax.generate import generate
from qwen2audio_jax.model import Qwen2Audio
from qwen2audio_jax.processor import Processor


def answer(
    model: Qwen2Audio,
    processor: Processor,
    examples: Sequence[Example],
    choices: Sequence[Sequence[str] | None],
    *,
    rows: int,
    max_new_tokens: int,
) -> list[str]:
    """Answers each prompt greedily, in its own words or with one of its choices.

    Args:
      choices: for each example, all that its answer can be; None where there is no end of it.
      rows: prompts that are answered at the same time.
      max_new_tokens: of the longest answer in the model's own words; no choice is too long.

    Returns:
      What is said to each up to its end, special tokens included, in the order of the examples.
    """
    is_open = lambda i: choices[i] is None
    size = lambda i: (len(examples[i].waves), sum(map(len, examples[i].waves)))
    ends = {*model.config.end_tokens, model.config.pad_token, processor.tokenizer.pad_id}
    answers: dict[int, str] = {}
    order = sorted(range(len(examples)), key=lambda i: (is_open(i), size(i)))
    for alike, group in itertools.groupby(order, key=is_open):
        group = list(group)
        for some in (group[i : i + rows] for i in range(0, len(group), rows)):
            closed = None if alike else [list(choices[i]) for i in some]
            batch = processor.batch(
                [examples[i].prompt for i in some],
                [wave for i in some for wave in examples[i].waves],
            )
            tokens = generate(
                model,
                batch,
                max_new_tokens=max(max_new_tokens, longest(closed or (), processor)),
                choices=closed,
                processor=processor,
            )
            for i, row in zip(some, tokens.tolist(), strict=True):
                said = list(itertools.takewhile(lambda token: token not in ends, row))
                answers[i] = processor.decode([said], False)[0].strip()
    return [answers[i] for i in range(len(examples))]


def longest(closed: Iterable[Sequence[str]], processor: Processor) -> int:
    """Tokens of the longest of all choices, and its end; 0 of none."""
    texts = {text for texts in closed for text in texts}
    return max((len(processor.tokenizer.encode(text)) + 1 for text in texts), default=0)
