"""What the system's allocator is asked for by a program that trains."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # glibc's malloc.h
_LARGEST = 2**31 - 1


def keep() -> None:
    """Lets this process keep the memory of a step for the next one; to be called before all else.

    On a CPU a step's buffers are as large as the system likes to have back at once, and it clears
    every page before it gives it again: a sixth of a step of the tiny model. Only glibc can be
    asked, and only before there are threads that allocate.
    """
    ask = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if ask is not None:
        ask(_ARENA_MAX, 1)
        ask(_MMAP_THRESHOLD, 2**30)
        ask(_TRIM_THRESHOLD, _LARGEST)
