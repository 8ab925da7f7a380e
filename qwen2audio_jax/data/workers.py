"""Processes that read and decode, beside the one that trains."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading

import threadpoolctl


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
