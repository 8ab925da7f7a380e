"""Weighted mixtures -> batches, by Grain: made by other processes, exact to the bit when resumed.

Every sample is a pure function of the seed and its position, whoever makes it; so the state of
half-filled batches is the positions of what is in them.
"""

import dataclasses
import functools
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import numpy as np
import threadpoolctl
from absl import flags

from qwen2audio_jax.data.example import UNFORESEEN, BadSample, Example, Pair
from qwen2audio_jax.data.pack import ANSWERS, OPEN, Bucket, Group, Sample, draw
from qwen2audio_jax.data.sources import RandomAccess
from qwen2audio_jax.processor import Inputs, Processor

HOPELESS = 1000  # bad samples in a row, after which no good one is waited for
MEASURED = 200  # samples that tell how often each bucket is needed
WAITING = 4  # groups of a bucket that may wait for their turn, where several hosts keep step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Samples of one kind: where they are, what is made of them, how often."""

    name: str
    source: RandomAccess
    compile: Callable[[Mapping, Processor], Example | Pair]  # Task.compile, from_messages, ...
    weight: float = 1.0  # of samples, relative to the other parts; kept to within 1 %
    augmented: float = 0.0  # of the clips: other rooms, microphones, noises, speeds, levels
    masked: float = 0.0  # of the clips: SpecAugment

    def read(self, row: int) -> Mapping:
        """A row of the source; a `BadSample` if it has no fields."""
        record = self.source[row]
        if not isinstance(record, Mapping):
            raise BadSample("bad row", f"wanted fields, got {type(record).__name__}")
        return record


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bad:
    """What is left of a sample that cannot be used: for the main process to count."""

    part: str
    reason: str
    message: str


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
    accumulate: int = 1  # batches of one shape per element, along a leading axis
    host: int = 0
    hosts: int = 1  # each gets its own samples; all get batches of the same shapes
    workers: int = 0  # processes that decode and draw; 0: a thread of this one
    ahead: int = 2  # batches that are made before they are asked for
    fatal: bool = False  # whether a bad sample ends the run; else it is counted

    def __post_init__(self):
        names = [part.name for part in self.parts]
        if not self.parts or not self.buckets or len(set(names)) < len(names):
            raise ValueError(f"wanted buckets and parts with names of their own, got {names}")
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
                functools.partial(_make, part, processor=self.processor, buckets=self.buckets)
            )
            # Before mixing, so that each host has the mixture's ratios.
            streams.append(stream[self.host :: self.hosts])
        return grain.MapDataset.mix(streams, [part.weight for part in self.parts])

    def weighted(self) -> "Mixture":
        """The mixture with weights of its buckets: measured, unless all are given.

        All hosts have to come to the same bucket at the same step. One that holds little of what
        there is would be given empty, again and again, if it had its turn as often as the others.
        """
        if all(bucket.weight for bucket in self.buckets):
            return self
        samples = dataclasses.replace(self, host=0, hosts=1).samples()
        needed = np.full(len(self.buckets), 1 / MEASURED)  # what is rare has a turn, too
        for sample in (samples[i] for i in range(MEASURED)):
            if not isinstance(sample, Bad):
                bucket = self.buckets[sample.bucket]
                needed[sample.bucket] += bucket.share(sample, packed=self.pack)
        buckets = (
            dataclasses.replace(bucket, weight=float(weight))
            for bucket, weight in zip(self.buckets, needed, strict=True)
        )
        return dataclasses.replace(self, buckets=tuple(buckets))

    def __iter__(self) -> "Batches":
        return Batches(self)

    def identity(self) -> dict[str, Any]:
        """What the order of batches depends on, so that a resumed run can be held against it."""
        parts = {
            part.name: [len(part.source), part.weight, part.augmented, part.masked]
            for part in self.parts
        }
        buckets = [list(dataclasses.astuple(bucket)) for bucket in self.buckets]
        names = ("seed", "shuffle", "epochs", "pack", "words", "accumulate", "host", "hosts")
        return {"parts": parts, "buckets": buckets} | {n: getattr(self, n) for n in names}


class Batches:
    """A mixture's batches, in order, made ahead of time.

    `get_state()` is after the last batch that was given, of plain numbers and names (JSON holds
    it); `set_state` goes on from there, also in another process. `close` ends the workers.
    """

    def __init__(self, mixture: Mixture):
        if not flags.FLAGS.is_parsed():  # absl's, which Grain asks; only absl's own main parses
            flags.FLAGS.mark_as_parsed()
        self.mixture = mixture = mixture.weighted() if mixture.hosts > 1 else mixture
        self._groups = _Groups(mixture)
        self._ahead = grain.experimental.ThreadPrefetchDatasetIterator(self._groups, mixture.ahead)
        self._state = self._groups.get_state()

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Inputs:
        try:
            batch = next(self._ahead)
        except StopIteration:
            self._state = self._groups.get_state()  # bad samples behind the last batch count too
            raise
        self._state = self._ahead.get_state()
        return batch

    @property
    def position(self) -> dict[str, Any]:
        """Where the iterator is, for `get_state`: known after each batch, at no cost."""
        return self._state

    def get_state(self, position: dict[str, Any] | None = None) -> dict[str, Any]:
        """The state after the last batch, or at an earlier position."""
        at = self._state if position is None else position
        return {**at, "mixture": self.mixture.identity()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where `get_state` was called.

        Raises:
          ValueError: the state is another mixture's; the message names what differs.
        """
        for name, ours in self.mixture.identity().items():
            if (theirs := state["mixture"].get(name)) != ours:
                raise ValueError(f"cannot resume: {name} was {theirs}, is {ours}")
        self._ahead.set_state(state)
        self._state = self._groups.get_state()

    @property
    def counts(self) -> dict[str, dict[str, Any]]:
        """By part: samples, tokens and seconds so far, and `bad`: reason -> [count, the last]."""
        return self._state["counts"]

    def report(self) -> str:
        """The counts as a table."""
        return report(self.counts)

    def close(self) -> None:
        self._ahead.close()


def added(feeds: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """What several iterators of a mixture have counted, together."""
    total = {}
    for name in feeds[0]:
        each, bad = [counts[name] for counts in feeds], {}
        for count in each:
            for reason, (n, message) in count["bad"].items():
                bad[reason] = [bad.get(reason, [0])[0] + n, message]
        sums = {k: sum(count[k] for count in each) for k in ("samples", "tokens", "seconds")}
        total[name] = {**sums, "bad": bad}
    return total


def report(counts: Mapping[str, Mapping[str, Any]]) -> str:
    """What was counted as a table, with the measured ratios; a line for each reason to drop."""
    total = sum(count["samples"] for count in counts.values()) or 1
    lines = [f"{'part':24} {'samples':>9} {'share':>7} {'hours':>8} {'tokens':>11} {'bad':>6}"]
    for name, count in counts.items():
        bad = sum(n for n, _ in count["bad"].values())
        lines.append(
            f"{name:24} {count['samples']:9} {count['samples'] / total:7.2%}"
            f" {count['seconds'] / 3600:8.2f} {count['tokens']:11} {bad:6}"
        )
    for name, count in counts.items():
        for reason, (n, message) in count["bad"].items():
            lines.append(f"{name}: {n} {reason}, the last: {message}")
    return "\n".join(lines)


class _Groups(grain.DatasetIterator):
    """Fills groups with samples as they come, and gives those that are full."""

    def __init__(self, mixture: Mixture):
        super().__init__()
        self._mixture, self._samples = mixture, mixture.samples()
        self._processor = _processor(mixture.processor)
        self._stream: grain.DatasetIterator | None = None
        self._position = self._step = self._hopeless = 0
        self._waiting: list[list[Group]] = [[] for _ in mixture.buckets]
        self._counts = {
            part.name: {"samples": 0, "tokens": 0, "seconds": 0.0, "bad": {}}
            for part in mixture.parts
        }
        self._kind: list[int] | None = None  # the first sample's, which all share

    def _next_sample(self) -> Sample | Bad:
        if self._stream is None:
            # From a position rather than a stream's state, which is of so many workers.
            rest = self._samples[self._position :]
            # Processes read at once already; a queue of pictures would only fill memory.
            stream = rest.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
            options = grain.MultiprocessingOptions(self._mixture.workers, per_worker_buffer_size=4)
            self._stream = iter(stream.mp_prefetch(options, settle))
        return next(self._stream)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._stream = None

    def __next__(self) -> Inputs:
        while (bucket := self._ready()) is None:
            try:
                self._add(self._next_sample())
            except StopIteration:
                left = [b for b, groups in enumerate(self._waiting) if groups]
                if not left:
                    self._say_if_none()
                    raise
                bucket = left[0]
                break
        self._step += 1
        groups = self._waiting[bucket]
        group = groups.pop(0) if groups else self._group(bucket)
        for sample in group.samples():
            count = self._counts[sample.part]
            count["samples"] += 1
            count["tokens"] += sum(len(text.ids) for text in sample.texts)
            count["seconds"] += sample.seconds
        processor = self._processor
        return group.arrays(self._kind, mels=processor.mels, pad=processor.tokenizer.pad_id)

    def _say_if_none(self) -> None:
        if not self._step:
            told = [message for c in self._counts.values() for _, message in c["bad"].values()]
            raise ValueError(f"none of {self._position} samples can be used, the last: {told[-1]}")

    def _ready(self) -> int | None:
        """The bucket whose first group should be given now."""
        crowded = lambda groups: len(groups) > OPEN or (groups and groups[0].full)
        if self._mixture.hosts == 1:
            ready = (b for b, groups in enumerate(self._waiting) if crowded(groups))
            return next(ready, None)
        # Every host must come to the same bucket without asking the others, so the bucket is a
        # function of the step; where too much waits for other buckets, its group goes as it is.
        weights = np.array([bucket.weight for bucket in self._mixture.buckets])
        rng = np.random.default_rng((self._mixture.seed, self._step))
        bucket = int(rng.choice(len(weights), p=weights / weights.sum()))
        most = (OPEN + WAITING) * len(weights)
        full = crowded(self._waiting[bucket]) or sum(map(len, self._waiting)) > most
        return bucket if full and self._kind else None

    def _add(self, sample: Sample | Bad) -> None:
        key, self._position = self._position, self._position + 1
        if isinstance(sample, Bad):
            return self._refuse(sample)
        self._hopeless = 0
        if self._kind not in (None, sample.kind):
            kinds = "examples, pairs, and pairs with their reference's log-probabilities"
            raise ValueError(f"part {sample.part!r}: {kinds} cannot share a mixture")
        self._kind = sample.kind
        groups = self._waiting[sample.bucket]
        if not any(group.take(sample, key) for group in groups):
            groups.append(self._group(sample.bucket))
            groups[-1].take(sample, key)

    def _refuse(self, bad: Bad) -> None:
        if self._mixture.fatal:
            raise ValueError(f"part {bad.part!r}: {bad.message}")
        reasons = self._counts[bad.part]["bad"]
        count, _ = reasons.get(bad.reason, (0, ""))
        reasons[bad.reason] = [count + 1, bad.message]
        self._hopeless += 1
        if self._hopeless >= HOPELESS:
            raise ValueError(f"{HOPELESS} samples in a row are bad, the last: {bad.message}")

    def _group(self, bucket: int) -> Group:
        mixture = self._mixture
        return Group(
            mixture.buckets[bucket],
            packed=mixture.pack,
            batches=mixture.accumulate,
            words=mixture.words,
        )

    def get_state(self) -> dict[str, Any]:
        bad = lambda reasons: {reason: [*told] for reason, told in reasons.items()}
        return {
            "position": self._position,
            "step": self._step,
            "hopeless": self._hopeless,
            "kind": self._kind,
            "waiting": [[[*group.keys] for group in groups] for groups in self._waiting],
            "counts": {
                name: {**count, "bad": bad(count["bad"])} for name, count in self._counts.items()
            },
        }

    def set_state(self, state: dict[str, Any]) -> None:
        self.close()
        self._position, self._step = state["position"], state["step"]
        self._hopeless, self._kind = state["hopeless"], state["kind"]
        self._counts = {
            name: {**count, "bad": {**count["bad"]}} for name, count in state["counts"].items()
        }
        self._waiting = [
            [self._refilled(bucket, keys) for keys in groups]
            for bucket, groups in enumerate(state["waiting"])
        ]

    def _refilled(self, bucket: int, keys: list[int]) -> Group:
        group = self._group(bucket)
        for key in keys:
            sample = self._samples[key]
            if isinstance(sample, Bad):  # it was good: what it was read from has changed since
                raise ValueError(f"cannot resume: part {sample.part!r}: {sample.message}")
            if sample.bucket != bucket or not group.take(sample, key):
                raise ValueError(f"cannot resume: part {sample.part!r} has changed on disk")
        return group


_processor = functools.lru_cache(maxsize=2)(Processor.from_pretrained)


def _make(
    part: Part, row: int, rng: np.random.Generator, *, processor: str, buckets: tuple[Bucket, ...]
) -> Sample | Bad:
    """Reads, decodes, compiles, augments and draws one sample."""
    try:
        record, made = part.read(row), _processor(processor)
        example = part.compile(record, made)
        sample = draw(
            example, buckets, rng, mels=made.mels, augmented=part.augmented, masked=part.masked
        )
        reference = _reference(record)
    except BadSample as error:
        return Bad(part=part.name, reason=error.reason, message=f"row {row}: {error}")
    except UNFORESEEN as error:  # a night's run goes on
        kind = type(error).__name__
        return Bad(part=part.name, reason="unforeseen", message=f"row {row}: {kind}: {error}")
    return dataclasses.replace(sample, part=part.name, row=row, reference=reference)


def _reference(record: Mapping) -> tuple[float, ...]:
    """The reference's log-probabilities of both answers, where a row has them."""
    known = [record.get(f"ref_{answer}_logps") for answer in ANSWERS]
    if None in known:
        return ()
    try:
        reference = tuple(map(float, known))
    except (TypeError, ValueError):
        reference = (math.nan,)
    if not all(map(math.isfinite, reference)):
        raise BadSample("no reference", f"wanted two log-probabilities, got {known}")
    return reference


def settle(*_: int) -> None:
    """What a worker does first: leaves accelerator and priority to the trainer, and ends with it.

    A trainer that is killed cannot stop its workers, and they would wait for work forever. On
    small matrices BLAS's threads wait for each other, busily: a log-mel took twelve times as long.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's business
    threadpoolctl.threadpool_limits(1)
    os.nice(5)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
