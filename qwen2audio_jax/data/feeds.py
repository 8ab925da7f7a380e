"""One process's share of batches that are the same however many processes there are.

A global batch is made of feeds, each an iterator of its own with its own samples. A process holds
one feed or several, in order; a run that goes on with fewer or more processes deals them anew.
Processes whose devices share rows, by heads or by tokens, are of one group; each reads all feeds of
the group.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from qwen2audio_jax.data.batches import Batches, added, read
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

    Raises:
      ValueError: the feeds cannot be dealt to so many groups.
    """

    def __init__(self, mixture: Mixture, group: int = 0, groups: int = 1):
        if mixture.hosts % groups:
            raise ValueError(
                "wanted a number of processes (those that share rows are as one) that divides the "
                f"{mixture.hosts} feeds of the data, got {groups}"
            )
        mixture = mixture.weighted() if mixture.hosts > 1 else mixture
        each = mixture.hosts // groups
        self.mixture = mixture
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
        if len(parts) == 1:
            return parts[0]
        axis = 1 if self.mixture.accumulate > 1 else 0
        return {k: np.concatenate([part[k] for part in parts], axis=axis) for k in parts[0]}

    def get_state(self) -> dict[str, Any]:
        return {
            str(batches.mixture.host): batches.get_state(position)
            for batches, position in zip(self._batches, self._positions, strict=True)
        }

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
        """As `Batches.counts`, of all feeds here."""
        return added([batches.counts for batches in self._batches])

    def passes(self) -> dict[str, float]:
        """By part, how often its rows were read, if feeds elsewhere read as many as those here."""
        here, sizes = len(self._batches) / self.mixture.hosts, self.mixture.sizes
        return {name: read(count) / here / sizes[name] for name, count in self.counts.items()}

    def close(self) -> None:
        for batches in self._batches:
            batches.close()
