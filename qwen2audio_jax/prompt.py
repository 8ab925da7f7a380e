"""Conversations and clips -> token ids; ids -> text.

A prompt is a tuple of typed `Segment`s, whatever it was made from: a conversation, a base
model's line of text, a declared task. Ids, labels and the clips' places are all read off it.
"""

import base64
import binascii
import dataclasses
import datetime
import itertools
import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2.ext
import jinja2.sandbox
import numpy as np
import tokenizers

PAD, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TAG = re.compile(r"<\|[^\s|<>]+\|>")  # of a language, a task, a time: no word
AUDIO, AUDIO_BOS, AUDIO_EOS = "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"

HEARD = ("audio", "audio_url", "input_audio")  # types of parts
PIECE = ("offset", "duration")  # of a clip, in seconds
CLIPS = (*HEARD, "path", "url")  # what names the clip in one

ROLES = ("system", "user", "assistant", "tool")

# Templates look for a clip by its type, by "audio" or by "audio_url", and never at its value.
CLIP = {"type": "audio", "audio": "clip", "audio_url": "clip"}

# Source: transformers 5.23, Qwen2AudioProcessor.default_chat_template.
CHAT_TEMPLATE = (
    "{% set audio_count = namespace(value=0) %}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n"
    "{% else %}"
    "{% for content in message['content'] %}"
    "{% if 'audio' in content or 'audio_url' in content or message['type'] == 'audio'"
    " or content['type'] == 'audio' %}"
    "{% set audio_count.value = audio_count.value + 1 %}"
    "Audio {{ audio_count.value }}: <|audio_bos|><|AUDIO|><|audio_eos|>\n"
    "{% elif 'text' in content %}"
    "{{ content['text'] }}"
    "{% endif %}"
    "{% endfor %}"
    "<|im_end|>\n"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "<|im_start|>assistant\n"
    "{% endif %}"
)


def transcription(language: str = "en") -> str:
    """The base model's prompt for recognition, as the authors evaluate it; one clip, no chat."""
    instruction = f"Detect the language and recognize the speech: <|{language}|>"
    return f"{AUDIO_BOS}{AUDIO}{AUDIO_EOS}{instruction}"


@dataclasses.dataclass(frozen=True)
class Segment:
    """A run of tokens of one kind."""

    ids: tuple[int, ...]
    clip: int | None = None  # which of the prompt's clips fills these slots; None for text
    learned: bool = False  # whether the loss counts these tokens


Prompt = tuple[Segment, ...]


class Tokenizer:
    """A checkpoint's `tokenizer.json`, with the ids of the words that the model gives a meaning."""

    def __init__(self, path: pathlib.Path):
        if not path.is_file():
            raise ValueError(f"wanted a tokenizer at {path}, got no such file")
        try:
            self.core = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust library raises bare Exception
            raise ValueError(f"{path} is not a tokenizer: {error}") from error
        # transformers stores what its last call happened to use; a prompt is never cut or padded.
        self.core.no_truncation()
        self.core.no_padding()
        words = (PAD, IM_START, IM_END, AUDIO, AUDIO_BOS, AUDIO_EOS)
        ids = [self.core.token_to_id(word) for word in words]
        if missing := [word for word, number in zip(words, ids, strict=True) if number is None]:
            raise ValueError(f"{path} lacks the special tokens {', '.join(missing)}")
        self.pad_id, self.im_start_id, self.im_end_id = ids[:3]
        self.audio_id, self.audio_bos_id, self.audio_eos_id = ids[3:]

    def encode(self, text: str) -> list[int]:
        return self.core.encode(text).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.core.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def compile(
        self,
        text: str,
        counts: Sequence[int] = (),
        learned: Sequence[tuple[int, int]] = (),
        *,
        expanded: bool = False,
    ) -> Prompt:
        """Turns a prompt with one `<|AUDIO|>` per clip into segments.

        Args:
          text: the prompt, tokenized as a whole, but that what is learned begins with a token of
            its own, as when it is generated; special tokens in it count as such, also where a user
            wrote them: so does the reference.
          counts: audio tokens of each clip, in order.
          learned: character spans of `text` whose tokens the loss counts.
          expanded: `text` already has every clip's `<|AUDIO|>` as often as the clip has tokens.

        Raises:
          ValueError: the prompt's count of `<|AUDIO|>` is not what the clips need.
        """
        marked = np.zeros(len(text) + 1, bool)
        for first, last in learned:
            marked[first:last] = True
        starts = sorted({0, *(first for first, _ in learned if not (first and marked[first - 1]))})
        tokens = []
        for first, last in itertools.pairwise([*starts, len(text)]):
            encoding = self.core.encode(text[first:last], add_special_tokens=first == 0)
            offsets = (first + begin for begin, _ in encoding.offsets)
            tokens += zip(encoding.ids, offsets, strict=True)
        found = [token for token, _ in tokens].count(self.audio_id)
        wanted = sum(counts) if expanded else len(counts)
        if found != wanted:
            raise ValueError(
                f"the prompt has {found} {AUDIO}, wanted {wanted} for {len(counts)} clips"
                f" of {sum(counts)} audio tokens"
            )
        slots = iter(enumerate(counts))
        if expanded:
            slots = ((clip, 1) for clip, n in slots for _ in range(n))
        return tuple(
            Segment(tuple(token for token, _, _ in run), clip, learns)
            for (clip, learns), run in itertools.groupby(
                self._tokens(tokens, slots, marked), key=lambda token: token[1:]
            )
        )

    def _tokens(self, tokens, slots, marked) -> Iterator[tuple[int, int | None, bool]]:
        for token, first in tokens:
            if token == self.audio_id:
                clip, n = next(slots)
                yield from [(token, clip, False)] * n
            else:
                yield token, None, bool(marked[first])


class Detokenizer:
    """Gives text from ids one at a time, each piece as soon as its bytes are whole characters.

    All pieces and `flush()` together are `Tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.waiting: list[int] = []

    def __call__(self, token: int) -> str:
        self.waiting.append(int(token))
        text = self.tokenizer.decode(self.waiting)
        # Half a character decodes to U+FFFD. Byte-level tokens need no context to their left.
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self.waiting = []
        return text

    def flush(self) -> str:
        text = self.tokenizer.decode(self.waiting)
        self.waiting = []
        return text


class _Generation(jinja2.ext.Extension):
    """Lets `{% generation %}` pass: it marks assistant turns, which `learned` finds by itself."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message):
    raise jinja2.TemplateError(message)


class ChatTemplate:
    """A jinja2 chat template, run as transformers runs it."""

    def __init__(self, text: str = CHAT_TEMPLATE):
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = lambda x, **options: json.dumps(
            x, **{"ensure_ascii": False, **options}
        )
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        self.text = text
        try:
            self.template = environment.from_string(text)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template does not compile: {error}") from error

    def render(self, messages: Sequence[Mapping], *, add_generation_prompt: bool = False) -> str:
        try:
            return self.template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                eos_token=IM_END,
                pad_token=PAD,
            )
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise ValueError(f"the chat template refused the conversation: {error}") from error

    def learned(self, messages: Sequence[Mapping]) -> tuple[str, list[tuple[int, int]]]:
        """Renders a conversation and finds the assistant's turns in it.

        Returns:
          The text, and a span of characters per assistant turn that is learned: its content and
          what closes it. A turn with ms-swift's {"loss": false} or OpenAI's {"weight": 0} is not.

        Raises:
          ValueError: there is no such turn, or the template's text for a turn depends on what
            follows it, so that training would show what inference never sees.
        """
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise ValueError("nothing to learn: the conversation has no assistant turn")
        learned = {i for i in turns if _is_learned(messages[i], f"message {i + 1}")}
        if not learned:
            raise ValueError("nothing to learn: no assistant turn has a loss, as the messages say")
        full, spans = self.render(messages), []
        for i in turns:
            given = self.render(messages[:i], add_generation_prompt=True)
            through = self.render(messages[: i + 1])
            if not (through.startswith(given) and full.startswith(through)):
                raise ValueError(
                    f"message {i + 1}: the chat template writes what comes before an assistant"
                    " turn differently when the turn is there; its labels would be wrong"
                )
            answer = through[len(given) :]
            # What stands after the closing token belongs to the next turn.
            rest = answer.rpartition(IM_END)[2]
            if i in learned:
                spans.append((len(given), len(through) - (0 if rest.strip() else len(rest))))
        return full, spans

    def hears(self) -> bool:
        """Whether the template writes one `<|AUDIO|>` for a clip."""
        parts = [CLIP, {"type": "text", "text": "What is that?"}]
        try:
            return self.render([{"role": "user", "content": parts}]).count(AUDIO) == 1
        except ValueError:
            return False


def _is_learned(message: Mapping, where: str) -> bool:
    """Whether an assistant's turn is learned, or only what later ones answer to."""
    for name in ("loss", "weight"):
        value = message.get(name)
        if value is not None and value not in (0, 1):
            raise ValueError(f"{where}: wanted a {name} of 0 or 1, got {_brief(value)}")
    return all(message.get(name) in (None, 1) for name in ("loss", "weight"))


def read_template(folder: pathlib.Path) -> ChatTemplate:
    """Takes a checkpoint's own chat template, the default where it has none that hears.

    A tokenizer's template is passed over if it knows no clips: the published checkpoint carries
    a plain ChatML one that expects strings, and the reference does not use it either.
    """
    if (path := folder / "chat_template.jinja").is_file():
        return ChatTemplate(path.read_text("utf-8"))
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        found = read_json(folder / name).get("chat_template")
        if isinstance(found, list):  # several, by name
            found = {each["name"]: each["template"] for each in found}
        if isinstance(found, Mapping):
            found = found.get("default")
        if found and (name == "chat_template.json" or ChatTemplate(found).hears()):
            return ChatTemplate(found)
    return ChatTemplate()


def read_json(path: pathlib.Path) -> dict:
    """Reads a settings file; one that is absent has no settings."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def parse(conversation: Sequence) -> list[dict]:
    """Checks a conversation and gives its content parts one form.

    Returns:
      The messages; content is a string, or a list of {"type": "audio", "audio": source}, with its
      "offset" and "duration" in seconds where it is a piece, and the "words" that are said in it,
      if they were given, and {"type": "text", "text": text}. What else a message has is kept, for
      the template.
    """
    if not conversation:
        raise ValueError("wanted a conversation, got no messages")
    messages = []
    for number, message in enumerate(conversation, 1):
        where = f"message {number}"
        if not isinstance(message, Mapping) or "role" not in message:
            raise ValueError(f"{where}: wanted a role and content, got {_brief(message)}")
        if message["role"] not in ROLES:
            raise ValueError(f"{where}: wanted a role of {ROLES}, got {_brief(message['role'])}")
        content = message.get("content")
        if isinstance(content, Sequence) and not isinstance(content, str | bytes):
            content = [_part(part, f"{where}, part {i}") for i, part in enumerate(content, 1)]
        elif not isinstance(content, str):
            raise ValueError(f"{where}: wanted content, a text or parts, got {_brief(content)}")
        messages.append({**message, "content": content})
    return messages


def _part(part: Any, where: str) -> dict:
    wanted = "an audio or a text part"
    if not isinstance(part, Mapping):
        raise ValueError(f"{where}: wanted {wanted}, got {_brief(part)}")
    kind, text = part.get("type"), part.get("text")
    # Tables fill absent fields with None.
    clips = [part[key] for key in CLIPS if part.get(key) is not None]
    if clips and text:
        raise ValueError(f"{where}: wanted {wanted}, got both in one: {_brief(dict(part))}")
    if isinstance(text, str) and (kind == "text" or (kind is None and not clips)):
        return {"type": "text", "text": text}
    if clips and kind in (None, *HEARD):
        if found := [name for name in ("start", "end") if part.get(name) is not None]:
            wanted = "a piece of a clip by its offset and duration"  # else all would be heard
            raise ValueError(f"{where}: wanted {wanted}, got {found[0]!r}")
        known = {name: part[name] for name in (*PIECE, "words") if part.get(name) is not None}
        try:
            known |= {name: seconds(known[name], name) for name in PIECE if name in known}
            return {"type": "audio", "audio": unwrap(clips[0]), **known}
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    raise ValueError(f"{where}: wanted {wanted}, got {_brief(dict(part))}")


def seconds(value: Any, name: str) -> float:
    """A time of a clip's piece, as tables have it.

    Raises:
      ValueError: it is no number.
    """
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"wanted {name} in seconds, got {_brief(value)}") from None


def unwrap(source: Any) -> Any:
    """What `audio.load` takes, of a clip as others write it; other clips are as they were.

    OpenAI's {"url": ...} and {"data": base64}, datasets' {"bytes": ..., "path": ...} and
    {"array": ..., "sampling_rate": ...}; None where such a one is empty.

    Raises:
      ValueError: it is none of these.
    """
    if not isinstance(source, Mapping):
        return source
    if source.get("array") is not None:
        return source["array"], source.get("sampling_rate")
    named = ("bytes", "path", "url")
    if found := [source[name] for name in named if source.get(name)]:
        return found[0]
    if any(name in source for name in (*named, "array")):
        return None
    try:
        return base64.b64decode(source["data"], validate=True)
    except (KeyError, TypeError, binascii.Error) as error:
        raise ValueError(f"wanted a url or base64 data, got {_brief(source)}") from error


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
