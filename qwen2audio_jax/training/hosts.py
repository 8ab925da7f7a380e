"""Several processes as one: how they meet, and how they end when one of them is lost."""

import json
import os
import platform
import sys
import time
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # the service's store has no public name; orbax asks here too
from jax.experimental import multihost_utils

from qwen2audio_jax.training.settings import HostsConfig

MEETING = 300  # seconds that the first process waits for the last
BLOCK = 4096  # bytes that what they tell each other is a multiple of
WORD = 5  # seconds that those who are left have to say that they are
NAMES, LEFT = "qwen2audio_jax/names", "qwen2audio_jax/left"  # what processes tell the service


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


def lost(name: str, error: Exception, config: HostsConfig) -> None:
    """Ends this process after another one was lost, and says which.

    What was computed together cannot go on, and nothing here may wait for the lost one. The service
    that all report to notices who is silent, says so, and ends this process; if it does not, this
    does.
    """
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    who = "; ".join(_silent()) or "another one"
    print(f"{name}: error: {here()}: lost {who}: {reason}", file=sys.stderr, flush=True)
    time.sleep(2 * config.timeout)
    os._exit(1)


def _silent() -> list[str]:
    """Which processes do not say, within WORD, that they are left."""
    try:
        _tell(LEFT, "")
        time.sleep(WORD)
        left = _told(LEFT)
        return [who for number, who in sorted(_told(NAMES).items()) if number not in left]
    except jax.errors.JaxRuntimeError:
        return ["process 0, where all report"]


def _tell(what: str, value: str) -> None:
    distributed.global_state.client.key_value_set(f"{what}/{jax.process_index()}", value)


def _told(what: str) -> dict[int, str]:
    """What each process has told, if it has."""
    entries = distributed.global_state.client.key_value_dir_get(what)
    return {int(key.rpartition("/")[2]): value for key, value in entries}
