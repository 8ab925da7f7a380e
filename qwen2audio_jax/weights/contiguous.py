"""Rearranged arrays, copied as the memory and the disk that they lie on are read."""

from typing import Any

import numpy as np
from jaxtyping import Shaped

ROWS = 32  # of a matrix at a time: what is written in between stays in the processor's cache


def contiguous(view: Shaped[np.ndarray, "..."], dtype: Any) -> Shaped[np.ndarray, "..."]:
    """A copy in the order of `view`'s axes, made in the order of the memory behind it.

    numpy walks the result instead: through a transposed matrix that takes several times as long,
    and where it is a file's, pages are fetched for two bytes each, over and over where few of them
    fit into memory.
    """
    if not view.ndim:
        return np.array(view, dtype)
    out = np.empty(view.shape, dtype)
    axis = int(np.argmax(np.abs(view.strides)))
    source, target = np.moveaxis(view, axis, 0), np.moveaxis(out, axis, 0)
    for start in range(0, len(source), ROWS):
        target[start : start + ROWS] = source[start : start + ROWS]
    return out
