"""What chips can do: peaks from their makers' tables, and how their links are laid out."""

import dataclasses
from collections.abc import Iterator, Sequence

GIB = 2**30
CUBE = 4  # chips along each edge of what optical switches join


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak rates of one chip.

    Attributes:
      flops: dense bfloat16 operations per second.
      hbm: GiB of memory that a program may take on one device; the compiler keeps the rest.
      bandwidth: bytes per second from and to it.
      link: bytes per second of one link to a neighbour, one way.
      ring: from how many chips on an axis its ends are linked, in multiples of so many; CUBE: on
        all three axes at once.
      dcn: bytes per second from one chip to another slice.
      host: bytes per second from the host's memory or to it: it goes there in the forward pass and
        comes back in the backward one.
      kind: how jax calls a device.
      cores: devices that jax sees in a chip, which share its rates.
    """

    flops: float
    hbm: float
    bandwidth: float
    link: float
    ring: int
    dcn: float
    host: float
    kind: str
    cores: int = 1


# Sources: cloud.google.com/tpu/docs, a page for each; "How to Scale Your Model" (jax-ml.github.io/
# scaling-book), "TPU specs", for links, rings, the network and PCIe to the host (1.5e10 bytes a
# second and chip, twice that from v6e on; of 7x it says nothing). Memory is what libtpu 0.0.42 says
# when it refuses a program; tests/test_tpu.py asks it again.
# fmt: off
CHIPS = {
    #            flops    memory  bandwidth links  ring dcn      host
    "v4":  Chip(275e12,   30.75,  1.23e12, 45e9,   4,  6.25e9,  1.5e10, "TPU v4"),
    "v5e": Chip(197e12,   15.75,  8.19e11, 45e9,  16,  3.125e9, 1.5e10, "TPU v5 lite"),
    "v5p": Chip(459e12,   95.74,  2.77e12, 90e9,   4,  6.25e9,  1.5e10, "TPU v5"),
    "v6e": Chip(918e12,   31.25,  1.64e12, 90e9,  16,  12.5e9,  3.2e10, "TPU v6 lite"),
    "7x":  Chip(2307e12,  94.75,  7.38e12, 100e9,  4,  12.5e9,  3.2e10, "TPU7x", cores=2),
}
# fmt: on


def links(
    chip: Chip, group: Sequence[Sequence[int]], shape: Sequence[int], *, to_all: bool = False
) -> float:
    """Bytes per second that each of a group of chips can take in at the same time.

    Args:
      group: the chips' places in the topology.
      shape: of the topology, in chips.
      to_all: whether each sends something else to each of the others, which crosses the middle of
        an axis, rather than the same to all, which goes from neighbour to neighbour.
    """
    counts = [len({place[i] for place in group}) for i, _ in enumerate(shape)]
    whole = lambda i: counts[i] == shape[i] and wraps(chip, shape, i)
    axes = [i for i, count in enumerate(counts) if count > 1]
    if to_all and axes:
        # Half of what half of a line's chips have goes over its middle; a ring has two. Of what a
        # chip has, its own part stays.
        others = 1 - 1 / len(set(map(tuple, group)))
        return chip.link * others * min((8 if whole(i) else 4) / counts[i] for i in axes)
    return chip.link * max(1, sum(2 if whole(i) else 1 for i in axes))


def wraps(chip: Chip, shape: Sequence[int], axis: int) -> bool:
    """Whether the ends of an axis are linked; in three dimensions all are, or none."""
    if chip.ring == CUBE:
        return all(size % CUBE == 0 for size in shape)
    return shape[axis] % chip.ring == 0


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
        if wraps(chip, shape, axis) and 2 * abs(far) > size:
            far -= size if far > 0 else -size
        step = 1 if far > 0 else -1
        for _ in range(abs(far)):
            yield tuple(at), axis, step
            at[axis] = (at[axis] + step) % size
