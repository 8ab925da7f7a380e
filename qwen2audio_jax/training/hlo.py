"""A compiled program's text -> operations, bytes and collectives, with loops counted in full.

`cost_analysis()` counts the body of a loop once, and does not see into TPU kernels.
"""

import dataclasses
import functools
import math
import re
import types
from collections import Counter
from collections.abc import Iterator, Mapping

from qwen2audio_jax.training import arrays, collectives, operations
from qwen2audio_jax.training.collectives import Collective

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{\s*$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_FLOATING = re.compile(r"b?f\d+\[")
_CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations)=(\{[^}]*\}|%[\w.\-]+)")
_ALIASED = re.compile(r"output_to_operand_aliasing=\{(.*?\))\}(?:,|$)")
_SCOPES = re.compile(r'op_name="([^"]*)"')
_MEETING = re.compile(r'_xla_host_transfer_rendezvous="[^"]*"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')

# what moves nothing by itself
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while"),
    *("conditional", "call", "partition-id", "replica-id", "async-start", "async-update"),
    *("optimization-barrier", "domain", "recv"),
}
_CALLS = ("while", "fusion", "call", "conditional", "async-start", "custom-call")
# what takes a device long enough to hide an exchange
_WORK = {"dot", "convolution", *_CALLS}
# what touches a part of its first operand: a result of its own or, of an update, the second one
_PARTS = ("copy", "slice", "dynamic-slice", "gather", "dynamic-update-slice")


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


@dataclasses.dataclass
class Costs:
    """Of one device in one run of a program.

    Attributes:
      bytes: from and to its memory.
      host: bytes from and to the host's.
    """

    flops: float = 0.0
    bytes: float = 0.0
    host: float = 0.0
    collectives: list[Collective] = dataclasses.field(default_factory=list)

    def by_kind(self) -> dict[str, dict[str, float]]:
        number, moved = Counter(), Counter()
        for each in self.collectives:
            number[each.kind] += each.times
            moved[each.kind] += each.times * each.bytes
        return {kind: {"count": number[kind], "bytes": moved[kind]} for kind in sorted(number)}

    def of_each(self, steps: int) -> "Costs":
        """What each of so many steps costs, that a run takes together."""
        exchanged = [dataclasses.replace(x, times=x.times / steps) for x in self.collectives]
        return Costs(self.flops / steps, self.bytes / steps, self.host / steps, exchanged)


class Program:
    """A program as `compiled.as_text()` gives it.

    Args:
      unknown: how often a loop goes round whose number of rounds depends on data.
      scopes: the same of those within a `jax.named_scope`, by its name.
    """

    def __init__(
        self,
        text: str,
        *,
        devices: int,
        unknown: int = 1,
        scopes: Mapping[str, int] = types.MappingProxyType({}),
    ):
        self.devices, self.unknown, self.scopes = devices, unknown, scopes
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

    def shapes(self) -> Iterator[tuple[int, ...]]:
        """Of every array that the program names."""
        for body in self.computations.values():
            for each in body.values():
                yield from map(arrays.shape, arrays.each(each.type))

    def costs(self) -> Costs:
        costs = Costs()
        self._walk(self.entry, 1.0, costs, fused=False, hidden=False)
        costs.collectives = collectives.each_once(costs.collectives)
        return costs

    def _walk(self, name: str, times: float, costs: Costs, *, fused: bool, hidden: bool) -> None:
        """Adds up a computation and what it calls.

        Args:
          fused: whether it goes on within one instruction, and so in no memory of its own.
          hidden: whether other work goes on meanwhile.
        """
        body = self.computations[name]
        for each in body.values():
            inner = times * self._trips(each, body) if each.op == "while" else times
            for called in each.called if each.op in _CALLS else ():
                if called in self.computations:
                    self._walk(
                        called,
                        inner,
                        costs,
                        fused=fused or each.op in ("fusion", "custom-call"),
                        # Of exchanges, those are fused that are begun and awaited apart.
                        hidden=hidden or each.op in ("fusion", "async-start"),
                    )
            costs.flops += times * self._flops(each, body)
            kind = each.op.removesuffix("-start")
            if kind in collectives.KINDS:
                costs.collectives.append(
                    collectives.read(
                        kind,
                        each.type,
                        each.rest,
                        len(each.operands),
                        self.devices,
                        times=times,
                        exposed=not hidden and _exposed(each, body),
                    )
                )
            elif each.op == "send":  # what is received is told by what is sent for it
                told = {"times": times, "exposed": not hidden and _exposed(each, body)}
                found = collectives.between_slices(each.type, each.rest, **told)
                costs.collectives += [found] if found else []
            elif not fused and each.op not in _FREE and not each.op.endswith("-done"):
                costs.bytes += times * self._bytes(each, body)
                costs.host += times * _to_host(each, body)

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
            return self._said(loop)
        counter, bound = (condition[name] for name in test.operands)
        given, made = body.get(loop.operands[0]), _root(inside)
        if (
            counter.op != "get-tuple-element"
            or given is None
            or (given.op, made.op) != ("tuple", "tuple")
        ):
            return self._said(loop)
        if bound.op == "get-tuple-element":
            bound = _origin(given.operands[_index(bound)], body)
        start = _origin(given.operands[_index(counter)], body)
        added = _origin(made.operands[_index(counter)], inside)
        if added.op != "add" or bound.op != "constant":
            return self._said(loop)
        steps = [_origin(name, inside) for name in added.operands]
        step = next((_number(each) for each in steps if each.op == "constant"), 1)
        first = _number(start) if start.op == "constant" else 0
        return float(max(0, -(-(_number(bound) - first) // step)))

    def _said(self, loop: Instruction) -> float:
        """How often a loop goes round of which the text does not tell."""
        found = _SCOPES.search(loop.rest)
        # `jit(update)/transpose(jvp(scope))/while`, forward without the transpose
        within = re.split(r"[/()]", found[1]) if found else ()
        named = (self.scopes[name] for name in reversed(within) if name in self.scopes)
        return float(next(named, self.unknown))

    def _flops(self, each: Instruction, body: dict[str, Instruction]) -> float:
        if each.op not in ("dot", "convolution", "custom-call"):
            return 0.0
        operands = [body[name].type for name in each.operands if name in body]
        shapes = list(map(arrays.shape, operands))
        if each.op == "dot":
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", each.rest)
            sizes = [shapes[0][i] for i in arrays.dims(contracted[1])]
            return 2.0 * math.prod(arrays.shape(each.type)) * math.prod(sizes)
        if each.op == "convolution":
            return operations.convolution(each.rest, *shapes[:2], arrays.shape(each.type))
        return operations.kernel(each.name, each.rest, _floating(operands)[0])

    def _bytes(self, each: Instruction, body: dict[str, Instruction]) -> float:
        """Bytes that go from and to memory: of what is sliced or updated, the part alone."""
        operands = [body[name].type for name in each.operands if name in body]
        if each.op == "copy-start":
            return sum(map(_main, operands)) + _main(arrays.each(each.type)[0])
        if (part := _part(each, body)) is not None and each.op != "copy":
            whole = arrays.within(operands[0], "main")
            return arrays.size(part) * whole + _main(part)
        if each.op == "custom-call" and "tpu_custom_call" not in each.rest:
            return 0.0  # marks for the compiler
        if each.op == "custom-call":
            again = operations.read_again(each.name, each.rest, *_floating(operands))
            return sum(map(_main, operands)) + _main(each.type) + again
        if each.op != "fusion" or not each.called:
            return sum(map(_main, operands)) + _main(each.type)
        inside = self.computations[each.called[0]]
        return self._read(inside, operands) + self._written(inside, each)

    def _read(self, inside: dict[str, Instruction], operands: list[str]) -> float:
        sizes = [_main(kind) for kind in operands]
        given = _parameters(inside).items()
        parts = (self._used(each, inside, sizes[i]) for i, each in given if i < len(sizes))
        return sum(parts, start=0.0)

    def _used(self, value: Instruction, inside: dict[str, Instruction], whole: float) -> float:
        """Of a value's bytes, those that a fusion, or one within it, really reads."""
        part = 0.0
        for user in inside.values():
            if value.name not in user.operands:
                continue
            first = value.name == user.operands[0]
            if first and user.op in ("dynamic-slice", "slice", "gather"):
                part += arrays.size(user.type)
            elif user.op == "bitcast":
                part += self._used(user, inside, whole)
            elif user.op == "fusion" and user.called:
                within = self.computations[user.called[0]]
                for number, each in _parameters(within).items():
                    if user.operands[number] != value.name:
                        continue
                    part += self._used(each, within, whole)
                    if each is _unchanged(_root(within), within):  # it is read by those behind it
                        part += self._used(user, inside, whole)
            elif user.op != "tuple" and not (first and user.op == "dynamic-update-slice"):
                return whole
        return min(part, whole)

    def _written(self, inside: dict[str, Instruction], each: Instruction) -> float:
        kind, root = each.type, _root(inside)
        if passed := _ALIASED.search(each.rest):  # outputs that are operands as they were
            numbers = {int(n) for n in re.findall(r"\{(\d+)[\d,]*\}:", passed[1])}
            parts = arrays.each(kind)
            if numbers and root.op == "tuple" and len(parts) == len(root.operands):
                return sum(_main(part) for i, part in enumerate(parts) if i not in numbers)
        root = _unchanged(root, inside)
        if root.op == "dynamic-update-slice":
            return min(_main(kind), arrays.size(inside[root.operands[1]].type))
        return _main(kind)


def _exposed(each: Instruction, body: dict[str, Instruction]) -> bool:
    """Whether a device waits for an exchange: it has no beginning and end of their own, or nothing
    that takes time lies between these."""
    begins = {each.name}
    if mark := _MEETING.search(each.rest):  # hosts carry it: it ends as what they bring is there
        begins = {x.name for x in body.values() if x.op == "recv" and mark[0] in x.rest}
    elif not each.op.endswith("-start"):
        return True
    after = list(body.values())[list(body).index(each.name) + 1 :]
    for number, other in enumerate(after):
        if begins.intersection(other.operands) and other.op.endswith("-done"):
            return not any(between.op in _WORK for between in after[:number])
    return False


def _part(each: Instruction, body: dict[str, Instruction]) -> str | None:
    """The type of what is copied, read of an array or written into it; None: of other work."""
    kind = each.op.removesuffix("-start")
    if kind not in _PARTS:
        return None
    if kind == "dynamic-update-slice":
        return body[each.operands[1]].type
    if each.op == kind:
        return each.type
    # its operands, its result and what it is awaited by; a copy has its result first
    return arrays.each(each.type)[0 if kind == "copy" else len(each.operands)]


def _to_host(each: Instruction, body: dict[str, Instruction]) -> float:
    """Bytes that go from the host's memory or to it."""
    operands = [body[name].type for name in each.operands if name in body]
    if not any(arrays.size(kind, "host") for kind in (*operands, each.type)):
        return 0.0
    if (part := _part(each, body)) is not None:
        return arrays.size(part)
    if each.op == "custom-call":
        return 0.0  # room that is set aside
    return sum(arrays.size(kind, "host") for kind in (*operands, each.type))


def _parameters(inside: dict[str, Instruction]) -> dict[int, Instruction]:
    """What a computation is given, by its number."""
    return {
        int(each.rest.partition(")")[0]): each for each in inside.values() if each.op == "parameter"
    }


def _floating(kinds: list[str]) -> tuple[list[tuple[int, ...]], list[float]]:
    """Shapes and bytes of what is of floating point."""
    those = [kind for kind in kinds if _FLOATING.match(kind)]
    return list(map(arrays.shape, those)), list(map(arrays.size, those))


def _main(kind: str) -> float:
    return arrays.size(kind, "main")


def _root(body: dict[str, Instruction]) -> Instruction:
    return next(each for each in body.values() if each.root)


def _unchanged(value: Instruction, body: dict[str, Instruction]) -> Instruction:
    """What a value is of the same bytes as."""
    while value.op == "bitcast" and value.operands[0] in body:
        value = body[value.operands[0]]
    return value


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
