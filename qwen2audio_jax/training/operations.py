"""Multiplications and additions of a compiled program's instructions, from their text."""

import functools
import math
import re

import numpy as np

from qwen2audio_jax import flash

Shape = tuple[int, ...]


def convolution(text: str, left: Shape, right: Shape, out: Shape) -> float:
    """As XLA counts: products with what padding and dilation put in are none."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", text)
    window = re.search(r"window=\{([^}]*)\}", text)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    number = sum(letter.isdigit() for letter in labels[1])
    every = lambda name, usual: fields.get(name, "x".join([usual] * number)).split("x")
    total = 2.0 * right[labels[2].index("i")]
    total *= out[labels[3].index("b")] * out[labels[3].index("f")]
    for i in range(number):
        total *= _taps(
            left[labels[1].index(str(i))],
            right[labels[2].index(str(i))],
            out[labels[3].index(str(i))],
            int(every("stride", "1")[i]),
            int(every("pad", "0_0")[i].split("_")[0]),
            int(every("lhs_dilate", "1")[i]),
            int(every("rhs_dilate", "1")[i]),
        )
    return total


@functools.cache
def _taps(size, taps, out, stride, pad, spread, apart) -> int:
    """Pairs of an output and a tap that meet an input."""
    at = np.arange(out)[:, None] * stride + np.arange(taps) * apart - pad
    return int(((at >= 0) & (at <= (size - 1) * spread) & (at % spread == 0)).sum())


def kernel(name: str, text: str, shapes: list[Shape]) -> float:
    """Splash attention's products over the blocks that its mask leaves; of other kernels none.

    Args:
      shapes: of its operands of floating point, queries and keys first. One row alone is a matrix
        of heads: Pallas leaves out a batch of one.
    """
    if not _is_attention(text):
        return 0.0
    *rows, number, queries, width = shapes[0]
    products = 5 if _goes_back(name) else 2
    keys = shapes[1][-2]  # of all devices that share a row's queries
    *_, seen = _blocks(text, shapes)
    return 2.0 * products * math.prod(rows) * number * queries * keys * width * seen


def read_again(name: str, text: str, shapes: list[Shape], sizes: list[float]) -> float:
    """Bytes that splash attention reads beside each operand once: of each block of queries all keys
    and values that it sees or, backward, of each block of keys all that is of queries.

    Args:
      shapes: as `kernel`'s.
      sizes: their bytes.
    """
    if not _is_attention(text):
        return 0.0
    own, blocks, seen = _blocks(text, shapes)
    if _goes_back(name):
        return max(0.0, blocks * seen - 1) * (sizes[0] + sum(sizes[3:]))
    shared = shapes[0][-3] / shapes[1][-3]  # heads that read the same keys, each by itself
    return max(0.0, own * shared * seen - 1) * sum(sizes[1:3])


def _is_attention(text: str) -> bool:
    found = re.search(r'op_name="([^"]*)"', text)
    return "tpu_custom_call" in text and found is not None and "splash" in found[1]


def _goes_back(name: str) -> bool:
    return "dkv" in name


def _blocks(text: str, shapes: list[Shape]) -> tuple[int, int, float]:
    """A device's blocks of queries, those of keys, and what part of their pairs is not masked.

    Of devices that share a row by its tokens, the one with the last of them sees the most of the
    past; the others wait for it, and what it does is counted.
    """
    queries, keys = shapes[0][-2], shapes[1][-2]
    block = flash.largest_block(queries)
    own, blocks = queries // block, keys // block
    causal = "causal" in re.search(r'op_name="([^"]*)"', text)[1]
    return own, blocks, 1 - (own - 1) / (2 * blocks) if causal else 1.0
