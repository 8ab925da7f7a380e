"""What a CPU's allocator is asked for while a model trains."""

import ctypes
import sys

import jax

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # glibc's malloc.h
_LARGEST = 2**31 - 1


def keep() -> None:
    """Lets this process keep the memory of a step for the next one, where it trains on a CPU.

    A step's buffers are as large as the system likes to have back at once, and it clears every page
    before it gives it again: a sixth of a step of the tiny model. Only glibc can be asked.
    """
    if jax.default_backend() != "cpu" or sys.platform != "linux":
        return
    ask = getattr(ctypes.CDLL(None), "mallopt", None)
    if ask is not None:
        ask(_ARENA_MAX, 1)
        ask(_MMAP_THRESHOLD, 2**30)
        ask(_TRIM_THRESHOLD, _LARGEST)
