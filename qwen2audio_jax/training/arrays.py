"""Types as a compiled program writes them -> shapes, and bytes by the memory that they are in."""

import math
import re
from typing import Literal

ARRAY = re.compile(r"\b(pred|token|[a-z]+\d+\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
# Where a layout says nothing, an array is in the device's main memory. Others are nearer to its
# arithmetic, as S(1), or the host's, S(5): the compiler for TPUs makes that of `pinned_host`.
_SPACE = re.compile(r"S\((\d+)\)")
Memory = Literal["main", "host"]
_NUMBERS = {"main": "0", "host": "5"}


def dims(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)


def each(kind: str) -> list[str]:
    """The arrays of a tuple, nested or not, as they are written."""
    return [found[0] for found in ARRAY.finditer(kind)]


def shape(kind: str) -> tuple[int, ...]:
    """Of the first array."""
    found = ARRAY.search(kind)
    return dims(found[2]) if found else ()


def size(kind: str, memory: Memory | None = None) -> float:
    """Bytes of all arrays of a type, or of those that are in one memory."""
    return math.fsum(
        _width(dtype) * math.prod(dims(sizes))
        for dtype, sizes, layout in ARRAY.findall(kind)
        if memory is None or _space(layout) == _NUMBERS[memory]
    )


def within(kind: str, memory: Memory) -> bool:
    """Whether an array, the first of its type, is in a memory."""
    found = ARRAY.search(kind)
    return found is not None and _space(found[3] or "") == _NUMBERS[memory]


def _space(layout: str) -> str:
    found = _SPACE.search(layout)
    return found[1] if found else "0"


def _width(dtype: str) -> float:
    if dtype in ("pred", "token"):
        return float(dtype == "pred")
    return int(re.search(r"\d+", dtype)[0]) / 8
