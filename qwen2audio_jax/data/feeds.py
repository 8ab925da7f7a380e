"""One process's share of batches that are the same however many processes there are.

A global batch is made of feeds, each an iterator of its own with its own samples. A process holds
one feed or several, in order; a run that goes on with fewer or more processes deals them anew.
Processes whose devices share rows, by heads or by tokens, are of one group: each reads all feeds of
the group, and the first counts what was read.
"""

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from qwen2audio_jax.data.batches import Batches, added
from qwen2audio_jax.data.mixture import Mixture
from qwen2audio_jax.processor import Inputs


class Feeds:
    """The rows of a process, batch after batch: those of its feeds, one below the other.

    As `Batches`, except that `get_state()` gives a state for each of its feeds, by number, and
    `set_state` takes those of all.

    Args:
      mixture: its `hosts` are all feeds there are; its `workers` this process's, of which each of
        its feeds has a share, at least one.
      group, groups: the process's, of how many; where no rows are shared, each process is one.
      first: whether it is the first of its group.

    Raises:
      ValueError: the feeds cannot be dealt to so many groups.
    """

    def __init__(self, mixture: Mixture, group: int = 0, groups: int = 1, first: bool = True):
        if mixture.hosts % groups:
            raise ValueError(
                "wanted a number of processes (those that share rows are as one) that divides the "
                f"{mixture.hosts} feeds of the data, got {groups}"
            )
        mixture = mixture.weighted() if mixture.hosts > 1 else mixture
        each = mixture.hosts // groups
        self.mixture, self._group, self._first = mixture, group, first
        self._shared = jax.process_count() > groups
        self._seen = 0  # a checksum of the batches so far, where others read the same
        # Order does not depend on them: a run may go on with others, on other hosts.
        fair, more = divmod(mixture.workers, each)
        shares = [max(fair + (i < more), min(mixture.workers, 1)) for i in range(each)]
        self._batches = [
            Batches(dataclasses.replace(mixture, host=group * each + i), workers=share, feeds=each)
            for i, share in enumerate(shares)
        ]
        self._note()

    def __iter__(self) -> "Feeds":
        return self

    def __next__(self) -> Inputs:
        parts = [next(batches) for batches in self._batches]
        self._note()  # of all or, if one of them failed, of the last time
        if self._shared:
            for x in (x for part in parts for x in part.values()):
                if x.dtype.kind == "i":  # all but sound, which is much
                    self._seen = zlib.crc32(x.tobytes(), self._seen)
            if self.mixture.hosts == 1 and len(self.mixture.buckets) > 1:
                self._compare()  # of one feed, what was read chooses the shapes too
        if len(parts) == 1:
            return parts[0]
        axis = 1 if self.mixture.accumulate > 1 else 0
        return {k: np.concatenate([part[k] for part in parts], axis=axis) for k in parts[0]}

    def get_state(self) -> dict[str, Any]:
        """A state for each feed; processes that share rows all have to ask at once.

        Raises:
          ValueError: they have read different samples, and what they learned is of neither.
        """
        if self._shared:
            self._compare()
        return {
            str(batches.mixture.host): batches.get_state(position)
            for batches, position in zip(self._batches, self._positions, strict=True)
        }

    def _compare(self) -> None:
        """One may have failed to read what another could: from then on their rows are others."""
        bad = sum(n for count in self._counted().values() for n, _ in count["bad"].values())
        own = np.array([self._group, self._seen & 0x7FFFFFFF, bad], np.int32)
        every = multihost_utils.process_allgather(own)
        for group in np.unique(every[:, 0]):
            members = np.flatnonzero(every[:, 0] == group)
            if len(np.unique(every[members, 1])) > 1:
                each = [f"process {i} left out {every[i, 2]}" for i in members]
                raise ValueError(
                    "wanted the same samples in all processes that share rows, but since the last "
                    f"checkpoint some could not be read everywhere ({', '.join(each)} in all); "
                    "what was saved before is whole: run it again to go on from there"
                )

    def _note(self) -> None:
        self._positions = [batches.position for batches in self._batches]

    def set_state(self, states: Mapping[str, Any]) -> None:
        """Goes on where the states were taken.

        Raises:
          ValueError: there is none for a feed, or it is another mixture's.
        """
        for batches in self._batches:
            number = str(batches.mixture.host)
            if number not in states:
                raise ValueError(
                    f"cannot resume: wanted the state of feed {number} of the data, "
                    f"got those of {', '.join(sorted(states, key=int))}"
                )
            batches.set_state(states[number])
        self._note()

    @property
    def counts(self) -> dict[str, dict[str, Any]]:
        """As `Batches.counts`, of all feeds here; nothing, where another process counts them."""
        counts = self._counted()
        nothing = {"samples": 0, "tokens": 0, "seconds": 0.0, "bad": {}}
        return counts if self._first else {name: {**nothing, "bad": {}} for name in counts}

    def _counted(self) -> dict[str, dict[str, Any]]:
        return added([batches.counts for batches in self._batches])

    def close(self) -> None:
        for batches in self._batches:
            batches.close()
