"""Weighted mixtures of samples, by Grain: in an order that is exact to the bit when resumed."""

import dataclasses
import functools
import math
import numbers
import re
import traceback
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
from jax.experimental import multihost_utils

from qwen2audio_jax.data import reading
from qwen2audio_jax.data.augment import USUAL, Augmentation
from qwen2audio_jax.data.batches import Batches
from qwen2audio_jax.data.example import UNFORESEEN, BadSample, Example, Pair, why
from qwen2audio_jax.data.pack import ANSWERS, Bad, Bucket, Sample, draw
from qwen2audio_jax.data.sources import RandomAccess, where
from qwen2audio_jax.data.workers import in_hand
from qwen2audio_jax.processor import Processor

TIME = re.compile(r"<\|\d+(?:\.\d+)?\|>")  # seconds, as the reference writes them
# Samples that tell how often each bucket is needed: one pass, within these bounds.
MEASURED = 200, 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Samples of one kind: where they are, what is made of them, how often."""

    name: str
    source: RandomAccess
    compile: Callable[[Mapping, Processor], Example | Pair]  # Task.compile, from_messages, ...
    weight: float = 1.0  # of samples, relative to the other parts; kept to within 1 %
    augmented: float = 0.0  # of the clips: other rooms, microphones, noises, speeds, levels
    masked: float = 0.0  # of the clips: SpecAugment
    how: Augmentation = USUAL  # both are done

    def read(self, row: int) -> Mapping:
        """A row of the source; a `BadSample` if it has no fields."""
        record = self.source[row]
        if not isinstance(record, Mapping):
            raise BadSample("bad row", f"wanted fields, got {type(record).__name__}")
        return record


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """Which samples, in which order, in batches of which shapes.

    Iterating gives dictionaries of arrays, as a `Processor` makes with labels, padded right, and
    segment_ids [B, L] (0 padding, 1.. a row's samples). Preference pairs have chosen_input_ids,
    rejected_input_ids and so on in their place, and `rows` [B]: where in the source each is.
    """

    parts: tuple[Part, ...]
    processor: str  # a folder with a tokenizer, or what else Processor.from_pretrained takes
    buckets: tuple[Bucket, ...]  # a sample goes to the first that it fits
    seed: int = 0
    shuffle: bool = True
    epochs: int | None = None  # passes over one part; None never ends
    pack: bool = True
    words: bool = False  # whether batches have `words` [C, N]: what is said in each clip
    # Whether batches have a reference's log-probabilities of pairs, which every row then has to
    # have; else they are not looked at.
    references: bool = False
    accumulate: int = 1  # batches of one shape per element, along a leading axis
    host: int = 0
    hosts: int = 1  # each gets its own samples; all get batches of the same shapes
    workers: int = 0  # processes that decode and draw; 0: a thread of this one
    ahead: int = 2  # batches that are made before they are asked for
    fatal: bool = False  # whether a bad sample ends the run; else it is counted
    measured: bool = False  # whether the buckets' weights are, rather than given

    def __post_init__(self):
        names = [part.name for part in self.parts]
        if not self.parts or not self.buckets or len(set(names)) < len(names):
            raise ValueError(f"wanted buckets and parts with names of their own, got {names}")
        given = [bucket.weight is not None for bucket in self.buckets]
        if any(given) and not all(given):
            told = " ".join(map(str, self.buckets))
            raise ValueError(f"wanted a weight for each of the buckets or for none, got {told}")
        for part in self.parts:
            if part.weight <= 0 or not len(part.source):
                size = f"{len(part.source)} samples and weight {part.weight}"
                raise ValueError(f"part {part.name!r}: wanted more than none, got {size}")
        if not 0 <= self.host < self.hosts:
            raise ValueError(f"wanted a host within 0..{self.hosts - 1}, got {self.host}")
        if self.epochs is not None and (self.hosts > 1 or len(self.parts) > 1):
            raise ValueError("epochs are of one part on one host: others would end at other steps")

    def samples(self) -> grain.MapDataset:
        """Every host's share, by position: a `Sample`, or what is `Bad`."""
        streams = []
        for part in self.parts:
            # By name: another part beside it leaves a part's own order as it was.
            seed = zlib.crc32(f"{self.seed} {part.name}".encode())
            stream = grain.MapDataset.range(len(part.source)).seed(seed)
            if self.shuffle:
                stream = stream.shuffle()
            stream = stream.repeat(self.epochs)
            stream = stream.random_map(
                functools.partial(
                    _make,
                    part,
                    processor=self.processor,
                    buckets=self.buckets,
                    references=self.references,
                )
            )
            # Before mixing, so that each host has the mixture's ratios.
            streams.append(stream[self.host :: self.hosts])
        return grain.MapDataset.mix(streams, [part.weight for part in self.parts])

    @property
    def sizes(self) -> dict[str, int]:
        """How many rows each part's source has."""
        return {part.name: len(part.source) for part in self.parts}

    def weighted(self) -> "Mixture":
        """The mixture with weights of its buckets: measured, unless all are given.

        All hosts have to come to the same bucket at the same step. One that holds little of what
        there is would be given empty, again and again, if it had its turn as often as the others.
        The first process measures for all: a clip that another cannot read would part them.
        """
        if all(bucket.weight for bucket in self.buckets):
            return self
        if len(self.buckets) == 1:
            return self._with_weights([1.0])
        # float32, as what devices pass on is: one process and several have the same weights
        needed = np.zeros(len(self.buckets), np.float32)
        if jax.process_index() == 0:
            needed += self._needed()
        return self._with_weights(multihost_utils.broadcast_one_to_all(needed).tolist())

    def _needed(self) -> np.ndarray:
        """How many batches of each bucket the first samples take.

        Of all but the first bucket that is what they take at most, within the doubt (two standard
        deviations) of a count: a turn too many is filled up with samples of smaller buckets, while
        for one too few there is no help, and one that was not met at all will be.
        """
        least, most = MEASURED
        count = min(most, max(least, sum(self.sizes.values())))
        samples = dataclasses.replace(self, host=0, hosts=1).samples()
        shares: list[list[float]] = [[] for _ in self.buckets]
        for sample in reading.each(samples, range(count), "looking at samples' lengths"):
            if not isinstance(sample, Bad):
                share = self.buckets[sample.bucket].share(sample, packed=self.pack)
                shares[sample.bucket].append(share)
        needed = []
        for bucket, each in zip(self.buckets, shares, strict=True):
            mean = np.mean(each) if each else 1 / max(bucket.rows, bucket.clips)
            doubt = 2 * math.sqrt(len(each) + 1) if needed or not each else 0.0
            needed.append(mean * (len(each) + doubt))
        return np.array(needed)

    def weighted_as(self, identity: Mapping[str, Any]) -> "Mixture":
        """The mixture with the weights that another start measured; given ones stay.

        Args:
          identity: of that start. What else differs in it is for `Batches.set_state` to refuse.
        """
        theirs = identity.get("buckets", ())
        if not self.measured or [b[:-1] for b in theirs] != [b[:-1] for b in self._sizes()]:
            return self
        return self._with_weights([b[-1] for b in theirs])

    def _with_weights(self, weights: Sequence[float]) -> "Mixture":
        buckets = (
            dataclasses.replace(bucket, weight=weight)
            for bucket, weight in zip(self.buckets, weights, strict=True)
        )
        return dataclasses.replace(self, buckets=tuple(buckets), measured=True)

    def _sizes(self) -> list[list]:
        """Of each bucket, its weight the last."""
        return [list(dataclasses.astuple(bucket)) for bucket in self.buckets]

    def opened(self) -> Processor:
        """The processor, read once by each process."""
        return _processor(self.processor)

    def __iter__(self) -> Batches:
        return Batches(self)

    def identity(self) -> dict[str, Any]:
        """What the order of batches depends on, so that a resumed run can be held against it.

        Of sources that is how many rows they have, not what those say: rows may move, and a run
        may go on with some of them corrected. What it learned before stays learned.
        """
        parts = {
            part.name: [len(part.source), part.weight, part.augmented, part.masked]
            for part in self.parts
        }
        names = ("seed", "shuffle", "epochs", "pack", "words", "accumulate", "host", "hosts")
        return {"parts": parts, "buckets": self._sizes()} | {n: getattr(self, n) for n in names}


_processor = functools.lru_cache(maxsize=2)(Processor.from_pretrained)


def _make(
    part: Part,
    row: int,
    rng: np.random.Generator,
    *,
    processor: str,
    buckets: tuple[Bucket, ...],
    references: bool,
) -> Sample | Bad:
    """Reads, decodes, compiles, augments and draws one sample."""
    try:
        with in_hand(part.name, row):
            record, made = part.read(row), _processor(processor)
            example = part.compile(record, made)
            timed = part.augmented > 0 and (_timed(record) or _tells_times(example, made))
            sample = draw(
                example,
                buckets,
                rng,
                mels=made.mels,
                augmented=part.augmented,
                masked=part.masked,
                how=part.how,
                timed=timed,
            )
            reference = _reference(record) if references else ()
    except Exception as error:  # a night's run goes on
        reason, message = why(error)
        return Bad(
            part=part.name,
            reason=reason,
            message=f"{where(part.source, row)}: {message}",
            row=row,
            trace="".join(traceback.format_exception(error)) if reason == UNFORESEEN else "",
        )
    return dataclasses.replace(sample, part=part.name, row=row, reference=reference)


def _timed(record: Mapping) -> bool:
    """Whether a row says of itself that its clips have to keep their time."""
    timed = record.get("timed")
    if timed is None:
        return False
    if not isinstance(timed, numbers.Number | np.bool_) or timed not in (0, 1):
        raise BadSample("bad row", f"'timed': wanted true or false, got {timed!r}")
    return bool(timed)


def _tells_times(example: Example | Pair, processor: Processor) -> bool:
    """Whether texts say when something is heard: at another speed that would be untrue."""
    texts = [example.prompt]
    if isinstance(example, Pair):
        texts += [example.chosen, example.rejected]
    ids = [token for text in texts for each in text if each.clip is None for token in each.ids]
    return TIME.search(processor.decode([ids], False)[0]) is not None


def _reference(record: Mapping) -> tuple[float, ...]:
    """The reference's log-probabilities of both answers."""
    known = [record.get(f"ref_{answer}_logps") for answer in ANSWERS]
    try:
        reference = tuple(map(float, known))
    except (TypeError, ValueError):
        reference = (math.nan,)
    if not all(map(math.isfinite, reference)):
        raise BadSample("no reference", f"wanted two log-probabilities, got {known}")
    return reference
