"""Several processes as one: how they meet, and how they end when one of them is lost."""

import atexit
import contextlib
import functools
import itertools
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed  # the service's store has no public name; orbax asks here too
from jax.experimental import multihost_utils

from qwen2audio_jax.training.settings import HostsConfig

MEETING = 300  # seconds that the first process waits for the last
BLOCK = 4096  # bytes that what they tell each other is a multiple of
BEAT, PATIENCE = 2, 7  # seconds between signs of life, and without one until a process is lost
# What processes tell the service.
NAMES, LIFE, LOST = (f"qwen2audio_jax/{what}" for what in ("names", "life", "lost"))


def join(config: HostsConfig) -> None:
    """Meets the other processes; to be called before anything is computed.

    Raises:
      ValueError: nobody says where they are, or they did not come.
    """
    try:
        jax.distributed.initialize(
            coordinator_address=config.coordinator,
            num_processes=config.count,
            process_id=config.number,
            heartbeat_timeout_seconds=config.timeout,
            initialization_timeout=MEETING,
        )
    except ValueError as error:
        raise ValueError(
            "distributed: no cluster says where the other processes are; wanted "
            f"--hosts.coordinator HOST:PORT, --hosts.count and --hosts.number ({error})"
        ) from error
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"distributed: the processes did not meet: {reason}") from error
    _tell(NAMES, here())
    _live()


def joined() -> bool:
    """Whether this process has met others."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def gathered(value: Any) -> list[Any]:
    """What every process has, in their order; all have to ask at once.

    Args:
      value: anything that JSON can hold.
    """
    if jax.process_count() == 1:
        return [value]
    content = json.dumps(value).encode()
    longest = multihost_utils.process_allgather(np.array(len(content))).max()
    # JSON ignores blanks; few lengths are few programs to compile.
    content = content.ljust(-(-int(longest) // BLOCK) * BLOCK)
    every = multihost_utils.process_allgather(np.frombuffer(content, np.uint8))
    return [json.loads(bytes(each)) for each in every]


def here() -> str:
    """Which of the processes this is, for messages."""
    return f"process {jax.process_index()} of {jax.process_count()} on {platform.node()}"


@contextlib.contextmanager
def together(config: HostsConfig) -> Iterator[None]:
    """Ends this process if what it does with the others fails, without waiting for any of them."""
    try:
        yield
    except Exception as error:
        if not joined() or "RESOURCE_EXHAUSTED" in str(error):
            raise
        lost = _lost()
        if not lost and not isinstance(error, jax.errors.JaxRuntimeError):
            raise  # it is this process's own, which can be told in order
        _end(error, lost, config)


def _end(error: Exception, lost: str, config: HostsConfig) -> NoReturn:
    """Says which process is lost, if one is, and ends this one.

    What was computed together cannot go on. The first process, which has the service, stays until
    the others know; those that notice nothing are ended by the service, which says who is silent.
    """
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    said = f"{here()}: lost {lost}: {reason}" if lost else f"{here()}: {reason}"
    print(f"train: error: {said}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    if lost and jax.process_index() == 0:
        time.sleep(config.timeout)
    os._exit(1)


@functools.cache
def _lost() -> str:
    """Which processes are lost, if any: as the one says that has noticed first, as the others will
    miss that one, too.

    Looked for once: an error that ends this process may pass through `together` twice.
    """
    try:
        if known := _told(LOST):
            return next(iter(known.values()))
        if silent := "; ".join(_silent()):
            _tell(LOST, silent)
    except jax.errors.JaxRuntimeError:
        return "process 0, where all report"
    return silent


def _silent() -> list[str]:
    """Which processes give no sign of life any more."""
    before = _told(LIFE)
    time.sleep(PATIENCE)
    now, names = _told(LIFE), _told(NAMES)
    return [who for number, who in sorted(names.items()) if now.get(number) == before.get(number)]


def _live() -> None:
    """Gives signs of life until this process ends, in order or not."""
    ended = threading.Event()

    def beat() -> None:
        for number in itertools.count():
            try:
                _tell(LIFE, str(number))
            except jax.errors.JaxRuntimeError:  # the service has ended
                return
            if ended.wait(BEAT):
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    # before jax, which leaves the service
    atexit.register(lambda: (ended.set(), thread.join(BEAT)))


def _tell(what: str, value: str) -> None:
    client = distributed.global_state.client
    client.key_value_set(f"{what}/{jax.process_index()}", value, allow_overwrite=True)


def _told(what: str) -> dict[int, str]:
    """What each process has told, if it has."""
    entries = distributed.global_state.client.key_value_dir_get(what)
    return {int(key.rpartition("/")[2]): value for key, value in entries}
