"""A sample, whatever it was made from -> typed segments and the clips that they hear.

What cannot be used is a `BadSample` that says why, for whoever counts them to decide.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from qwen2audio_jax import audio as sound
from qwen2audio_jax.processor import Processor, Wave
from qwen2audio_jax.prompt import (
    AUDIO,
    AUDIO_BOS,
    AUDIO_EOS,
    IM_END,
    IM_START,
    PAD,
    Prompt,
    parse,
    unwrap,
)

LONGEST = 30.0  # seconds that the encoder hears at once
STORAGE = re.compile(r"(?!https?|file|data)\w+://")  # what epath reaches and audio.load does not
# What a prompt is built with and ended by; tags of time, language and task are a data set's to use.
CONTROL = re.compile("|".join(map(re.escape, (PAD, IM_START, IM_END, AUDIO, AUDIO_BOS, AUDIO_EOS))))
# How audio.load says that there is nothing, rather than something broken.
ABSENT = ("there is no such file", "the server answered", "cannot be fetched")


# What else a sample may raise that nobody foresaw. An ImportError is not its fault: it ends a run.
UNFORESEEN = (ValueError, LookupError, TypeError, OSError, AttributeError, ArithmeticError)


class BadSample(ValueError):
    """One line: what is wrong with a sample.

    Attributes:
      reason: a short slug to count it under: "missing audio", "too long", ...
    """

    def __init__(self, reason: str, message: str):
        super().__init__(reason, message)  # both, or worker processes could not pass it on
        self.reason = reason

    def __str__(self) -> str:
        return ": ".join(self.args)


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
      source: what `audio.load` takes, any storage that etils.epath reaches (gs://, s3://), or
        what `prompt.unwrap` does.

    Raises:
      BadSample: "missing audio", "corrupt audio" or "too long".
      ImportError: a storage's package is not installed.
    """
    source = unwrap(source)
    if source is None or source == "":
        raise BadSample("missing audio", "wanted a clip, got none")
    try:
        if isinstance(source, str) and STORAGE.match(source):
            wave = sound.load(_stored(source))
        else:
            wave = sound.load(source)
    except sound.AudioError as error:
        absent = any(words in str(error) for words in ABSENT)
        raise BadSample("missing audio" if absent else "corrupt audio", str(error)) from None
    if (seconds := len(wave) / sound.SAMPLE_RATE) > longest:
        length = f"wanted at most {longest:g} s, got {seconds:.2f} s"
        raise BadSample("too long", f"{sound.name(source)}: {length}")
    return wave


def reachable(path: str) -> None:
    """Asks whether a storage's package is there, without asking the storage.

    Raises:
      ImportError: it is not; the message names it.
    """
    import fsspec  # what epath reaches other storage with

    if STORAGE.match(path):
        try:
            fsspec.get_filesystem_class(path.partition("://")[0])
        except ImportError as error:
            raise _unreachable(path, error) from None


def _unreachable(path: str, error: ImportError) -> ImportError:
    extra = {"gs": "gcs", "gcs": "gcs", "s3": "s3"}.get(path.partition("://")[0])
    how = f"; pip install 'qwen2audio_jax[{extra}]'" if extra else ""
    return ImportError(f"{path}: {error}{how}")


def _stored(path: str) -> bytes:
    try:
        return epath.Path(path).read_bytes()
    except ImportError as error:  # no sample's fault
        raise _unreachable(path, error) from None
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise BadSample("missing audio", f"{path}: {reason}") from None


def plain(text: str, where: str) -> str:
    """The text, which is only said.

    Raises:
      BadSample: "special token in text": it would end an answer, or begin a turn or a clip.
    """
    if found := CONTROL.search(text):
        raise BadSample("special token in text", f"{where}: wanted no {found[0]}, got {text!r}")
    return text


def from_messages(record: Mapping, processor: Processor) -> Example:
    """Compiles {"messages": [...]}: a conversation whose assistant turns are learned.

    What is said in a clip may stand beside it, for CTC to learn from:
    {"type": "audio", "audio": "a.wav", "words": "what is that"}.

    Raises:
      BadSample: a clip's reason, "missing field", "empty text", "special token in text" or "bad
        conversation".
    """
    messages = _listen(_conversation(_field(record, "messages")))
    _check_answers(messages)
    prompt, waves = _compile(processor, messages, learn=True)
    parts = [part for m in messages if not isinstance(m["content"], str) for part in m["content"]]
    words = [part.get("words", "") for part in parts if part["type"] == "audio"]
    return Example(prompt, waves, tuple(map(processor.tokenizer.encode, words)))


def from_preference(record: Mapping, processor: Processor) -> Pair:
    """Compiles {"messages": [...], "chosen": ..., "rejected": ...}.

    Answers are texts, messages, or lists of messages. TRL's conversational form has the messages
    under "prompt", or at the head of both lists of answers.

    Raises:
      BadSample: as in `from_messages`; "equal answers" where there is nothing to prefer.
    """
    chosen, rejected = (_turns(_field(record, name)) for name in ("chosen", "rejected"))
    given = next((record[key] for key in ("messages", "prompt") if record.get(key)), None)
    if given is None:
        shared = _shared(chosen, rejected)
        given, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    messages = _listen(_conversation(given))
    prompt, waves = _compile(processor, messages, learn=False)
    chosen, rejected = (_answer(processor, messages, turns) for turns in (chosen, rejected))
    if chosen == rejected:
        raise BadSample("equal answers", "wanted chosen and rejected to differ, got the same")
    return Pair(prompt, chosen, rejected, waves)


def _field(record: Mapping, name: str) -> Any:
    if record.get(name) is None:
        raise BadSample("missing field", f"no {name!r} among {', '.join(record) or 'no fields'}")
    return record[name]


def _conversation(messages: Any) -> list[dict]:
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        got = type(messages).__name__
        raise BadSample("bad conversation", f"wanted a list of messages, got {got}")
    try:
        messages = parse(messages)
    except ValueError as error:
        raise BadSample("bad conversation", str(error)) from None
    for number, message in enumerate(messages, 1):
        content = message["content"]
        for part in [{"text": content}] if isinstance(content, str) else content:
            for name in ("text", "words"):
                plain(part.get(name, ""), f"message {number}")
    return messages


def _listen(messages: list[dict]) -> list[dict]:
    """The same messages with every clip loaded."""
    for message in messages:
        if not isinstance(message["content"], str):
            message["content"] = [
                {**part, "audio": (hear(part["audio"]), sound.SAMPLE_RATE)}
                if part["type"] == "audio"
                else part
                for part in message["content"]
            ]
    return messages


def _compile(
    processor: Processor, messages: list[dict], *, learn: bool
) -> tuple[Prompt, tuple[Wave, ...]]:
    try:
        prompt, waves = processor.conversation(messages, learn=learn, long_audio="error")
    except ValueError as error:
        raise BadSample("bad conversation", str(error)) from None
    return prompt, tuple(waves)


def _turns(answer: Any) -> Any:
    if isinstance(answer, str):
        return [{"role": "assistant", "content": answer}]
    return [answer] if isinstance(answer, Mapping) else answer


def _shared(chosen: Any, rejected: Any) -> int:
    """How many messages both begin with: their prompt."""
    chosen, rejected = _conversation(chosen), _conversation(rejected)
    pairs = enumerate(zip(chosen, rejected, strict=False))
    try:
        return next((i for i, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
    except ValueError:  # arrays do not compare
        wanted = "clips as paths, or the prompt by itself"
        raise BadSample("bad conversation", f"wanted {wanted}, got arrays in both") from None


def _answer(processor: Processor, messages: list[dict], turns: Any) -> Prompt:
    """Compiles an answer by itself: its tokens are what would be generated behind the prompt."""
    turns = _conversation(turns)
    _check_answers(turns)
    try:
        given = processor.template.render(messages, add_generation_prompt=True)
        text, spans = processor.template.learned([*messages, *turns])
        spans = [(first - len(given), last - len(given)) for first, last in spans]
        learned = [(first, last) for first, last in spans if first >= 0]
        if not learned or learned[0][0] or turns[-1]["role"] != "assistant":
            raise ValueError("wanted an answer that begins and ends with an assistant's turn")
        answer = text[len(given) : len(given) + learned[-1][1]]
        return processor.tokenizer.compile(answer, learned=learned)
    except ValueError as error:
        raise BadSample("bad conversation", str(error)) from None


def _check_answers(messages: list[dict]) -> None:
    for number, message in enumerate(messages, 1):
        if message["role"] != "assistant":
            continue
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if any(part["type"] == "audio" for part in parts):
            raise BadSample("bad conversation", f"message {number}: an answer is text, got audio")
        if not "".join(part["text"] for part in parts).strip():
            raise BadSample("empty text", f"message {number}: the assistant says nothing")
