"""Samples at many positions, read at once."""

import concurrent.futures
import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from qwen2audio_jax.progress import Progress

READERS = 16  # threads: clips that lie elsewhere take long to come, and little work
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
        for read, sample in enumerate(pool.map(samples.__getitem__, keys), 1):
            if progress is not None:
                progress.update()
            elif time.monotonic() - began > LONG:
                shown = jax.process_index() == 0
                progress = stack.enter_context(
                    Progress(len(keys), desc=what, unit=" samples", initial=read, shown=shown)
                )
            yield sample
