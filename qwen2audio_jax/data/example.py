"""What is learned from, whatever it was made from: typed segments and the clips that they hear.

What cannot be used is a `BadSample` that says why, for whoever counts them to decide.
"""

import dataclasses
import numbers
import os
import re
from collections.abc import Mapping
from typing import Any

from qwen2audio_jax import audio as sound
from qwen2audio_jax.data import storage
from qwen2audio_jax.processor import Wave
from qwen2audio_jax.prompt import (
    AUDIO,
    AUDIO_BOS,
    AUDIO_EOS,
    IM_END,
    IM_START,
    PAD,
    Prompt,
    seconds,
    unwrap,
)

LONGEST = 30.0  # seconds that the encoder hears at once
HEARD = (*storage.WEB, "file", "data")  # URLs that audio.load takes
# What a prompt is built with and ended by; tags of time, language and task are a data set's to use.
CONTROL = re.compile("|".join(map(re.escape, (PAD, IM_START, IM_END, AUDIO, AUDIO_BOS, AUDIO_EOS))))
TOLD = 300  # letters of what is wrong with a sample
HALF = re.compile("[\ud800-\udfff]")  # of a letter
# How audio.load says that there is nothing, rather than something broken.
ABSENT = ("there is no such file", "the server answered", "cannot be fetched")
# No sample's fault: they end a run. Whatever else a sample raises is counted.
FATAL = (ImportError, MemoryError)
UNFORESEEN = "unforeseen"  # the reason of what is no BadSample


class BadSample(ValueError):
    """One line: what is wrong with a sample.

    Attributes:
      reason: a short slug to count it under: "missing audio", "too long", ...
    """

    def __init__(self, reason: str, message: str):
        super().__init__(reason, _line(message))  # both, or workers could not pass it on
        self.reason = reason

    def __str__(self) -> str:
        return ": ".join(self.args)


def why(error: Exception) -> tuple[str, str]:
    """Of a sample that cannot be used: what to count it under, foreseen or not, and a line.

    Raises:
      ImportError, MemoryError: as they are; no sample is to blame.
    """
    if isinstance(error, FATAL):
        raise error
    if isinstance(error, BadSample):
        return error.reason, str(error)
    return UNFORESEEN, _line(f"{type(error).__name__}: {error}")


def _line(text: str) -> str:
    """The text as every log and checkpoint can hold it: not without end, as some samples are, and
    with halves of letters spelt out, as in file names."""
    text, half = text.encode("utf-8", "backslashreplace").decode("utf-8"), TOLD // 2 - 2
    return text if len(text) <= TOLD else f"{text[:half]}...{text[-half:]}"


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One row: a prompt with what is learned in it, and its clips.

    Attributes:
      words: the tokens of what is said in each clip, none where that is not known; () if in none.
    """

    prompt: Prompt
    waves: tuple[Wave, ...]
    words: tuple[list[int], ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """Two answers to one prompt; the clips are the prompt's."""

    prompt: Prompt
    chosen: Prompt
    rejected: Prompt
    waves: tuple[Wave, ...]


def hear(source: Any, longest: float = LONGEST, **piece: Any) -> Wave:
    """Loads a clip of at most `longest` seconds, or a piece of one.

    Args:
      source: what `audio.load` takes, a URL of any storage that fsspec knows (gs://, s3://),
        or what `prompt.unwrap` does.
      piece: `audio.load`'s offset and duration.

    Raises:
      BadSample: "missing audio", "corrupt audio", "silent" or "too long".
      ImportError: a storage's package is not installed.
    """
    return hear_fetched(source, longest, **piece)[0]


def hear_fetched(source: Any, longest: float = LONGEST, **piece: Any) -> tuple[Wave, Any]:
    """The same, and what `audio.load` took: the file's bytes, of what only fsspec knows."""
    try:
        source = unwrap(source)
        piece = {name: seconds(value, name) for name, value in piece.items() if value is not None}
    except ValueError as error:
        raise BadSample("corrupt audio", str(error)) from None
    if source is None or source == "":
        raise BadSample("missing audio", "wanted a clip, got none")
    try:
        scheme = storage.elsewhere(source) if isinstance(source, str) else None
        found = _stored(source) if scheme and scheme not in HEARD else source
        return sound.load(found, longest=longest, **piece), found
    except sound.AudioError as error:
        # by the name that it was given
        told = f"{sound.name(source)}{str(error).removeprefix(sound.name(found))}"
        if isinstance(error, sound.TooLong):
            raise BadSample("too long", told) from None
        if isinstance(error, sound.Silent):
            raise BadSample("silent", told) from None
        absent = any(words in told for words in ABSENT)
        raise BadSample("missing audio" if absent else "corrupt audio", told) from None


def _stored(path: str) -> bytes:
    try:
        return storage.read(path)
    except (OSError, ValueError) as error:  # a package that is not installed is no sample's fault
        raise BadSample("missing audio", str(error)) from None


def on_disk(path: str | os.PathLike, wanted: str = "a folder on a disk to write to") -> None:
    """Refuses storage elsewhere for what is read or written with the disk's own calls.

    Raises:
      ValueError: the path was given as gs://..., say.
    """
    if found := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)", os.fspath(path)):
        raise ValueError(f"wanted {wanted}, got {found[1]}://{found[2]}")


def plain(text: str, where: str) -> str:
    """The text, which is only said.

    Raises:
      BadSample: "special token in text": it would end an answer, or begin a turn or a clip; "not
        text": half a letter, which JSON can hold and no tokenizer takes.
    """
    if HALF.search(text):
        raise BadSample("not text", f"{where}: wanted letters, got half of one in {text!r}")
    if found := CONTROL.search(text):
        raise BadSample("special token in text", f"{where}: wanted no {found[0]}, got {text!r}")
    return text


def is_empty(value: Any) -> bool:
    """Whether a field says nothing, in whatever way tables and data sets have for it."""
    if isinstance(value, Mapping):  # a clip, as datasets has it
        named = value.keys() & {"array", "bytes", "path"}
        return bool(named) and all(is_empty(value[name]) for name in named)
    if isinstance(value, numbers.Number):
        return bool(value != value)  # NaN
    return value is None or (isinstance(value, str | bytes) and not value.strip())


def as_text(value: Any, where: str) -> str:
    """What a field says, "" if it is empty.

    Raises:
      BadSample: "not text", or as `plain`.
    """
    if is_empty(value):  # tables' cells
        return ""
    if isinstance(value, bytes):  # what TensorFlow's data sets have for strings
        value = value.decode("utf-8", "replace")
    if isinstance(value, bool) or not isinstance(value, str | numbers.Number):
        raise BadSample("not text", f"{where}: wanted a text, got {type(value).__name__}")
    return plain(str(value).strip(), where)
