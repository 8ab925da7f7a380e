"""Processes that read and decode, beside the one that trains."""

import contextlib
import json
import multiprocessing
import multiprocessing.connection
import multiprocessing.util
import os
import pathlib
import shutil
import signal
import threading
from collections.abc import Iterator

import threadpoolctl

NOTE = 4096  # bytes, which are written at once
_notes: int | None = None  # this worker's file


def _end_those_left() -> None:
    """At exit multiprocessing would tell them by SIGTERM, and wait for them."""
    for child in multiprocessing.active_children():
        if child.name.startswith("grain"):
            child.kill()


# behind Grain's own, of priority 1, which closes the iterators that it knows of
multiprocessing.util.Finalize(None, _end_those_left, exitpriority=0)


def settle(*_: int, notes: str | None = None) -> None:
    """What a worker does first: leaves accelerator and priority to the trainer, and ends with it.

    Args:
      notes: a folder where it notes what it has in hand, in a file called as its process. Such a
        worker is a training's: SIGTERM, which systems send to a whole job, is the trainer's
        business like Ctrl-C; it saves, and for that has to make the batches of a few more steps.

    A trainer that is killed cannot stop its workers, and they would wait for work forever. On
    small matrices BLAS's threads wait for each other, busily: a log-mel took twelve times as long.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's business
    threadpoolctl.threadpool_limits(1)
    os.nice(5)
    threading.Thread(target=_end_with_parent, args=(notes,), daemon=True).start()
    if notes is not None:
        global _notes
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _notes = os.open(os.path.join(notes, str(os.getpid())), os.O_RDWR | os.O_CREAT)


@contextlib.contextmanager
def in_hand(part: str, row: int) -> Iterator[None]:
    """While a worker has a row in hand, so that it is known what it did not survive."""
    if _notes is None:
        yield
        return
    os.pwrite(_notes, json.dumps([part, row]).encode().ljust(NOTE), 0)
    try:
        yield
    finally:
        os.pwrite(_notes, b" " * NOTE, 0)


def last_in_hand(notes: str) -> list[tuple[str, int]]:
    """Parts and rows that workers which are no more had in hand."""
    alive = {str(child.pid) for child in multiprocessing.active_children()}
    files = [path for path in sorted(pathlib.Path(notes).iterdir()) if path.name not in alive]
    return [tuple(json.loads(note)) for path in files if (note := path.read_bytes().strip())]


def _end_with_parent(notes: str | None) -> None:
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    if notes is not None:  # of no use to anybody else
        shutil.rmtree(notes, ignore_errors=True)
    os._exit(1)
