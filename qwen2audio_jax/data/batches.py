"""A mixture's samples -> its batches, with a state to go on from.

Every sample is a pure function of the seed and its position, whoever makes it; so the state of
half-filled batches is the positions of what is in them.
"""

import collections
import contextlib
import functools
import itertools
import logging
import re
import shutil
import signal
import tempfile
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import grain
import numpy as np
from absl import flags

from qwen2audio_jax.data import reading
from qwen2audio_jax.data.pack import OPEN, Bad, Group, Sample
from qwen2audio_jax.data.sources import where
from qwen2audio_jax.data.workers import last_in_hand, settle
from qwen2audio_jax.processor import Inputs

if TYPE_CHECKING:
    from qwen2audio_jax.data.mixture import Mixture

HOPELESS = 1000  # bad samples in a row, after which an endless mixture waits for no good one
KILLED = re.compile(r"process was terminated unexpectedly with exit code (-?\d+)")  # as Grain says
WAITING = 4  # groups of a bucket that may wait for their turn, where several hosts keep step
LATE = 50  # steps that a group may wait for samples of its own, however rare these are

NOTHING = {"samples": 0, "tokens": 0, "seconds": 0.0, "longest": 0.0, "unspelt": 0}
PART = ("rows", "weight", "augmented", "masked")  # as a mixture's identity has them

_log = logging.getLogger(__name__)


class Batches:
    """A mixture's batches, in order, made ahead of time.

    `get_state()` is after the last batch that was given, of plain numbers and names (JSON holds
    it); `set_state` goes on from there, also in another process. `close` ends the workers.

    Args:
      workers: of the mixture's, those that are its own; None: all.
      feeds: how many share the mixture's workers.
      bad: where samples that cannot be used are put, as they are met; None: they are but counted.

    Raises, when the next is asked for:
      ValueError: samples are of two kinds, or none can be used.
      ChildProcessError: a worker was killed, or a row's clip ended it; the message names the row.
    """

    def __init__(
        self,
        mixture: "Mixture",
        *,
        workers: int | None = None,
        feeds: int = 1,
        bad: list[Bad] | None = None,
    ):
        if not flags.FLAGS.is_parsed():  # absl's, which Grain asks; only absl's own main parses
            flags.FLAGS.mark_as_parsed()
        self.mixture = mixture = mixture.weighted() if mixture.hosts > 1 else mixture
        self._feeds = feeds
        self._groups = _Groups(mixture, mixture.workers if workers is None else workers, bad)
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
        except RuntimeError as error:
            if (killed := KILLED.search(str(error))) is None:
                raise
            raise self._lost(int(killed[1])) from error
        self._state = self._ahead.get_state()
        return batch

    def _lost(self, status: int) -> ChildProcessError:
        parts = {part.name: part for part in self.mixture.parts}
        told = [
            f"{where(parts[name].source, row)} ({name})"
            for name, row in self._groups.last_in_hand()
        ]
        held = f" with {' and '.join(told)} in hand" if told else ""
        message = f"a worker that makes batches ended with status {status}{held}"
        if told:
            message += "; wanted {} in its place, with which the run goes on"
        if status == -signal.SIGKILL:  # by the system, most likely
            got = str(workers := self.mixture.workers)
            if self._feeds > 1:
                got += f", which are {max(workers, self._feeds)} processes for {self._feeds} feeds"
            message = (
                f"a worker that makes batches was killed{held} (out of memory?): wanted fewer "
            )
            message += f"--data.workers, got {got}"
        return ChildProcessError(message)

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
        self.mixture = self.mixture.weighted_as(state["mixture"])
        for name, ours in self.mixture.identity().items():
            if (theirs := state["mixture"].get(name)) != ours:
                raise ValueError(f"cannot resume: {_differs(name, theirs, ours)}")
        self._ahead.set_state(state)
        self._state = self._groups.get_state()

    @property
    def counts(self) -> dict[str, dict[str, Any]]:
        """By part: samples, tokens and seconds so far, those of the longest clip, what is waiting
        for the rest of its batch, clips whose words are too many for CTC, and `bad`: reason ->
        [count, the last]."""
        return self._state["counts"]

    def report(self) -> str:
        """The counts as a table."""
        return report(self.counts, self.mixture.sizes)

    def close(self) -> None:
        self._ahead.close()


def _differs(name: str, theirs: Any, ours: Any) -> str:
    """How a mixture's identity does."""
    if name != "parts" or not isinstance(theirs, Mapping) or [*theirs] != [*ours]:
        return f"{name} was {theirs}, is {ours}"
    told = [
        f"{part} had {field} {before:g}, has {now:g}"
        for part, fields in ours.items()
        for field, before, now in zip(PART, theirs[part], fields, strict=True)
        if before != now
    ]
    return f"{'; '.join(told)}: wanted the same, or another --out that begins with this one's model"


def added(feeds: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """What several iterators of a mixture have counted, together."""
    total = {}
    for name in feeds[0]:
        each, bad = [counts[name] for counts in feeds], {}
        for count in each:
            for reason, (n, message) in count["bad"].items():
                bad[reason] = [bad.get(reason, [0])[0] + n, message]
        sums = {k: sum(count[k] for count in each) for k in each[0] if k != "bad"}
        longest = max(count["longest"] for count in each)
        total[name] = {**sums, "longest": longest, "bad": bad}
    return total


def report(counts: Mapping[str, Mapping[str, Any]], sizes: Mapping[str, int]) -> str:
    """What was counted as a table, with the measured ratios; a line for each reason to drop.

    What is waiting was drawn, and is not learned yet.

    Args:
      sizes: how many rows each part has; `passes` is how often they were read.
    """
    total = sum(count["samples"] for count in counts.values()) or 1
    heads = f"{'share':>7} {'passes':>8} {'hours':>8} {'tokens':>11} {'bad':>6} {'waiting':>8}"
    lines = [f"{'part':24} {'samples':>9} {heads}"]
    for name, count in counts.items():
        samples, passes = count["samples"], read(count) / sizes[name]
        lines.append(
            f"{name:24} {samples:9} {samples / total:7.2%} {passes:8.2f}"
            f" {count['seconds'] / 3600:8.2f} {count['tokens']:11} {read(count) - samples:6}"
            f" {count['waiting']:8}"
        )
    unspelt = [
        f"{name}: {n} clips are not in ctc: more is said in them than their states can spell"
        for name, count in counts.items()
        if (n := count["unspelt"])
    ]
    return "\n".join([*lines, *left_out(counts), *unspelt])


def read(count: Mapping[str, Any]) -> int:
    """The rows that were read for what was counted: its samples, and what was of no use."""
    return count["samples"] + sum(n for n, _ in count["bad"].values())


def left_out(counts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each part and reason to drop its samples."""
    return [
        f"{name}: {n} {reason}, the last: {message}"
        for name, count in counts.items()
        for reason, (n, message) in count["bad"].items()
    ]


@functools.cache
def tell(line: str) -> None:
    """Warns once: batches of what is held out are made anew for each evaluation."""
    _log.warning(line)


class _Groups(grain.DatasetIterator):
    """Fills groups with samples as they come, and gives those that are full."""

    def __init__(self, mixture: "Mixture", workers: int, bad: list[Bad] | None = None):
        super().__init__()
        self._mixture, self._samples, self._workers = mixture, mixture.samples(), workers
        self._bad = bad
        self._processor = mixture.opened()
        self._stream: grain.DatasetIterator | None = None
        self._notes: str | None = None  # a folder, where workers note what they have in hand
        self._position = self._step = self._hopeless = 0
        self._waiting: list[list[Group]] = [[] for _ in mixture.buckets]
        self._turns, self._rows = _Turns(mixture), sum(mixture.sizes.values())
        self._shut: int | None = None  # the bucket whose first group was filled up for others
        self._counts = {part.name: {**NOTHING, "bad": {}} for part in mixture.parts}
        self._traced = False  # whether what nobody foresaw was told of, with where it happened
        self._kind: list[int] | None = None  # the first sample's, which all share

    def _next_sample(self) -> Sample | Bad:
        if self._stream is None:
            # From a position rather than a stream's state, which is of so many workers.
            rest = self._samples[self._position :]
            # Processes read at once already; a queue of pictures would only fill memory.
            stream = rest.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
            options = grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=4)
            if self._workers and self._notes is None:
                self._notes = tempfile.mkdtemp(prefix="rows-in-hand-")
                weakref.finalize(self, shutil.rmtree, self._notes, ignore_errors=True)
            first = functools.partial(settle, notes=self._notes)
            self._stream = iter(stream.mp_prefetch(options, first))
        return next(self._stream)

    def last_in_hand(self) -> list[tuple[str, int]]:
        """Parts and rows that workers which are no more had in hand."""
        return [] if self._notes is None else last_in_hand(self._notes)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._stream = None
        if self._notes is not None:  # the next workers may be called as these were
            shutil.rmtree(self._notes, ignore_errors=True)
            self._notes = None

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
        self._step, self._shut = self._step + 1, None
        self._turns.give()
        groups = self._waiting[bucket]
        group = groups.pop(0) if groups else self._group(bucket)
        for sample in group.samples():
            count = self._counts[sample.part]
            count["samples"] += 1
            count["tokens"] += sum(len(text.ids) for text in sample.texts)
            count["seconds"] += sample.seconds
            count["longest"] = max(count["longest"], sample.longest)
            if self._mixture.words:
                count["unspelt"] += sample.unspelt
        processor = self._processor
        return group.arrays(self._kind, mels=processor.mels, pad=processor.tokenizer.pad_id)

    def _say_if_none(self) -> None:
        if not self._step:
            told = [message for c in self._counts.values() for _, message in c["bad"].values()]
            raise ValueError(f"none of {self._position} samples can be used, the last: {told[-1]}")

    def _ready(self) -> int | None:
        """The bucket whose first group should be given now."""
        if self._shut is not None:
            return self._shut
        if self._mixture.hosts == 1:
            ready = (b for b in range(len(self._waiting)) if self._crowded(b))
            return next(ready, self._overdue(1))
        bucket = self._turns.bucket
        # Where too much waits for other buckets, its group goes as it is.
        most = (OPEN + WAITING) * len(self._waiting)
        full = self._crowded(bucket) or sum(map(len, self._waiting)) > most
        return bucket if full and self._kind else None

    def _crowded(self, bucket: int) -> bool:
        groups = self._waiting[bucket]
        return len(groups) > OPEN or (len(groups) > 0 and groups[0].full)

    def _overdue(self, more: int = 0) -> int | None:
        """The first bucket whose first group waits for too long, by `more` steps, on one host.

        That is a pass over what there is: who has few samples would see long ones never. But no
        more than LATE steps, as there may be a million samples: of each length one step in LATE is
        filled with others, at worst. And no less than a group waits where all are as common.
        """
        if self._mixture.epochs is not None or not self._step:  # at an end all groups are given
            return None
        pace = self._position / self._step
        least = (OPEN + 1) * len(self._waiting) * pace
        patience = max(least, min(self._rows, LATE * pace)) + more * pace
        late = lambda groups: groups and self._position - groups[0].keys[0] > patience
        return next((b for b, groups in enumerate(self._waiting) if late(groups)), None)

    def _add(self, sample: Sample | Bad) -> None:
        key, self._position = self._position, self._position + 1
        if isinstance(sample, Bad):
            return self._refuse(sample)
        self._hopeless = 0
        if self._kind not in (None, sample.kind):
            raise ValueError(f"part {sample.part!r}: examples and pairs cannot share a mixture")
        self._kind = sample.kind
        if self._fills_up(sample, key):
            return
        groups = self._waiting[sample.bucket]
        if not any(group.take(sample, key) for group in groups):
            groups.append(self._group(sample.bucket))
            groups[-1].take(sample, key)

    def _fills_up(self, sample: Sample, key: int) -> bool:
        """Puts a sample into the group that has to be given next, though it is of a larger bucket.

        Else that would be given with room for others. Several hosts do so with what is plenty; one
        host as soon as a group is overdue.
        """
        alone = self._mixture.hosts == 1
        bucket = self._overdue() if alone else self._turns.bucket
        if bucket in (None, sample.bucket) or not (alone or self._crowded(sample.bucket)):
            return False
        if self._crowded(bucket) or not self._fits(sample, bucket):
            return False
        groups = self._waiting[bucket]
        if not groups:
            groups.append(self._group(bucket))
        if groups[0].take(sample, key):
            return True
        self._shut = bucket
        return False

    def _fits(self, sample: Sample, bucket: int) -> bool:
        return self._mixture.buckets[bucket].fits(sample.tokens, sample.valid)

    def _refuse(self, bad: Bad) -> None:
        if bad.trace and not self._traced:
            self._traced = True
            tell(f"{bad.part}: {bad.message}\n{bad.trace}")
        if self._bad is not None:
            self._bad.append(bad)
        if self._mixture.fatal:
            raise ValueError(f"part {bad.part!r}: {bad.message}")
        reasons = self._counts[bad.part]["bad"]
        count, _ = reasons.get(bad.reason, (0, ""))
        reasons[bad.reason] = [count + 1, bad.message]
        self._hopeless += 1
        if self._hopeless >= HOPELESS and self._mixture.epochs is None:
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
        groups = [group for groups in self._waiting for group in groups]
        waiting = collections.Counter(each.part for group in groups for each in group.samples())
        return {
            "position": self._position,
            "step": self._step,
            "hopeless": self._hopeless,
            "kind": self._kind,
            "waiting": [[[*group.keys] for group in groups] for groups in self._waiting],
            "counts": {
                name: {**count, "waiting": waiting[name], "bad": bad(count["bad"])}
                for name, count in self._counts.items()
            },
        }

    def set_state(self, state: dict[str, Any]) -> None:
        self.close()
        self._mixture = self._mixture.weighted_as(state.get("mixture", {}))
        self._position, self._step = state["position"], state["step"]
        self._hopeless, self._kind = state["hopeless"], state["kind"]
        self._counts = {
            name: {**NOTHING, **count, "bad": {**count["bad"]}}
            for name, count in state["counts"].items()
        }
        self._turns, self._shut = _Turns(self._mixture, self._step), None
        keys = [key for groups in state["waiting"] for group in groups for key in group]
        with contextlib.closing(reading.each(self._samples, keys, "reading what waits")) as read:
            pairs = zip(keys, read, strict=True)
            refilled = lambda b, group: self._refilled(b, itertools.islice(pairs, len(group)))
            self._waiting = [
                [group for keys in groups if (group := refilled(b, keys)).keys]
                for b, groups in enumerate(state["waiting"])
            ]

    def _refilled(self, bucket: int, samples: Iterable[tuple[int, Sample | Bad]]) -> Group:
        """A group as it was, but for what cannot be read any more or does not fit here any more."""
        group = self._group(bucket)
        for key, sample in samples:
            if isinstance(sample, Bad):
                self._refuse(sample)
            elif not self._fits(sample, bucket) or not group.take(sample, key):
                (source,) = (p.source for p in self._mixture.parts if p.name == sample.part)
                message = f"{where(source, sample.row)}: it has another length than when it waited"
                self._refuse(Bad(part=sample.part, reason="changed", message=message))
        return group


class _Turns:
    """Whose turn it is of the buckets, where several hosts have to come to the same one.

    It follows from the step, without asking the others: the one furthest behind its share. Drawn by
    lot, some would fall behind by more and more, and what waits for its turn would pile up.
    """

    def __init__(self, mixture: "Mixture", step: int = 0):
        weights = np.array([bucket.weight or 1.0 for bucket in mixture.buckets])
        self._shares, self._step = weights / weights.sum(), 0
        self._given = np.zeros(len(weights))
        while self._step < step:
            self.give()

    @property
    def bucket(self) -> int:
        return int(np.argmax(self._shares * (self._step + 1) - self._given))

    def give(self) -> None:
        self._given[self.bucket] += 1
        self._step += 1
