"""What chips can do: peaks from their makers' tables, and how their links are laid out."""

import dataclasses
from collections.abc import Iterator, Sequence

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak rates of one chip.

    Attributes:
      flops: dense bfloat16 operations per second.
      hbm: bytes of memory.
      bandwidth: bytes per second from and to it.
      link: bytes per second of one link to a neighbour, one way.
      ring: from how many chips on an axis its ends are linked, in multiples of so many.
      dcn: bytes per second from one chip to another slice.
      kind: how jax calls a device.
      cores: devices that jax sees in a chip, which share its rates and memory.
    """

    flops: float
    hbm: int
    bandwidth: float
    link: float
    ring: int
    dcn: float
    kind: str
    cores: int = 1


# Sources: cloud.google.com/tpu/docs, a page for each; "How to Scale Your Model" (jax-ml.github.io/
# scaling-book), "TPU specs", for links, rings and the network.
# fmt: off
CHIPS = {
    #            flops    memory     bandwidth links  ring dcn
    "v4":  Chip(275e12,   32 * GIB,  1.23e12, 45e9,   4,  6.25e9,  "TPU v4"),
    "v5e": Chip(197e12,   16 * GIB,  8.19e11, 45e9,  16,  3.125e9, "TPU v5 lite"),
    "v5p": Chip(459e12,   95 * GIB,  2.77e12, 90e9,   4,  6.25e9,  "TPU v5"),
    "v6e": Chip(918e12,   32 * GIB,  1.64e12, 90e9,  16,  12.5e9,  "TPU v6 lite"),
    "7x":  Chip(2307e12, 192 * GIB,  7.38e12, 100e9,  4,  12.5e9,  "TPU7x", cores=2),
}
# fmt: on


def links(chip: Chip, group: Sequence[Sequence[int]], shape: Sequence[int]) -> float:
    """Bytes per second that each of a group of chips can take in at the same time.

    Args:
      group: the chips' places in the topology.
      shape: of the topology, in chips.
    """
    axes = [i for i, _ in enumerate(shape) if len({place[i] for place in group}) > 1]
    whole = lambda i: len({place[i] for place in group}) == shape[i]
    return chip.link * max(1, sum(2 if wraps(chip, shape[i]) and whole(i) else 1 for i in axes))


def wraps(chip: Chip, size: int) -> bool:
    """Whether the ends of an axis of so many chips are linked."""
    return size % chip.ring == 0


def route(
    chip: Chip, start: Sequence[int], end: Sequence[int], shape: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """The links that lead from one chip to another, an axis after the other, the shorter way.

    Yields:
      A link: the chip that it leaves, its axis, and its direction, 1 or -1.
    """
    at = list(start)
    for axis, size in enumerate(shape):
        far = end[axis] - at[axis]
        if wraps(chip, size) and 2 * abs(far) > size:
            far -= size if far > 0 else -size
        step = 1 if far > 0 else -1
        for _ in range(abs(far)):
            yield tuple(at), axis, step
            at[axis] = (at[axis] + step) % size
