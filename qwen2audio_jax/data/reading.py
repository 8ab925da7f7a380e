"""Samples at many positions, read at once."""

import collections
import concurrent.futures
import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax

from qwen2audio_jax.progress import Progress

READERS = 16  # threads: clips that lie elsewhere take long to come, and little work
AHEAD = 4 * READERS  # samples in hand: those of all keys at once would fill memory
LONG = 5.0  # seconds, after which it is said how far it is


def each(samples: Any, keys: Sequence[int], what: str) -> Iterator[Any]:
    """Samples in the order of `keys`.

    Args:
      samples: functions of the position alone, which threads may ask for at once.
      what: is said beside how many were read, where that takes long.
    """
    began, progress = time.monotonic(), None
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(READERS))
        stack.callback(pool.shutdown, cancel_futures=True)
        for read, sample in enumerate(_read(pool, samples, keys), 1):
            if progress is not None:
                progress.update()
            elif time.monotonic() - began > LONG:
                shown = jax.process_index() == 0
                progress = stack.enter_context(
                    Progress(len(keys), desc=what, unit=" samples", initial=read, shown=shown)
                )
            yield sample


def _read(pool: concurrent.futures.Executor, samples: Any, keys: Iterable[int]) -> Iterator[Any]:
    """As `pool.map`, which takes up all keys before it gives the first sample."""
    waiting = collections.deque()
    for key in keys:
        waiting.append(pool.submit(samples.__getitem__, key))
        if len(waiting) >= AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
