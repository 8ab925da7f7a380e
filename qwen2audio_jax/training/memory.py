"""What the system's allocator is asked for by a program that trains."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # glibc's malloc.h


def keep() -> None:
    """Lets this process keep the memory of a step for the next one; to be called before all else.

    On a CPU a step's buffers are as large as the system likes to have back at once, and it clears
    every page before it gives it again: a fifth of a step of 100 M parameters. So all comes from
    the heap, which is never made smaller. Only glibc can be asked, and only before there are
    threads that allocate.
    """
    ask = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if ask is not None:
        ask(_ARENA_MAX, 1)
        ask(_MMAP_MAX, 0)
        ask(_TRIM_THRESHOLD, -1)
