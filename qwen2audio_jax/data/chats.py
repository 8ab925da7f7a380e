"""Rows of conversations, and of pairs of answers to them -> examples."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qwen2audio_jax import audio as sound
from qwen2audio_jax.data.example import BadSample, Example, Pair, as_text, hear, plain
from qwen2audio_jax.processor import Processor, Wave
from qwen2audio_jax.prompt import CLIPS, HEARD, PIECE, Prompt, parse

AUDIOS, PLACE = "audios", "<audio>"  # ms-swift's clips beside a conversation, and where each goes
RESPONSE = "rejected_response"  # ms-swift's, beside messages that end with the chosen one
DROPPED = ("rejected_audios", "tools")  # ms-swift's, too: both answers hear the same, and call none
SOUNDS = (*HEARD, AUDIOS)  # the names of what is to be heard


def from_messages(record: Mapping, processor: Processor) -> Example:
    """Compiles {"messages": [...]}: a conversation whose assistant turns are learned.

    What is said in a clip may stand beside it, for CTC to learn from:
    {"type": "audio", "audio": "a.wav", "words": "what is that"}.

    A turn with {"loss": false} or {"weight": 0} is not learned.

    Clips are parts of a content or, as ms-swift writes them, in a list beside the messages, with
    an `<audio>` for each in texts that are no answers: {"messages": [...], "audios": ["a.wav"]};
    or with a part for each that names none, {"type": "audio"}. A piece of a recording has its
    "offset" and "duration" in seconds beside it. What a row's "system" says comes first.

    Raises:
      BadSample: a clip's reason, "missing field", "empty text", "not text", "special token in
        text" or "bad conversation".
    """
    messages = _with_system(record, _field(record, "messages"))
    messages = _listen(_conversation(messages, _beside(record)))
    _check_answers(messages)
    prompt, waves = _compile(processor, messages, learn=True)
    parts = [part for m in messages if not isinstance(m["content"], str) for part in m["content"]]
    words = [part.get("words", "") for part in parts if part["type"] == "audio"]
    return Example(prompt, waves, tuple(map(processor.tokenizer.encode, words)))


def from_preference(record: Mapping, processor: Processor) -> Pair:
    """Compiles {"messages": [...], "chosen": ..., "rejected": ...}.

    Answers are texts, messages, or lists of messages. TRL's conversational form has the messages
    under "prompt", where a text is a user's turn. Where both lists of answers begin with their
    prompt, as in UltraFeedback, it is theirs, whatever else says it once more. ms-swift's form has
    the chosen answer at the messages' end: {"messages": [...], "rejected_response": "..."}. Clips
    are as in `from_messages`.

    Raises:
      BadSample: as in `from_messages`; "equal answers" where there is nothing to prefer.
    """
    given, chosen, rejected = _pair(record)
    clips = _beside(record)
    if given is None or (_begins(chosen) and _begins(rejected)):
        chosen, rejected = (
            _with_system(record, _placed(answer, clips)) for answer in (chosen, rejected)
        )
        _check_twice(given, clips, chosen)
        shared, clips = _shared(chosen, rejected), ()
        given, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    else:
        given = [{"role": "user", "content": given}] if isinstance(given, str) else given
        given = _with_system(record, given)
    messages = _listen(_conversation(given, clips))
    prompt, waves = _compile(processor, messages, learn=False)
    chosen, rejected = (_answer(processor, messages, turns) for turns in (chosen, rejected))
    if chosen == rejected:
        raise BadSample("equal answers", "wanted chosen and rejected to differ, got the same")
    return Pair(prompt, chosen, rejected, waves)


def is_pair(record: Mapping) -> bool:
    """Whether a row has two answers."""
    has = lambda *names: all(record.get(name) is not None for name in names)
    return has("chosen", "rejected") or has("messages", RESPONSE)


def is_conversation(record: Mapping) -> bool:
    """Whether a row has messages; if it has two answers besides, they do without those."""
    messages = record.get("messages")
    if messages is None or not is_pair(record):
        return messages is not None
    last = messages[-1] if isinstance(messages, Sequence) and messages else None
    return isinstance(last, Mapping) and last.get("role") == "assistant"


def says_words(record: Mapping) -> bool:
    """Whether a row of messages says what is said in any of its clips, as `from_messages` reads."""
    messages = record.get("messages")
    messages = messages if isinstance(messages, Sequence) else ()
    contents = [message.get("content") for message in messages if isinstance(message, Mapping)]
    parts = [part for each in contents if isinstance(each, Sequence) for part in each]
    return any(isinstance(part, Mapping) and _are_words(part.get("words")) for part in parts)


def _are_words(value: Any) -> bool:
    try:
        return as_text(value, "words") != ""
    except BadSample:  # counted when it is drawn to be learned
        return False


def _field(record: Mapping, name: str) -> Any:
    if record.get(name) is None:
        raise BadSample("missing field", f"no {name!r} among {', '.join(record) or 'no fields'}")
    return record[name]


def _with_system(record: Mapping, messages: Any) -> list:
    """The messages behind what ms-swift's `system` says, unless they begin with that."""
    messages, text = list(_list(messages, "messages")), record.get("system")
    if text in (None, ""):
        return messages
    first = messages[0] if messages else None
    if isinstance(first, Mapping) and first.get("role") == "system":
        if first.get("content") != text:
            wanted = "what is in 'system' or the first message to say it, got both"
            raise BadSample("bad conversation", f"wanted {wanted}")
        return messages
    return [{"role": "system", "content": text}, *messages]


def _beside(record: Mapping) -> Sequence:
    """The clips beside a conversation."""
    _check_heard({**record, AUDIOS: None}, "the row")
    for name in DROPPED:
        if not _is_nothing(record.get(name)):
            wanted = f"a row without {name!r}, which no answer would depend on"
            raise BadSample("bad conversation", f"wanted {wanted}, got {record[name]!r}")
    return _list([] if record.get(AUDIOS) is None else record[AUDIOS], "clips")


def _list(value: Any, of: str) -> Sequence:
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        got = type(value).__name__
        raise BadSample("bad conversation", f"wanted a list of {of}, got {got}")
    return value


def _placed(messages: Any, clips: Sequence) -> list:
    """The messages with the clips in their places; an `<audio>` in an answer is text."""
    messages, left = _list(messages, "messages"), iter(clips)
    asked = [_parts(message) for message in messages]
    places = sum(map(_is_place, itertools.chain(*asked)))
    if places != len(clips):
        wanted = f"a clip in {AUDIOS!r} for each of {places} {PLACE}"
        raise BadSample("bad conversation", f"wanted {wanted}, got {len(clips)}")
    put = lambda part: {**part, "audio": next(left)} if _is_place(part) else part
    return [
        {**message, "content": [*map(put, parts)]} if any(map(_is_place, parts)) else message
        for message, parts in zip(messages, asked, strict=True)
    ]


def _parts(message: Any) -> list:
    """A message's parts, if it is no answer; of a text, what stands between its places."""
    asks = isinstance(message, Mapping) and message.get("role") != "assistant"
    content = message.get("content") if asks else None
    if isinstance(content, str):
        pieces = [piece for piece in re.split(f"({PLACE})", content) if piece]
        return [{"type": "audio"} if p == PLACE else {"type": "text", "text": p} for p in pieces]
    return [*content] if isinstance(content, Sequence) and not isinstance(content, bytes) else []


def _is_place(part: Any) -> bool:
    """Whether a clip belongs here that is named elsewhere."""
    if not isinstance(part, Mapping) or part.get("type") not in HEARD:
        return False
    return all(part.get(name) is None for name in CLIPS)


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
            plain(part.get("text", ""), where)
            if "words" in part:
                part["words"] = as_text(part["words"], f"{where}: words")
    return messages


def _check_heard(fields: Mapping, where: str, *, clips: int = 0) -> None:
    """Refuses sound of which nobody would hear anything."""
    found = [name for name in SOUNDS if not _is_nothing(fields.get(name))]
    if len(found) > clips:
        wanted = f"each clip as a part of its own, or in a row's {AUDIOS!r}"
        raise BadSample("bad conversation", f"{where}: wanted {wanted}, got {found[-1]!r}")


def _is_nothing(value: Any) -> bool:
    """Whether a column says nothing, as tables fill what is absent."""
    return value is None or (isinstance(value, Sequence) and (not value or value == "[]"))


def _listen(messages: list[dict]) -> list[dict]:
    """The same messages with every clip loaded."""
    for message in messages:
        if not isinstance(message["content"], str):
            message["content"] = [
                _heard(part) if part["type"] == "audio" else part for part in message["content"]
            ]
    return messages


def _heard(part: Mapping) -> dict:
    piece = {name: part[name] for name in PIECE if name in part}
    rest = {name: value for name, value in part.items() if name not in piece}
    return {**rest, "audio": (hear(part["audio"], **piece), sound.SAMPLE_RATE)}


def _compile(
    processor: Processor, messages: list[dict], *, learn: bool
) -> tuple[Prompt, tuple[Wave, ...]]:
    try:
        prompt, waves = processor.conversation(messages, learn=learn, long_audio="error")
    except ValueError as error:
        raise BadSample("bad conversation", str(error)) from None
    return prompt, tuple(waves)


def _pair(record: Mapping) -> tuple[Any, Any, Any]:
    """What a row is asked, None where its answers alone say it, and both answers."""
    if record.get("rejected") is None and record.get(RESPONSE) is not None:
        messages = _list(_field(record, "messages"), "messages")
        return messages[:-1], messages[-1:], _turns(record[RESPONSE])
    chosen, rejected = (_turns(_field(record, name)) for name in ("chosen", "rejected"))
    given = next((record[key] for key in ("messages", "prompt") if record.get(key)), None)
    return given, chosen, rejected


def _check_twice(given: Any, clips: Sequence, whole: list) -> None:
    """Refuses messages whose clips are not in what an answer says of them once more."""
    if given is None or isinstance(given, str):
        return
    wanted, got = _clips(_conversation(given, clips)), _clips(_conversation(whole))
    if got < wanted:
        where = "in the answers, which begin with their prompt"
        raise BadSample("bad conversation", f"wanted {wanted} clips {where}, too, got {got}")


def _clips(messages: list[dict]) -> int:
    parts = [part for m in messages if not isinstance(m["content"], str) for part in m["content"]]
    return sum(part["type"] == "audio" for part in parts)


def _turns(answer: Any) -> Any:
    if isinstance(answer, str):
        return [{"role": "assistant", "content": answer}]
    return [answer] if isinstance(answer, Mapping) else answer


def _begins(turns: Any) -> bool:
    """Whether an answer has its prompt at its head."""
    first = turns[0] if isinstance(turns, Sequence) and turns else None
    return isinstance(first, Mapping) and first.get("role") != "assistant"


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
