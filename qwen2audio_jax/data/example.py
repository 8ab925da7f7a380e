"""What is learned from, whatever it was made from: typed segments and the clips that they hear.

What cannot be used is a `BadSample` that says why, for whoever counts them to decide.
"""

import dataclasses
import os
import re
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
    unwrap,
)

LONGEST = 30.0  # seconds that the encoder hears at once
HEARD = (*storage.WEB, "file", "data")  # URLs that audio.load takes
# What a prompt is built with and ended by; tags of time, language and task are a data set's to use.
CONTROL = re.compile("|".join(map(re.escape, (PAD, IM_START, IM_END, AUDIO, AUDIO_BOS, AUDIO_EOS))))
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
        super().__init__(reason, _whole(message))  # both, or workers could not pass it on
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
    return UNFORESEEN, _whole(f"{type(error).__name__}: {error}")


def _whole(text: str) -> str:
    """The text with halves of letters spelt out, as in file names, which no log could hold."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


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


def hear(source: Any, longest: float = LONGEST) -> Wave:
    """Loads a clip of at most `longest` seconds.

    Args:
      source: what `audio.load` takes, a URL of any storage that fsspec knows (gs://, s3://),
        or what `prompt.unwrap` does.

    Raises:
      BadSample: "missing audio", "corrupt audio" or "too long".
      ImportError: a storage's package is not installed.
    """
    try:
        source = unwrap(source)
    except ValueError as error:
        raise BadSample("corrupt audio", str(error)) from None
    if source is None or source == "":
        raise BadSample("missing audio", "wanted a clip, got none")
    try:
        scheme = storage.elsewhere(source) if isinstance(source, str) else None
        found = _stored(source) if scheme and scheme not in HEARD else source
        return sound.load(found, longest=longest)
    except sound.TooLong as error:
        length = str(error).removeprefix(sound.name(found))  # by the name that it was given
        raise BadSample("too long", f"{sound.name(source)}{length}") from None
    except sound.AudioError as error:
        absent = any(words in str(error) for words in ABSENT)
        raise BadSample("missing audio" if absent else "corrupt audio", str(error)) from None


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
