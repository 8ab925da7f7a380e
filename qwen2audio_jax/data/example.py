"""A sample, whatever it was made from -> typed segments and the clips that they hear.

What cannot be used is a `BadSample` that says why, for whoever counts them to decide.
"""

import dataclasses
import os
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
# No sample's fault: they end a run. Whatever else a sample raises is counted, foreseen or not.
FATAL = (ImportError, MemoryError)
AUDIOS, PLACE = "audios", "<audio>"  # ms-swift's clips beside a conversation, and where each goes
SOUNDS = ("audio", "audio_url", "input_audio", AUDIOS)  # the names of what is to be heard


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
      BadSample: "special token in text": it would end an answer, or begin a turn or a clip.
    """
    if found := CONTROL.search(text):
        raise BadSample("special token in text", f"{where}: wanted no {found[0]}, got {text!r}")
    return text


def from_messages(record: Mapping, processor: Processor) -> Example:
    """Compiles {"messages": [...]}: a conversation whose assistant turns are learned.

    What is said in a clip may stand beside it, for CTC to learn from:
    {"type": "audio", "audio": "a.wav", "words": "what is that"}.

    Clips are parts of a content or, as ms-swift writes them, in a list beside the messages, with
    an `<audio>` for each in texts that are no answers: {"messages": [...], "audios": ["a.wav"]}.

    Raises:
      BadSample: a clip's reason, "missing field", "empty text", "special token in text" or "bad
        conversation".
    """
    messages = _listen(_conversation(_field(record, "messages"), _beside(record)))
    _check_answers(messages)
    prompt, waves = _compile(processor, messages, learn=True)
    parts = [part for m in messages if not isinstance(m["content"], str) for part in m["content"]]
    words = [part.get("words", "") for part in parts if part["type"] == "audio"]
    return Example(prompt, waves, tuple(map(processor.tokenizer.encode, words)))


def from_preference(record: Mapping, processor: Processor) -> Pair:
    """Compiles {"messages": [...], "chosen": ..., "rejected": ...}.

    Answers are texts, messages, or lists of messages. TRL's conversational form has the messages
    under "prompt", or at the head of both lists of answers. Clips are as in `from_messages`.

    Raises:
      BadSample: as in `from_messages`; "equal answers" where there is nothing to prefer.
    """
    chosen, rejected = (_turns(_field(record, name)) for name in ("chosen", "rejected"))
    clips = _beside(record)
    given = next((record[key] for key in ("messages", "prompt") if record.get(key)), None)
    if given is None:
        chosen, rejected = _placed(chosen, clips), _placed(rejected, clips)
        shared, clips = _shared(chosen, rejected), ()
        given, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    messages = _listen(_conversation(given, clips))
    prompt, waves = _compile(processor, messages, learn=False)
    chosen, rejected = (_answer(processor, messages, turns) for turns in (chosen, rejected))
    if chosen == rejected:
        raise BadSample("equal answers", "wanted chosen and rejected to differ, got the same")
    return Pair(prompt, chosen, rejected, waves)


def _field(record: Mapping, name: str) -> Any:
    if record.get(name) is None:
        raise BadSample("missing field", f"no {name!r} among {', '.join(record) or 'no fields'}")
    return record[name]


def _beside(record: Mapping) -> Sequence:
    """The clips beside a conversation."""
    _check_heard({**record, AUDIOS: None}, "the row")
    return _list([] if record.get(AUDIOS) is None else record[AUDIOS], "clips")


def _list(value: Any, of: str) -> Sequence:
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        got = type(value).__name__
        raise BadSample("bad conversation", f"wanted a list of {of}, got {got}")
    return value


def _placed(messages: Any, clips: Sequence) -> list:
    """The messages with the clips in their places; an `<audio>` in an answer is text."""
    messages, left = _list(messages, "messages"), iter(clips)
    texts = [_asked(message) for message in messages]
    if (count := sum(text.count(PLACE) for text in texts)) != len(clips):
        wanted = f"a clip in {AUDIOS!r} for each of {count} {PLACE}"
        raise BadSample("bad conversation", f"wanted {wanted}, got {len(clips)}")
    part = lambda piece: {"audio": next(left)} if piece == PLACE else {"text": piece}
    parts = lambda text: [part(piece) for piece in re.split(f"({PLACE})", text) if piece]
    return [
        {**message, "content": parts(text)} if PLACE in text else message
        for message, text in zip(messages, texts, strict=True)
    ]


def _asked(message: Any) -> str:
    """A message's text, if it is no answer and has no parts."""
    asks = isinstance(message, Mapping) and message.get("role") != "assistant"
    text = message.get("content") if asks else None
    return text if isinstance(text, str) else ""


def _conversation(messages: Any, clips: Sequence = ()) -> list[dict]:
    given = _placed(messages, clips)
    try:
        messages = parse(given)
    except ValueError as error:
        raise BadSample("bad conversation", str(error)) from None
    for number, (message, raw) in enumerate(zip(messages, given, strict=True), 1):
        content, where = message["content"], f"message {number}"
        _check_heard(raw, where)
        if isinstance(content, str):
            plain(content, where)
            continue
        for part, raw_part in zip(content, raw["content"], strict=True):
            _check_heard(raw_part, where, clips=part["type"] == "audio")
            for name in ("text", "words"):
                plain(part.get(name, ""), where)
    return messages


def _check_heard(fields: Mapping, where: str, *, clips: int = 0) -> None:
    """Refuses sound of which nobody would hear anything."""
    given = {name: fields.get(name) for name in SOUNDS}
    empty = lambda value: value is None or (isinstance(value, Sequence) and not value)
    found = [name for name, value in given.items() if not empty(value)]
    if len(found) > clips:
        wanted = f"each clip as a part of its own, or in a row's {AUDIOS!r}"
        raise BadSample("bad conversation", f"{where}: wanted {wanted}, got {found[-1]!r}")


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
