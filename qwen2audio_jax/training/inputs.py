"""Sources by name -> what a mixture draws from, and what is asked of held-out samples."""

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qwen2audio_jax.data.batches import Batches, left_out, tell
from qwen2audio_jax.data.chats import (
    from_messages,
    from_preference,
    is_conversation,
    is_pair,
    says_words,
)
from qwen2audio_jax.data.example import why
from qwen2audio_jax.data.instruction import Task
from qwen2audio_jax.data.mixture import Mixture, Part
from qwen2audio_jax.data.pack import Bad
from qwen2audio_jax.data.sources import Manifest, RandomAccess, open_source, where
from qwen2audio_jax.prompt import IM_END, PAD, Tokenizer
from qwen2audio_jax.training.data_config import TFDS, WORLD, DataConfig, each_of

MADE = 10**6  # samples that a made world tells apart
LOOKED = 50  # rows of a source that tell what all are
HOW = "convert.from_parts --tokenizer begins a model with one that has them"
SEARCHED = 1000  # rows with clips in them that are read for one of a kind

_log = logging.getLogger(__name__)

Choices = Callable[[Mapping], list[str] | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Samples to measure with, and what their answers are chosen from."""

    part: Part
    choices: Choices
    rows: str = ""  # which they are: another choice of a source is called otherwise


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Some samples of a source, always the same, in its order: rows may be sorted, or recur."""

    source: RandomAccess
    count: int  # at most

    def __len__(self) -> int:
        return min(self.count, len(self.source))

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.source[self._rows[index]]

    def where(self, index: int) -> str:
        return where(self.source, self._rows[index])

    @functools.cached_property
    def _rows(self) -> list[int]:
        rng = np.random.default_rng(0)
        return sorted(rng.choice(len(self.source), len(self), replace=False).tolist())


def training(data: DataConfig, *, pairs: bool = False, words: bool = False) -> tuple[Part, ...]:
    """What is learned from.

    Args:
      pairs: whether it is pairs of answers, rather than tasks and conversations.
      words: whether it is to say what is said in clips, for CTC.

    Raises:
      ValueError, OSError: a source, or a line, is not what it should be.
    """
    if not data.train:
        raise ValueError("nothing to train on: wanted --data.train SOURCE")
    made = any(spec.startswith(WORLD) for spec in data.train)
    if data.style != "prompt" and not made and not any(data.tasks):
        raise ValueError(
            f"data.style {data.style} is of tasks: wanted --data.tasks, got conversations, or "
            "pairs, alone"
        )
    weights = data.weights or [1.0] * len(data.train)
    found, said = [], False
    shares = data.augmented_each, data.masked_each
    given = (each_of(data.train, each) for each in (data.tasks, data.tags, *shares))
    each = zip(data.train, *given, weights, strict=True)
    for spec, line, tags, augmented, masked, weight in each:
        parts = [each.part for each in _open(spec, line, tags, data, pairs)]
        said = (words and _says_words(spec, line, parts[0])) or said  # each is looked at
        share = weight / sum(part.weight for part in parts)
        found += [
            dataclasses.replace(
                part,
                weight=part.weight * share,
                augmented=augmented * part.augmented,
                masked=masked,
                how=data.augmentation,
            )
            for part in parts
        ]
    if words and not said:
        how = "by [AUDIO:audio,words=FIELD] or beside a conversation's clips"
        raise ValueError(f"ctc: wanted words that are said, {how}, got none; --ctc 0 does without")
    return _named(found, data.train)


def held_out(data: DataConfig, samples: int, *, pairs: bool = False) -> list[HeldOut]:
    """What is measured: at most so many samples of each source, as they are."""
    found = []
    given = (data.lines_held_out, data.tags_held_out)
    for spec, line, tags in zip(data.held_out, *given, strict=True):
        for each in _open(spec, line, tags, data, pairs):
            _check_ends(spec, line)
            source = Drawn(each.part.source, samples)
            part = dataclasses.replace(each.part, source=source, weight=1.0, augmented=0.0)
            rows = f"{len(source)} of {len(source.source)} of {spec}"
            found.append(dataclasses.replace(each, part=part, rows=rows))
    parts = _named([each.part for each in found], data.held_out)
    return [dataclasses.replace(e, part=part) for e, part in zip(found, parts, strict=True)]


def tell_tags(data: DataConfig, tokenizer: Tokenizer) -> None:
    """Warns of tags in tasks of which a tokenizer knows nothing: to it they are text."""
    learned = zip(each_of(data.train, data.tasks), each_of(data.train, data.tags), strict=True)
    kept = zip(data.lines_held_out, data.tags_held_out, strict=True)
    for line, tags in dict.fromkeys([*learned, *kept]):
        own = Task.parse(line, tags=tags or None, style=data.style).tags if line else ()
        if unknown := [tag for tag in own if len(tokenizer.encode(tag)) > 1]:
            told = f"the model's tokenizer takes {', '.join(unknown)} for text, not for tags"
            _log.warning(f"task {line!r}: {told}; {HOW}")


def _open(spec: str, line: str, tags: str, data: DataConfig, pairs: bool) -> list[HeldOut]:
    if spec.startswith(WORLD):
        return _made(spec, data.style, pairs)
    if not line:
        compile = from_preference if pairs else from_messages
        source = open_source(spec, rate=data.rate)
        part = Part(name=spec, source=source, compile=compile, augmented=1.0)
        _check_kind(part, pairs)
        return [HeldOut(part=part, choices=_anything)]
    if pairs:
        raise ValueError(f"{spec}: wanted pairs of answers, which have no task, got {line!r}")
    try:
        task = Task.parse(line, tags=tags or None, style=data.style)
    except ValueError as error:
        raise ValueError(f"task {line!r}: {error}") from None
    source = open_source(spec, audio=task.clips, rate=data.rate)
    part = Part(name=spec, source=source, compile=task.compile, augmented=1.0)
    return [HeldOut(part=part, choices=task.choices)]


def _check_ends(spec: str, line: str) -> None:
    """Refuses closed answers with what ends one in them: none of them could be chosen."""
    texts = [text for each in Task.parse(line).stated for text in each] if line else []
    for end in (PAD, IM_END):
        if any(end in text for text in texts):
            wanted = f"closed answers without {end}, which follows them by itself"
            raise ValueError(f"held_out {spec}: wanted {wanted}, got {line!r}")


def _check_kind(part: Part, pairs: bool) -> None:
    """Refuses rows of which none is what is learned from; single ones are bad samples."""
    rows = _some(part)
    if not rows or any(map(is_pair if pairs else is_conversation, rows)):
        return
    if pairs:
        wanted = "pairs of answers ('chosen' and 'rejected', or 'rejected_response')"
    else:
        wanted = "conversations ('messages' with an answer at their end), or a line in --data.tasks"
    raise ValueError(f"{part.name}: wanted {wanted}, got rows of {', '.join(rows[0]) or 'nothing'}")


def _says_words(spec: str, line: str, part: Part) -> bool:
    """Whether a source says what is said in its clips, as the made ones do.

    Raises:
      ValueError: its line names a field for it that no row has.
    """
    if spec.startswith(WORLD):
        return True
    if not line:
        return _any(part, says_words, "words beside a clip")
    named = Task.parse(line).words
    for name in named:  # a row may lack it, whose words nobody knows; not all do
        if _any(part, lambda row, name=name: name in row, f"words={name}"):
            continue
        if known := {field: None for row in _some(part) for field in row}:
            raise ValueError(f"{spec}: wanted words={name} of its fields, got {', '.join(known)}")
    return bool(named)


def _any(part: Part, wanted: Callable[[Mapping], bool], what: str) -> bool:
    """Whether a row of a part is as wanted.

    Few may be: where none of some is, all of a manifest are looked at, and many of what has clips
    in it, as reading those takes long; that others may be is told then.
    """
    size = len(part.source)
    for count in (LOOKED, size if isinstance(part.source, Manifest) else SEARCHED):
        if any(map(wanted, _rows(part, count))):
            return True
    if count < size:
        _log.warning(f"{part.name}: none of {count} of its {size} rows has {what}")
    return count < size


def _some(part: Part) -> list[Mapping]:
    return list(_rows(part, LOOKED))


def _rows(part: Part, count: int) -> Iterator[Mapping]:
    """Rows of a part, at most so many, of those that can be read."""
    drawn = part
    if count < len(part.source):
        drawn = dataclasses.replace(part, source=Drawn(part.source, count))
    for index in range(len(drawn.source)):
        try:
            row = drawn.read(index)
        except Exception as error:  # counted when it is drawn to be learned
            why(error)
        else:
            yield row


def _made(spec: str, style: str, pairs: bool) -> list[HeldOut]:
    from qwen2audio_jax.data.world import MODES, World  # speech needs an extra

    name, _, kind = spec.removeprefix(WORLD).partition("/")
    kind, _, split = kind.partition(":")
    if (kind == "preference") != pairs:
        wanted = f"pairs of answers, {WORLD}NAME/preference" if pairs else "tasks or conversations"
        raise ValueError(f"wanted {wanted}, got {spec}")
    world, split = World.named(name), split or "train"
    if kind in (*MODES, "preference"):
        compile = from_preference if kind == "preference" else from_messages
        source = world.source(kind, split, MADE)
        part = Part(name=spec, source=source, compile=compile, augmented=1.0)
        return [HeldOut(part=part, choices=_anything)]
    return [
        HeldOut(
            part=Part(
                name=f"{WORLD}{name}/{skill.name}",
                source=world.source(skill.name, split, MADE),
                compile=functools.partial(skill.compile, style=style),
                weight=skill.weight,
                augmented=1.0,
            ),
            choices=functools.partial(_choices, skill),
        )
        for skill in (world.tasks if kind == "tasks" else [world[kind]])
    ]


def _choices(skill: Any, sample: Mapping) -> list[str] | None:
    return skill.task(sample["prompt"]).choices(sample)


def _anything(sample: Mapping) -> None:
    return None


def _named(parts: Sequence[Part], specs: Sequence[str]) -> tuple[Part, ...]:
    """Parts by their sources' names; a source may be there twice, with two tasks."""
    short = names(specs)
    called = [short.get(part.name, part.name) for part in parts]
    seen = [called[:i].count(name) for i, name in enumerate(called)]
    return tuple(
        dataclasses.replace(part, name=f"{name} ({n + 1})" if n else name)
        for part, name, n in zip(parts, called, seen, strict=True)
    )


def names(specs: Sequence[str]) -> dict[str, str]:
    """Names of sources: of paths the shortest tail that is no other one's, or all of it.

    The order of samples depends on them: neither where data lie nor how a path is written may.
    """
    paths = {spec: _path(spec) for spec in specs}
    found = {}
    for spec, path in paths.items():
        others = {other for other in paths.values() if other != path}
        tails = (path[-size:] for size in range(1, len(path)))
        alone = (tail for tail in tails if all(o[-len(tail) :] != tail for o in others))
        found[spec] = "/".join(next(alone, path))
    return found


def _path(spec: str) -> tuple[str, ...]:
    """The words of a path, from the root; what is none is one word."""
    if spec.startswith((WORLD, TFDS)):
        return (spec,)
    return tuple((spec if "://" in spec else os.path.abspath(spec)).split("/"))


def once(
    part: Part, mixture: Mixture, bad: list[Bad] | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """All of a part in order, in the shapes of a mixture; what was of no use is told at the end.

    Args:
      bad: where the samples that cannot be used are put.
    """
    alone = dataclasses.replace(
        mixture, parts=(part,), epochs=1, shuffle=False, accumulate=1, host=0, hosts=1
    )
    batches = Batches(alone, bad=bad)
    try:
        yield from batches
        for line in left_out(batches.counts):
            tell(f"left out: {line}")
    finally:
        batches.close()
