"""What a model in training makes of samples it never learns: its loss, and its answers."""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from qwen2audio_jax.data.example import BadSample, Example, Pair
from qwen2audio_jax.data.mixture import Mixture
from qwen2audio_jax.evaluation import metrics
from qwen2audio_jax.generate import generate
from qwen2audio_jax.model import Qwen2Audio
from qwen2audio_jax.processor import Processor
from qwen2audio_jax.training import inputs
from qwen2audio_jax.training.inputs import HeldOut
from qwen2audio_jax.training.loss import Sums


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """A prompt, answered."""

    part: str
    wanted: str
    got: str
    rejected: str | None = None  # of a preference pair


def losses(parts: Sequence[HeldOut], mixture: Mixture, measure: Callable[[Any], Sums]) -> dict:
    """What `measure` adds up to over all samples that can be used."""
    total = None
    for each in parts:
        for batch in inputs.once(each.part, mixture):
            sums = measure(batch)
            total = sums if total is None else total + sums
    means = {} if total is None else total.means()
    counts = ("tokens", "pairs")
    return {name: float(x) for name, x in means.items() if name not in counts}


def answers(
    model: Qwen2Audio,
    processor: Processor,
    parts: Sequence[HeldOut],
    *,
    rows: int,
    max_new_tokens: int,
) -> tuple[list[Answer], dict[str, int]]:
    """Answers every prompt greedily; where answers are of a closed set, with one of it.

    Returns:
      The answers, and how many samples could not be used, by reason.
    """
    found, bad = [], collections.Counter()
    for each in parts:
        samples = list(_samples(each, processor, bad))
        for start in range(0, len(samples), rows):
            some = samples[start : start + rows]
            given, _, sets = zip(*some, strict=True)
            batch = processor.batch(
                [example.prompt for example in given],
                [wave for example in given for wave in example.waves],
            )
            tokens = generate(
                model,
                batch,
                max_new_tokens=max_new_tokens,
                choices=None if None in sets else list(sets),
                processor=processor,
            )
            for (_, answer, _), got in zip(some, processor.decode(tokens), strict=True):
                found.append(dataclasses.replace(answer, got=got.strip()))
    return found, dict(bad)


def _samples(
    each: HeldOut, processor: Processor, bad: collections.Counter
) -> Iterator[tuple[Example, Answer, list[str] | None]]:
    for row in range(len(each.part.source)):
        try:
            sample = each.part.source[row]
            example = each.part.compile(sample, processor)
            choices = each.choices(sample)
        except BadSample as error:
            bad[error.reason] += 1
            continue
        given, wanted = inputs.prompt_and_answer(example, processor)
        rejected = None
        if isinstance(example, Pair):
            rejected = inputs.text_of(example.rejected, processor)
        yield given, Answer(part=each.part.name, wanted=wanted, got="", rejected=rejected), choices


def scores(answers: Sequence[Answer]) -> dict[str, float]:
    """Exact matches and word error rates, over all and, named with a slash, by part."""
    by_part = collections.defaultdict(list)
    for answer in answers:
        by_part[answer.part].append(answer)
    found = _scores(answers) if answers else {}
    if len(by_part) > 1:
        for part, some in by_part.items():
            found |= {f"{part}/{name}": value for name, value in _scores(some).items()}
    return found


def _scores(answers: Sequence[Answer]) -> dict[str, float]:
    share = lambda hits: sum(hits) / len(answers)
    found = {"exact_match": share([each.got == each.wanted for each in answers])}
    if answers[0].rejected is not None:
        found["rejected_match"] = share([each.got == each.rejected for each in answers])
    errors = [metrics.word_errors(each.wanted, each.got) for each in answers]
    if words := sum(count for _, count in errors):
        found["wer"] = sum(edits for edits, _ in errors) / words
    return found
