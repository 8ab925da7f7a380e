"""A task's line -> its parts: literal text, and slots for a sample's fields.

A new type of slot is a function that `slot_type` registers.
"""

import dataclasses
import functools
import re
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from qwen2audio_jax.data.example import CONTROL, LONGEST
from qwen2audio_jax.processor import Wave

LINE = re.compile(
    r"(?P<slot>\[(?:\\.|[^\\\[\]])*(?P<close>\])?)|(?P<arrow>\s*->(?P<gap>\s?)\s*)|(?P<escaped>\\.)"
    r"|(?P<space>\s+)|(?P<text>[^\s\[\\-]+|-|\\)",
    re.DOTALL,
)
ESCAPES = {"n": "\n", "t": "\t"}


@dataclasses.dataclass(frozen=True)
class Filled:
    """What stands in a part's place: text with one `<|AUDIO|>` per clip."""

    text: str
    waves: tuple[Wave, ...] = ()
    words: tuple[str, ...] = ()  # said in each clip; empty where that is not known
    learned: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlotType:
    """What a slot of some type does with a value, and which attributes it takes."""

    fill: Callable[[Any, "Slot", Mapping], Filled]
    heard: bool  # stands apart from text, and is no answer
    # (value, column) -> value; read with the line, and no matter afterwards
    attributes: Mapping[str, Callable] = dataclasses.field(compare=False, repr=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slot:
    """A place for a field of the sample.

    It has its type with it: worker processes know only those that their own imports register.
    """

    type: str
    kind: SlotType
    field: str
    no_loss: bool = False
    optional: bool = False
    closed_set: str | tuple[str, ...] | None = None  # the name of a field, or the set
    max_seconds: float = LONGEST
    offset: str | None = None  # names of fields: the piece of a recording that is heard
    duration: str | None = None
    words: str | None = None  # and what is said in it
    # Those that its type alone has, as its parsers made them.
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)


Part = str | Slot

TYPES: dict[str, SlotType] = {}


def slot_type(
    name: str,
    *,
    attributes: Iterable[str] = (),
    parsers: Mapping[str, Callable[[str], Any]] = types.MappingProxyType({}),
    heard: bool = False,
) -> Callable:
    """Registers a function (value, slot, sample) -> Filled as what fills `[name:...]`.

    The function stands in a module that can be imported, as workers do, and that is imported
    before a line is read.

    Args:
      attributes: those that other types have too, fields of a `Slot`.
      parsers: new attributes; each makes of the text behind `name=` ("" if there is none) a value
        in `slot.attributes`, or raises ValueError.
      heard: whether it is a clip, rather than text.

    Raises:
      ValueError: nothing reads an attribute, or two would.
    """
    shared = ("no_loss", "optional", *attributes)
    if unread := [each for each in shared if each not in ATTRIBUTES]:
        wanted = f"attributes of {', '.join(ATTRIBUTES)}, or parsers of new ones"
        raise ValueError(f"slot type {name}: wanted {wanted}, got {', '.join(unread)}")
    if twice := [each for each in parsers if each in ATTRIBUTES]:
        raise ValueError(f"slot type {name}: wanted parsers of new names, got {', '.join(twice)}")
    readers = {each: ATTRIBUTES[each] for each in shared}
    readers |= {each: functools.partial(_own, each, parse) for each, parse in parsers.items()}

    def register(fill: Callable) -> Callable:
        TYPES[name] = SlotType(fill=fill, attributes=readers, heard=heard)
        return fill

    return register


def heard(part: Part) -> bool:
    return isinstance(part, Slot) and part.kind.heard


def parts_of(line: str, *, arrows: int) -> list[list[Part]]:
    """Reads what stands before, between and behind a line's arrows.

    Raises:
      ValueError: the line is wrong; the message says at which column.
    """
    _refuse_control(line)
    sides: list[list[Part]] = [[]]
    for found in LINE.finditer(line):
        side, column, kind = sides[-1], found.start() + 1, found.lastgroup
        if kind == "slot":
            if found["close"] is None:
                wanted = f"']' to close the slot of column {column}"
                at = found.end()
                got = repr(line[at]) if at < len(line) else "the end of the line"
                raise _wrong(at + 1, wanted, got)
            slot = _slot(found[0], column, behind=len(sides) > 1)
            if slot.no_loss and side and str(side[-1]).endswith("<|"):
                raise _wrong(column, "a tag, <|...|>, that is learned as a whole", "no_loss in it")
            side.append(slot)
        elif kind == "arrow":
            if len(sides) > arrows:
                column += found[0].index("-")
                raise _wrong(column, f"{arrows} of '->' (literal: '\\->')", "one more")
            # text that nothing precedes begins with no space
            sides.append([found["gap"]] if side and found["gap"] else [])
        elif kind == "space":
            edge = found.end() == len(line) or (not side and len(sides) == 1)
            if not edge and not (side and heard(side[-1])):
                side.append(found[0])
        elif found[0] == "\\":
            raise _wrong(column, r"a character behind '\'", "the end of the line")
        else:
            side.append(_unescape(found[0]))
    if len(sides) <= arrows:
        raise _wrong(len(line) + 1, "'->' before what is learned", "the end of the line")
    if arrows and not any(isinstance(part, Slot) or part.strip() for part in sides[-1]):
        raise _wrong(len(line) + 1, "what is learned behind '->'", "the end of the line")
    said = [part for part in sides[-1] if isinstance(part, Slot) or part.strip()]
    if said and isinstance(said[-1], Slot) and said[-1].no_loss:
        raise _wrong(len(line) + 1, "what is learned behind no_loss", "the end of the line")
    return sides


def _refuse_control(line: str) -> None:
    """Refuses in literal text what slots of clips and the end bring by themselves."""
    text, columns = "", []
    for found in LINE.finditer(line):
        literal = "\n" if found.lastgroup in ("slot", "arrow") else _unescape(found[0])
        text += literal
        columns += range(found.start() + 1, found.start() + 1 + len(literal))
    if control := CONTROL.search(text):
        wanted = "text without special tokens (clips, '[AUDIO:FIELD]', and the end bring their own)"
        raise _wrong(columns[control.start()], wanted, control[0])


def _slot(text: str, column: int, *, behind: bool) -> Slot:
    (head, at), *rest = _split(text[1:-1], ",", column + 1)
    name, _, field = head.partition(":")
    if name not in TYPES:
        raise _wrong(at, f"a slot type of {', '.join(TYPES)}", repr(name))
    if not field.strip():
        raise _wrong(at + len(name), "':' and the name of a field", "none")
    kind, settings = TYPES[name], {}
    for attribute, at in rest:
        key, equals, value = attribute.partition("=")
        key = key.strip()
        if key not in kind.attributes:
            taken = ", ".join(sorted(kind.attributes))
            raise _wrong(at, f"an attribute of {name} ({taken})", repr(key))
        if key in settings:
            raise _wrong(at, f"{key} once", "it again")
        settings[key] = kind.attributes[key](value if equals else None, at + len(key) + len(equals))
        if key == "no_loss" and not behind:
            raise _wrong(at, "no_loss behind the arrow", "it before, where nothing is learned")
    if behind and kind.heard and "no_loss" not in settings:
        raise _wrong(column, f"no_loss for an {name} slot behind the arrow", "none")
    own = {key: settings.pop(key) for key in [*settings] if key not in ATTRIBUTES}
    return Slot(type=name, kind=kind, field=_unescape(field.strip()), attributes=own, **settings)


def _flag(value: str | None, column: int) -> bool:
    if value is not None:
        raise _wrong(column, "an attribute without a value", repr(value))
    return True


def _set(value: str | None, column: int) -> str | tuple[str, ...]:
    texts = [(_unescape(text), at) for text, at in _split(value or "", "|", column)]
    for text, at in texts:
        if not text:
            raise _wrong(at, "a field, or texts parted by '|'", "nothing")
    return texts[0][0] if len(texts) == 1 else tuple(text for text, _ in texts)


def _seconds(value: str | None, column: int) -> float:
    try:
        seconds = float(value or "")
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= LONGEST:
        raise _wrong(column, f"seconds above 0 and up to {LONGEST:g}", repr(value or ""))
    return seconds


def _name(value: str | None, column: int) -> str:
    if not value:
        raise _wrong(column, "the name of a field", "nothing")
    return _unescape(value)


def _own(name: str, parse: Callable[[str], Any], value: str | None, column: int) -> Any:
    try:
        return parse(_unescape(value or ""))
    except ValueError as error:
        raise ValueError(f"column {column}: {name}: {error}") from None


ATTRIBUTES = {  # that types share: fields of a Slot
    "no_loss": _flag,
    "optional": _flag,
    "closed_set": _set,
    "max_seconds": _seconds,
    "offset": _name,
    "duration": _name,
    "words": _name,
}


def _split(text: str, separator: str, column: int) -> list[tuple[str, int]]:
    """What stands between separators that are not escaped, each with its column."""
    pieces = [("", column)]
    for found in re.finditer(r"\\.|.", text, re.DOTALL):
        if found[0] == separator:
            pieces.append(("", column + found.end()))
        else:
            pieces[-1] = pieces[-1][0] + found[0], pieces[-1][1]
    return [(piece.strip(), at + len(piece) - len(piece.lstrip())) for piece, at in pieces]


def _unescape(text: str) -> str:
    return re.sub(r"\\(.)", lambda found: ESCAPES.get(found[1], found[1]), text, flags=re.DOTALL)


def _wrong(column: int, wanted: str, got: str) -> ValueError:
    return ValueError(f"column {column}: wanted {wanted}, got {got}")
