"""What a model in training makes of samples it never learns: its loss, and its answers.

Of several hosts the first reads the samples for all: what one of them alone could not read would
part them.
"""

import collections
import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from qwen2audio_jax.data.example import Example, Pair, why
from qwen2audio_jax.data.mixture import Mixture
from qwen2audio_jax.data.sources import where
from qwen2audio_jax.evaluation import answering, metrics
from qwen2audio_jax.model import Qwen2Audio
from qwen2audio_jax.processor import Processor
from qwen2audio_jax.prompt import IM_END, PAD
from qwen2audio_jax.training import hosts, inputs
from qwen2audio_jax.training.inputs import HeldOut
from qwen2audio_jax.training.loss import Sums

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """A prompt, answered."""

    part: str
    row: str  # the file it is from, and where in it
    wanted: str
    got: str
    rejected: str | None = None  # of a preference pair


def check_best(best: str, parts: Sequence[HeldOut], *, pairs: bool, ctc: bool) -> None:
    """Refuses to keep the best checkpoint by a figure that is never measured.

    Raises:
      ValueError: the message says which are.
    """
    answered = ["wer", "exact_match", *["rejected_match"] * pairs]
    figures = ["loss", "accuracy", *answered]
    figures += ["nll", "rewards/margins"] if pairs else ["ctc"] * ctc
    if len(parts) > 1:  # of one, all is its own
        figures += [f"{each.part.name}/{figure}" for each in parts for figure in answered]
    if best not in figures:
        raise ValueError(f"wanted a loop.best of {', '.join(figures)}, got {best!r}")


def losses(parts: Sequence[HeldOut], mixture: Mixture, measure: Callable[[Any], Sums]) -> dict:
    """What `measure` adds up to over all samples that can be used."""
    total = None
    for each in parts:
        for batch in hosts.each_by_first(_usable(each, mixture)):
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
    positions = model.config.decoder.positions
    for each in parts:
        samples, left_out = hosts.by_first(
            functools.partial(_samples, each, processor, positions, max_new_tokens)
        )
        bad += left_out
        given, answers, choices = zip(*samples, strict=True) if samples else ((), (), ())
        told = answering.answer(
            model, processor, given, choices, rows=rows, max_new_tokens=max_new_tokens
        )
        found += map(lambda answer, got: dataclasses.replace(answer, got=got), answers, told)
    return found, dict(bad)


def _usable(each: HeldOut, mixture: Mixture) -> Iterator[dict[str, Any]]:
    # a few samples: a process for them would take longer to start
    batches = inputs.once(each.part, dataclasses.replace(mixture, workers=0))
    while True:
        try:
            batch = next(batches, None)
        except ValueError as error:  # none of its samples is of use: no reason to end a training
            if mixture.fatal:
                raise
            _log.warning(f"{each.part.name} is not measured: {error}")
            return
        if batch is None:
            return
        yield batch


def _samples(
    each: HeldOut, processor: Processor, positions: int, max_new_tokens: int
) -> tuple[list[tuple[Example, Answer, list[str] | None]], collections.Counter]:
    """What can be answered, of prompts that leave room for an answer, or for the longest choice of
    the part; the rest is told, and counted by reason. What cannot be answered in full is told."""
    found, mute, told = [], 0, collections.defaultdict(list)
    for row in range(len(each.part.source)):
        try:
            sample = each.part.read(row)
            example = each.part.compile(sample, processor)
            choices = each.choices(sample)
            given, wanted = prompt_and_answer(example, processor)
            if not given.prompt:  # plain text: there is nothing to answer, and a loss to measure
                mute += 1
                continue
        except Exception as error:  # as when it is trained on
            reason, message = why(error)
            told[reason].append(f"{where(each.part.source, row)}: {message}")
            continue
        rejected = None
        if isinstance(example, Pair):
            rejected = text_of(example.rejected, processor)
        place = where(each.part.source, row)
        what = {"wanted": wanted, "got": "", "rejected": rejected}
        answer = Answer(part=each.part.name, row=place, **what)
        found.append((row, given, answer, choices))
    closed = answering.longest((choices for *_, choices in found if choices), processor)
    fitting = []
    for row, given, answer, choices in found:
        tokens = sum(len(segment.ids) for segment in given.prompt)
        room = positions - max(max_new_tokens, closed if choices else 0)
        if tokens > room:
            message = f"wanted a prompt of {room} tokens, got {tokens}"
            told["too long"].append(f"{where(each.part.source, row)}: {message}")
        else:
            fitting.append((given, answer, choices))
    if mute:
        _log.warning(f"{each.part.name}: {mute} without a prompt are measured, not answered")
    for reason, messages in told.items():
        _log.warning(f"{each.part.name}: {len(messages)} {reason}, the last: {messages[-1]}")
    lengths = [
        len(processor.tokenizer.encode(answer.wanted)) + 1
        for _, answer, choices in fitting
        if not choices
    ]
    if cut := [length for length in lengths if length > max_new_tokens]:
        _log.warning(
            f"{each.part.name}: {len(cut)} of {len(fitting)} answers will be cut short, and scored "
            f"so: wanted --evaluation.max-new-tokens of {max(cut)}, got {max_new_tokens}"
        )
    return fitting, collections.Counter(
        {reason: len(messages) for reason, messages in told.items()}
    )


def prompt_and_answer(example: Example | Pair, processor: Processor) -> tuple[Example, str]:
    """What is given, up to the last answer; and that answer, or the one to be preferred."""
    if isinstance(example, Pair):
        given, answer = example.prompt, example.chosen
    else:
        learned = [segment.learned for segment in example.prompt]
        end = len(learned) - learned[::-1].index(True)
        start = end - [*learned[:end][::-1], False].index(False)
        given, answer = example.prompt[:start], example.prompt[start:end]
    heard = sum(segment.clip is not None for segment in given)  # others follow the answer
    return Example(given, example.waves[:heard]), text_of(answer, processor)


def text_of(prompt: Sequence[Any], processor: Processor) -> str:
    """What is learned at once, its tags too, without the token that ends it: of an answer of
    several turns the first."""
    first = itertools.takewhile(lambda segment: segment.learned, prompt)
    ids = [token for segment in first for token in segment.ids]
    text = processor.decode(np.array([ids], np.int32), False)[0].strip()
    return text.removesuffix(PAD).removesuffix(IM_END).strip()


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
