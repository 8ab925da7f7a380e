"""What devices exchange: who with whom, how much, and whether they wait for it."""

import dataclasses
import math
import re
from collections.abc import Iterable

import numpy as np

from qwen2audio_jax.training import arrays

KINDS = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
TO_ALL = ("all-to-all", "ragged-all-to-all")
# What hosts carry between slices, as the compiler calls it, and what of `size` bytes that each
# device sends it takes in, of n slices.
NETWORK = {
    "ALL_REDUCE": ("all-reduce", lambda size, n: 2 * size * (n - 1) / n),
    "ALL_GATHER": ("all-gather", lambda size, n: size * (n - 1)),
    "REDUCE_SCATTER": ("reduce-scatter", lambda size, n: size * (n - 1) / n),
    "ALL_TO_ALL": ("all-to-all", lambda size, n: size * (n - 1) / n),
    "ONE_TO_ONE": ("collective-permute", lambda size, n: size),
}
FIRST = 100_000  # a slice's first device in what they carry: its number times this


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of exchange.

    Attributes:
      bytes: that each device takes in, each time.
      shape: of its result.
      group: the devices of the first group, as numbers in the program's order.
      pairs: of a collective-permute, who sends to whom.
      times: how often it happens.
      channel: what the compiler knows it by, in each part of the program that works on it.
      exposed: whether devices do nothing else meanwhile.
      network: whether hosts carry it, between slices; then it has no group.
    """

    kind: str
    bytes: float
    shape: str
    group: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...]
    times: float
    where: str
    channel: str | None
    exposed: bool
    network: bool = False


def read(
    kind: str, result: str, text: str, given: int, devices: int, *, times: float, exposed: bool
) -> Collective:
    """An exchange as it is written.

    Args:
      result: the instruction's type.
      text: what follows its name: operands and attributes.
      given: how many operands it has.
      devices: of the program.
    """
    members = group(text, devices)
    n = len(members)
    each = arrays.each(result)
    # what begins one gives what it takes in, and then what comes out
    results = each[given : 2 * given] if len(each) >= 2 * given else each
    share = {
        "all-reduce": 2 * (n - 1) / n,
        "reduce-scatter": n - 1,  # the result is a part of what came in
        "collective-permute": 1,
    }.get(kind, (n - 1) / n)
    where = re.search(r'op_name="([^"]*)"', text)
    channel = re.search(r"channel_id=(\d+)", text)
    return Collective(
        kind=kind,
        bytes=sum(map(arrays.size, results)) * share,
        shape=result,
        group=members,
        pairs=_pairs(text),
        times=times,
        where=where[1] if where else "",
        channel=channel and channel[1],
        exposed=exposed,
    )


def between_slices(result: str, text: str, *, times: float, exposed: bool) -> Collective | None:
    """What a `send` has the hosts carry to other slices; None: it is of something else.

    Raises:
      ValueError: it is of a kind that is not known.
    """
    if (found := re.search(r'_xla_megascale_transfer_type="(\w+)"', text)) is None:
        return None
    if found[1] not in NETWORK:
        raise ValueError(f"wanted an exchange of {', '.join(NETWORK)}, got {found[1]}")
    kind, takes = NETWORK[found[1]]
    first = re.search(r'_xla_megascale_target="?\{+([^}]*)\}(x?)', text)
    numbers = [int(number) for number in re.findall(r"\d+", first[1])]
    # slices, each with the same devices: {1,2}x{0:255}; or devices: {{100000,100001,200000,200001}}
    slices = {*numbers} if first[2] else {number // FIRST for number in numbers}
    channel = re.search(r"channel_id=(\d+)", text)
    return Collective(
        kind=f"{kind} between slices",
        bytes=takes(arrays.size(arrays.each(result)[0]), len(slices)),
        shape=result,
        group=(),
        pairs=(),
        times=times,
        where="",
        channel=channel and channel[1],
        exposed=exposed,
        network=True,
    )


def each_once(found: Iterable[Collective]) -> list[Collective]:
    """Without repetitions: what begins, waits for and ends an exchange each name it."""
    known: dict[str, Collective] = {}
    for number, each in enumerate(found):
        key = each.channel or f"without {number}"
        if key not in known or each.times > known[key].times:
            known[key] = each
    return list(known.values())


def group(text: str, devices: int) -> tuple[int, ...]:
    """The first group of devices that exchange something.

    Raises:
      ValueError: it is written in no form that is known.
    """
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return arrays.dims(found[1])
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, order, turned = (arrays.dims(x or "") for x in found.groups())
        numbers = np.arange(math.prod(order)).reshape(order)
        numbers = numbers.transpose(turned) if turned else numbers
        return tuple(int(n) for n in numbers.reshape(shape)[0])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](.*?) ?\{([^}]*)\}", text):
        return _along_axes(*found.groups())
    if pairs := _pairs(text):
        return pairs[0]
    if (found := re.search(r"replica_groups=(\S*)", text)) is None or found[1].startswith("{}"):
        return tuple(range(devices))
    raise ValueError(f"wanted replica_groups in a known form, got {found[1]}")


def _along_axes(mesh: str, order: str, axes: str) -> tuple[int, ...]:
    """The first group along axes `'a','b'` of a mesh `'a'=2,'b'=4`.

    `'b':(2)2` is a part of an axis, 2 of its devices, of which the ones of a part of 2 are apart.

    Raises:
      ValueError: the mesh's devices are in an order that is not understood.
    """
    sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", mesh)}
    numbers = np.arange(math.prod(sizes.values()))
    if order:  # `, device_ids=([4,2]T(1,0))`: counted in this shape, with its axes turned
        found = re.fullmatch(r", device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", order)
        if found is None:
            raise ValueError(f"wanted a mesh in a known order, got {order}")
        numbers = numbers.reshape(arrays.dims(found[1]))
        numbers = (numbers.transpose(arrays.dims(found[2])) if found[2] else numbers).ravel()
    numbers, found = numbers.reshape(tuple(sizes.values())), np.zeros(1, int)
    stride = dict(zip(sizes, (np.array(numbers.strides) // numbers.itemsize).tolist(), strict=True))
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes):
        count = int(size or sizes[name])
        step = stride[name] * (sizes[name] // (int(before or 1) * count))
        found = (found[:, None] + step * np.arange(count)).ravel()
    return tuple(int(n) for n in numbers.ravel()[found])


def _pairs(text: str) -> tuple[tuple[int, int], ...]:
    """The devices that send, each with the one that it sends to."""
    found = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}", text)
    pairs = re.findall(r"\{(\d+),(\d+)\}", found[1]) if found else []
    return tuple((int(a), int(b)) for a, b in pairs)
