"""What a run is told of its data: sources, what is asked of them, and the shapes of batches."""

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from dataclasses import field
from typing import Annotated, Any, Literal

import tyro

from qwen2audio_jax.data.augment import USUAL, Augmentation
from qwen2audio_jax.data.instruction import STYLES
from qwen2audio_jax.data.pack import Bucket
from qwen2audio_jax.data.sources import SUFFIX, manifest_of, shards
from qwen2audio_jax.training.run import MAY_CHANGE

# Begin the names of sources that are made, and of those that tfds prepared.
WORLD, TFDS = "world:", "tfds:"
# A bucket as one word of the command line.
BUCKET = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="ROWSxTOKENS,CLIPSxFRAMES",
    instance_from_str=lambda words: Bucket.parse(words[0]),
    is_instance=lambda value: isinstance(value, Bucket),
    str_from_instance=lambda bucket: [str(bucket)],
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is learned, and what is kept to measure it."""

    train: tuple[str, ...] = ()
    """Sources: rows.jsonl, rows.jsonl:SPLIT (paths or URLs), ArrayRecord shards on a disk,
    tfds:name/config:split; or made sound, world:NAME/KIND, of which KIND may be `tasks`, all."""
    tasks: tuple[str, ...] = ()
    """A line for each source, or one for all: `[AUDIO:audio] What is said? -> [TEXT:text]`. With
    an empty one, or without any, rows are conversations, or pairs of answers to one."""
    style: Literal[STYLES] = "prompt"
    """How tasks are hinted at: in words, in tags (--data.tags), or not at all."""
    tags: tuple[str, ...] = ()
    """What says each line's task in --data.style tags, or one for all."""
    rate: int | None = None
    """Sampling rate of tfds: sources that state none; whatever states one keeps its own."""
    weights: tuple[float, ...] = ()
    """How often samples come from each source, relative to the others; without, all alike."""
    held_out: tuple[str, ...] = field(default=(), metadata=MAY_CHANGE)
    """Sources that are measured and never learned. A run may go on with others; its best checkpoint
    is then still the best of all, whatever each was measured with."""
    held_out_tasks: tuple[str, ...] = field(default=(), metadata=MAY_CHANGE)
    """Their lines; without, each has the line of --data.tasks with which another split of its file
    is learned, or the one that all have; what is made has its own."""
    held_out_tags: tuple[str, ...] = field(default=(), metadata=MAY_CHANGE)
    """Their tags; without, those of --data.tags, likewise."""
    buckets: tuple[Annotated[Bucket, BUCKET], ...] = (
        Bucket(rows=4, tokens=360, clips=8, frames=1004),
    )
    """The shapes of each feed's batches: rows of tokens, clips of mel frames (10 ms each, and 4
    behind a clip's own: 504 for 5 s). A sample goes to the first that it fits."""
    feeds: int = 0
    """Of which a global batch is made, each with samples of its own; a host has one or several, and
    a run can go on with as many hosts as divide them. 0: one for each host that it begins with.
    Hosts that share rows, where tensor or context reaches over them, have the same: as one host."""
    pack: bool = True
    """Whether a row holds as many samples as fit; pairs have a row for each answer."""
    augmented: float | tuple[float, ...] = 0.0
    """The part of the clips that is moved to other rooms, microphones, noises, speeds, levels: of
    all, or of each source. Clips keep their speed and beginning in rows with "timed": true, and
    beside texts that state times, `<|0.50|>`; answers about loudness want 0."""
    masked: float | tuple[float, ...] = 0.0
    """The part of the clips that loses bands and spans (SpecAugment): of all, or of each source."""
    augmentation: Augmentation = USUAL
    """How clips are augmented and masked."""
    workers: int = field(default=1, metadata=MAY_CHANGE)
    """Processes of each host that read, decode and draw: its feeds share them, and have at least
    one each; 0: a thread for each feed."""
    fatal: bool = field(default=False, metadata=MAY_CHANGE)
    """Whether a bad sample ends the run; else it is counted."""

    def __post_init__(self):
        if self.feeds < 0:
            raise ValueError(f"wanted feeds from 0, got {self.feeds}")
        if self.rate is not None and self.rate < 1:
            raise ValueError(f"wanted a sampling rate of at least 1, got {self.rate}")
        each_of(self.train, self.tasks, "tasks")
        each_of(self.train, self.tags, "tags")
        if self.style != "tags" and (self.tags or self.held_out_tags):
            raise ValueError(f"tags are of the style tags: wanted it beside them, got {self.style}")
        each_of(self.train, self.augmented_each, "augmented")
        each_of(self.train, self.masked_each, "masked")
        self._each_held_out("held_out_tasks", self.tasks)
        self._each_held_out("held_out_tags", self.tags)
        if self.train and len(self.weights) not in (0, len(self.train)):
            raise ValueError(
                f"wanted weights for {len(self.train)} sources, got {len(self.weights)}"
            )
        if wrong := [weight for weight in self.weights if not 0 < weight < math.inf]:
            raise ValueError(f"wanted weights above 0, got {', '.join(map(str, wrong))}")
        for source in self.held_out:
            for learned in self.train:
                if _share_rows(source, learned):
                    raise ValueError(
                        f"held_out {source} is learned, too: train has {learned}; name splits"
                    )
            if source.startswith(WORLD) and not source.endswith(":test"):
                made = ":".join(source.split(":")[:2])
                raise ValueError(f"wanted held_out {made}:test, which nothing learns, got {source}")
        for name in ("augmented", "masked"):
            for share in getattr(self, f"{name}_each"):
                if not 0 <= share <= 1:
                    raise ValueError(f"wanted {name} from 0 to 1, got {share}")
        if self.workers < 0:
            raise ValueError(f"wanted workers from 0, got {self.workers}")

    @property
    def augmented_each(self) -> tuple[float, ...]:
        """Of each source, or one for all; 0 where nothing is said."""
        return _shares(self.augmented)

    @property
    def masked_each(self) -> tuple[float, ...]:
        """Likewise."""
        return _shares(self.masked)

    @property
    def lines_held_out(self) -> tuple[str, ...]:
        """Of each source that is held out."""
        return self._each_held_out("held_out_tasks", self.tasks)

    @property
    def tags_held_out(self) -> tuple[str, ...]:
        """Likewise."""
        return self._each_held_out("held_out_tags", self.tags)

    def _each_held_out(self, name: str, learned: Sequence[str]) -> tuple[str, ...]:
        """Their own, or those of what is learned, of which what is made takes none."""
        if own := getattr(self, name):
            return each_of(self.held_out, own, name)
        if len(learned) > 1:
            both = zip(self.train, learned, strict=False)
            known = [(source, words) for source, words in both if not source.startswith(WORLD)]
        else:
            known = [("", words) for words in learned]
        return tuple(_words_of(source, known, name) for source in self.held_out)


def _shares(said: float | tuple[float, ...]) -> tuple[float, ...]:
    return (said if isinstance(said, tuple) else (said,)) or (0.0,)


def _share_rows(one: str, other: str) -> bool:
    """Whether two sources are of the same file, and one of them is all of it or both one split."""
    if one.startswith(WORLD) or other.startswith(WORLD):
        return one == other
    if _folder(one) != _folder(other):  # shards of one folder are told apart by their names
        one, other = _written(one), _written(other)
    (file, split), (other_file, other_split) = map(_file_and_split, (one, other))
    if _files(file).isdisjoint(_files(other_file)):
        return False
    (name, part, _), (other_name, other_part, _) = (s.partition("[") for s in (split, other_split))
    overlap = name == other_name and not (part and other_part)  # parts are the user's business
    return split == other_split or overlap or not split or not other_split


def _files(source: str) -> set[str]:
    """What a source is of, however it is written; of shards on this disk each."""
    return {os.path.abspath(path) for path in _shards(source) or [source]}


def _shards(source: str) -> list[str]:
    """The shards on this disk that a source is of; none, if it is something else."""
    of_shards = SUFFIX in source or os.path.isdir(source)
    return [*map(os.path.abspath, shards(source))] if of_shards and "://" not in source else []


def _folder(source: str) -> str:
    """Where shards are; "" of what is something else."""
    return next(map(os.path.dirname, _shards(source)), "")


def _written(source: str) -> str:
    """What shards were written from, or the source."""
    folder = _folder(source)
    return (manifest_of(folder) if folder else None) or source


def _file_and_split(source: str) -> tuple[str, str]:
    found = re.fullmatch(r"(.+\.jsonl?)(?::([^:/]+))?", source)
    if found is None and source.startswith(TFDS):
        found = re.fullmatch(r"(tfds:[^:]+)(?::(.+))?", source)
    return (found[1], found[2] or "") if found else (source, "")


def each_of(sources: Sequence[str], words: Sequence[Any], name: str = "words") -> tuple[Any, ...]:
    """Lines or tags of sources, say: each has its own, all have one, or there are none ("").

    Raises:
      ValueError: there are more or fewer; the message says of what, by `name`.
    """
    if sources and len(words) not in (0, 1, len(sources)):
        raise ValueError(f"wanted {name} for {len(sources)} sources, got {len(words)}")
    return tuple(words) if len(words) == len(sources) else (*words, "")[:1] * len(sources)


def _words_of(source: str, known: Sequence[tuple[str, str]], name: str) -> str:
    """The words with which a source's file is learned, or those of all that is.

    Raises:
      ValueError: they differ, and none or several are of its file.
    """
    if source.startswith(WORLD):
        return ""
    words = {each for _, each in known}
    if len(words) > 1:  # a wrong prompt would be measured in silence
        files_of = lambda source: _files(_file_and_split(_written(source))[0])
        of_file = lambda other: not files_of(source).isdisjoint(files_of(other))
        words = {each for other, each in known if of_file(other)}
    if len(words) > 1 or (known and not words):
        kind, which = name.removeprefix("held_out_"), "several are" if words else "none is"
        raise ValueError(
            f"held_out {source}: wanted --data.held-out-{kind}, one for each that is held out: "
            f"those of --data.{kind} differ, and {which} of its file"
        )
    return next(iter(words), "")
