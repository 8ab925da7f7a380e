"""A compiled program's text -> operations, bytes and collectives, with loops counted in full.

`cost_analysis()` counts the body of a loop once, and does not see into TPU kernels.
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterator

import numpy as np

from qwen2audio_jax.training import operations

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{\s*$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|token|[a-z]+\d+\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_FLOATING = re.compile(r"b?f\d+\[")
_CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations)=(\{[^}]*\}|%[\w.\-]+)")
_ALIASED = re.compile(r"output_to_operand_aliasing=\{(.*?\))\}(?:,|$)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')

COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
TO_ALL = ("all-to-all", "ragged-all-to-all")
# what moves nothing by itself
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while"),
    *("conditional", "call", "partition-id", "replica-id", "async-start", "async-update"),
    *("optimization-barrier", "domain"),
}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    type: str
    op: str
    operands: tuple[str, ...]
    rest: str  # operands and attributes as they are written
    root: bool

    @functools.cached_property
    def called(self) -> list[str]:
        found = _CALLED.findall(self.rest)
        return [name for text in found for name in re.findall(r"%([\w.\-]+)", text)]


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
    """

    kind: str
    bytes: float
    shape: str
    group: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...]
    times: float
    where: str
    channel: str | None


@dataclasses.dataclass
class Costs:
    """Of one device in one run of a program."""

    flops: float = 0.0
    bytes: float = 0.0
    collectives: list[Collective] = dataclasses.field(default_factory=list)

    def by_kind(self) -> dict[str, dict[str, float]]:
        number, moved = Counter(), Counter()
        for each in self.collectives:
            number[each.kind] += each.times
            moved[each.kind] += each.times * each.bytes
        return {kind: {"count": number[kind], "bytes": moved[kind]} for kind in sorted(number)}


class Program:
    """A program as `compiled.as_text()` gives it.

    Args:
      unknown: how often a loop goes round whose number of rounds depends on data.
    """

    def __init__(self, text: str, *, devices: int, unknown: int = 1):
        self.devices, self.unknown = devices, unknown
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry, body = "", {}
        for line in _whole_lines(text):
            if found := _LINE.match(line):
                root, name, kind, op, rest = found.groups()
                inner = rest[: _end(rest)]
                operands = tuple(re.findall(r"%([\w.\-]+)", inner))
                body[name] = Instruction(name, kind, op, operands, rest, bool(root))
            elif found := _HEAD.match(line):
                body = self.computations.setdefault(found[2], {})
                self.entry = found[2] if found[1] else self.entry

    def arrays(self) -> Iterator[tuple[int, ...]]:
        """The shape of every array that the program names."""
        for body in self.computations.values():
            for each in body.values():
                for _, dims, _ in _ARRAY.findall(each.type):
                    yield _dims(dims)

    def costs(self) -> Costs:
        costs = Costs()
        self._walk(self.entry, 1.0, costs, fused=False)
        costs.collectives = _each_once(costs.collectives)
        return costs

    def _walk(self, name: str, times: float, costs: Costs, *, fused: bool) -> None:
        body = self.computations[name]
        for each in body.values():
            inner = times
            if each.op == "while":
                inner = times * self._trips(each, body)
            if each.op in ("while", "fusion", "call", "conditional", "async-start", "custom-call"):
                for called in each.called:
                    if called in self.computations:
                        within = fused or each.op in ("fusion", "custom-call")
                        self._walk(called, inner, costs, fused=within)
            costs.flops += times * self._flops(each, body)
            kind = each.op.removesuffix("-start")
            if kind in COLLECTIVES:
                costs.collectives.append(self._collective(kind, each, body, times))
            elif not fused and each.op not in _FREE and not each.op.endswith("-done"):
                costs.bytes += times * self._bytes(each, body)

    def _trips(self, loop: Instruction, body: dict[str, Instruction]) -> float:
        """How often a loop goes round that counts up to what its condition compares with.

        Loops in which products wait for their parts count by twos: they are unrolled.
        """
        if known := _TRIPS.search(loop.rest):
            return float(known[1])
        condition, inside = (
            self.computations[re.search(rf"{name}=%?([\w.\-]+)", loop.rest)[1]]
            for name in ("condition", "body")
        )
        test = _root(condition)
        if test.op != "compare" or "direction=LT" not in test.rest:
            return float(self.unknown)
        counter, bound = (condition[name] for name in test.operands)
        given, made = body.get(loop.operands[0]), _root(inside)
        if (
            counter.op != "get-tuple-element"
            or given is None
            or (given.op, made.op) != ("tuple", "tuple")
        ):
            return float(self.unknown)
        if bound.op == "get-tuple-element":
            bound = _origin(given.operands[_index(bound)], body)
        start = _origin(given.operands[_index(counter)], body)
        added = _origin(made.operands[_index(counter)], inside)
        if added.op != "add" or bound.op != "constant":
            return float(self.unknown)
        steps = [_origin(name, inside) for name in added.operands]
        step = next((_number(each) for each in steps if each.op == "constant"), 1)
        first = _number(start) if start.op == "constant" else 0
        return float(max(0, -(-(_number(bound) - first) // step)))

    def _flops(self, each: Instruction, body: dict[str, Instruction]) -> float:
        if each.op not in ("dot", "convolution", "custom-call"):
            return 0.0
        operands = [body[name].type for name in each.operands if name in body]
        shapes = list(map(_shape, operands))
        if each.op == "dot":
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", each.rest)
            sizes = [shapes[0][i] for i in _dims(contracted[1])]
            return 2.0 * math.prod(_shape(each.type)) * math.prod(sizes)
        if each.op == "convolution":
            return operations.convolution(each.rest, *shapes[:2], _shape(each.type))
        floating = [_shape(kind) for kind in operands if _FLOATING.match(kind)]
        return operations.kernel(each.name, each.rest, floating)

    def _bytes(self, each: Instruction, body: dict[str, Instruction]) -> float:
        """Bytes that go from and to memory: of what is sliced or updated, the part alone."""
        if each.op in ("dynamic-slice", "slice", "gather"):
            return 2 * _size(each.type)
        if each.op == "dynamic-update-slice":
            return 2 * _size(body[each.operands[1]].type)
        operands = [body[name].type for name in each.operands if name in body]
        if each.op == "copy-start":
            return sum(map(_size, operands)) + _size(_first(each.type))
        if each.op.endswith("-start"):  # a part of what is the first of its types
            part = _ARRAY.findall(each.type)[1]
            return _plain_size(f"{part[0]}[{part[1]}]") + _size(
                f"{part[0]}[{part[1]}]{{{part[2]}}}"
            )
        if each.op == "custom-call" and "tpu_custom_call" not in each.rest:
            return 0.0  # marks for the compiler
        if each.op != "fusion" or not each.called:
            return sum(map(_size, operands)) + _size(each.type)
        inside = self.computations[each.called[0]]
        return self._read(inside, operands) + self._written(inside, each)

    def _read(self, inside: dict[str, Instruction], operands: list[str]) -> float:
        total = 0.0
        parameters = [each for each in inside.values() if each.op == "parameter"]
        for each in parameters:
            number = int(each.rest.partition(")")[0])
            users = [user for user in inside.values() if each.name in user.operands]
            whole = _size(operands[number]) if number < len(operands) else 0
            part = 0.0
            for user in users:
                if (
                    user.op in ("dynamic-slice", "slice", "gather")
                    and each.name == user.operands[0]
                ):
                    part += _plain_size(user.type)
                elif user.op != "tuple" and (
                    user.op != "dynamic-update-slice" or each.name != user.operands[0]
                ):
                    part = whole
                    break
            total += min(part, whole)
        return total

    def _written(self, inside: dict[str, Instruction], each: Instruction) -> float:
        kind, root = each.type, _root(inside)
        if passed := _ALIASED.search(each.rest):  # outputs that are operands as they were
            numbers = {int(n) for n in re.findall(r"\{(\d+)[\d,]*\}:", passed[1])}
            arrays = [found[0] for found in _ARRAY.finditer(kind)]
            if numbers and root.op == "tuple" and len(arrays) == len(root.operands):
                return sum(_size(array) for i, array in enumerate(arrays) if i not in numbers)
        while root.op == "bitcast" and root.operands[0] in inside:
            root = inside[root.operands[0]]
        if root.op == "dynamic-update-slice":
            return min(_size(kind), _plain_size(inside[root.operands[1]].type))
        return _size(kind)

    def _collective(self, kind, each, body, times) -> Collective:
        group = _group(each.rest, self.devices)
        n = len(group)
        arrays = [f"{dtype}[{dims}]" for dtype, dims, _ in _ARRAY.findall(each.type)]
        given = len(each.operands)
        # what begins one gives what it takes in, and then what comes out
        results = arrays[given : 2 * given] if len(arrays) >= 2 * given else arrays
        size = sum(map(_plain_size, results))
        share = {
            "all-reduce": 2 * (n - 1) / n,
            "reduce-scatter": n - 1,  # the result is a part of what came in
            "collective-permute": 1,
        }.get(kind, (n - 1) / n)
        where = re.search(r'op_name="([^"]*)"', each.rest)
        channel = re.search(r"channel_id=(\d+)", each.rest)
        return Collective(
            kind=kind,
            bytes=size * share,
            shape=each.type,
            group=group,
            pairs=_pairs(each.rest),
            times=times,
            where=where[1] if where else "",
            channel=channel and channel[1],
        )


def _each_once(collectives: list[Collective]) -> list[Collective]:
    """Without repetitions: what begins, waits for and ends an exchange each name it."""
    known: dict[str, Collective] = {}
    for number, each in enumerate(collectives):
        key = each.channel or f"without {number}"
        if key not in known or each.times > known[key].times:
            known[key] = each
    return list(known.values())


def _root(body: dict[str, Instruction]) -> Instruction:
    return next(each for each in body.values() if each.root)


def _origin(name: str, body: dict[str, Instruction]) -> Instruction:
    """Where a value comes from, copies aside."""
    each = body[name]
    while each.op in ("copy", "copy-done", "copy-start") and each.operands[0] in body:
        each = body[each.operands[0]]
    return each


def _index(element: Instruction) -> int:
    return int(re.search(r"index=(\d+)", element.rest)[1])


def _number(constant: Instruction) -> int:
    return int(constant.rest.partition(")")[0])


def _whole_lines(text: str) -> Iterator[str]:
    """Lines; what is told of a kernel may itself have several."""
    held = ""
    for line in text.splitlines():
        if line.startswith(('"', "}}")):
            held += line
            continue
        yield held
        held = line
    yield held


def _end(text: str) -> int:
    """Where the parenthesis closes that is open at the start."""
    depth = 1
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return i
    return len(text)


def _dims(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)


def _shape(kind: str) -> tuple[int, ...]:
    found = _ARRAY.search(kind)
    return _dims(found[2]) if found else ()


def _first(kind: str) -> str:
    found = _ARRAY.search(kind)
    return found[0] if found else ""


def _width(dtype: str) -> float:
    if dtype in ("pred", "token"):
        return float(dtype == "pred")
    return int(re.search(r"\d+", dtype)[0]) / 8


def _plain_size(kind: str) -> float:
    return sum(_width(dtype) * math.prod(_dims(dims)) for dtype, dims, _ in _ARRAY.findall(kind))


def _size(kind: str) -> float:
    """Bytes in the device's main memory: S(1) and on are others, nearer or the host's."""
    return sum(
        _width(dtype) * math.prod(_dims(dims))
        for dtype, dims, layout in _ARRAY.findall(kind)
        if not re.search(r"S\([1-9]", layout)
    )


def _group(text: str, devices: int) -> tuple[int, ...]:
    """The first group of devices that exchange something.

    Raises:
      ValueError: it is written in no form that is known.
    """
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return _dims(found[1])
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, order, turned = (_dims(x or "") for x in found.groups())
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
        numbers = numbers.reshape(_dims(found[1]))
        numbers = (numbers.transpose(_dims(found[2])) if found[2] else numbers).ravel()
    numbers, group = numbers.reshape(tuple(sizes.values())), np.zeros(1, int)
    stride = dict(zip(sizes, (np.array(numbers.strides) // numbers.itemsize).tolist(), strict=True))
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes):
        count = int(size or sizes[name])
        step = stride[name] * (sizes[name] // (int(before or 1) * count))
        group = (group[:, None] + step * np.arange(count)).ravel()
    return tuple(int(n) for n in numbers.ravel()[group])


def _pairs(text: str) -> tuple[tuple[int, int], ...]:
    """The devices that send, each with the one that it sends to."""
    found = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}", text)
    pairs = re.findall(r"\{(\d+),(\d+)\}", found[1]) if found else []
    return tuple((int(a), int(b)) for a, b in pairs)
