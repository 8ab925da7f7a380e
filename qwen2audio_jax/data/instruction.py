r"""A task is one line: what is given, an arrow, what is learned.

    [AUDIO:speech] Detect the language and recognize the speech: -> <|en|>[TEXT:text]

A slot `[TYPE:field,attribute,key=value]` takes a field of the sample; all else is literal.

    no_loss           behind the arrow: said, but not learned; what follows the last one is learned,
                      and is what answers are measured by
    optional          a sample that lacks the field leaves the slot empty
    closed_set=a|b|c  the text is one of these; closed_set=FIELD: of the list in the sample's field.
                      Also when it is generated, if the rest of what is measured is closed too
    max_seconds=10    a longer clip is a bad sample; never more than 30
    offset=FIELD      the field with the seconds of a recording before what is to be heard of it
    duration=FIELD    the field with how many seconds that are; without, all up to the end
    words=FIELD       the field with the words that are said in the clip, for CTC to learn from;
                      absent or empty where nobody knows them

A backslash makes the next character literal (`\[`, `\->`, `\,`, `\|`, `\\`, and `\ ` where white
space would be dropped); `\n` and `\t` are a new line and a tab. White space directly behind a clip
and before the arrow is dropped; one behind the arrow begins the answer, if there is a prompt. The
prompt is tokenized by itself, as when it is to be answered, and the answer by itself behind it; so
is, within an answer, what is said but not learned, with the white space before it.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qwen2audio_jax.data.example import BadSample, Example, as_text, hear, is_empty
from qwen2audio_jax.data.slots import Filled, Part, Slot, heard, parts_of, slot_type
from qwen2audio_jax.processor import Processor, Wave, count_tokens
from qwen2audio_jax.prompt import AUDIO, AUDIO_BOS, AUDIO_EOS, PAD, PIECE, TAG, Prompt

STYLES = ("prompt", "tags", "none")
MOST = 10_000  # answers that several closed sets allow together: all are written out
TASKS = ("transcribe", "translate", "caption", "keyword", "question")  # that have a tag


@slot_type("AUDIO", attributes=["max_seconds", "offset", "duration", "words"], heard=True)
def fill_audio(value: Any, slot: Slot, sample: Mapping) -> Filled:
    words = "" if slot.words is None else as_text(sample.get(slot.words), repr(slot.words))
    fields = {name: getattr(slot, name) for name in PIECE}
    piece = {name: _field(field, sample) for name, field in fields.items() if field is not None}
    waves = (hear(value, slot.max_seconds, **piece),)
    return Filled(f"{AUDIO_BOS}{AUDIO}{AUDIO_EOS}", waves, (words,))


@slot_type("TEXT", attributes=["closed_set"])
def fill_text(value: Any, slot: Slot, sample: Mapping) -> Filled:
    text = as_text(value, repr(slot.field))
    if not text:
        raise BadSample("empty text", f"{slot.field!r} says nothing")
    if slot.closed_set is not None and text not in (among := closed_set(slot, sample)):
        raise BadSample("outside closed set", f"{slot.field!r} is {text!r}, wanted one of {among}")
    return Filled(text)


def closed_set(slot: Slot, sample: Mapping) -> list[str]:
    """The texts that a slot's closed set allows this sample."""
    if not isinstance(slot.closed_set, str):
        return list(slot.closed_set or ())
    texts = _field(slot.closed_set, sample)
    listed = isinstance(texts, Sequence | np.ndarray) and not isinstance(texts, str | bytes)
    if not listed or not len(texts):
        raise BadSample("missing field", f"{slot.closed_set!r}: wanted a list, got {texts!r}")
    return [as_text(text, repr(slot.closed_set)) for text in texts]


@dataclasses.dataclass(frozen=True)
class Task:
    """Says how samples become prompts and answers."""

    given: tuple[Part, ...]
    answer: tuple[Part, ...]

    @classmethod
    def parse(cls, line: str, *, tags: str | None = None, style: str = "prompt") -> "Task":
        """Reads a line.

        Args:
          tags: what says the task in `style="tags"`; `hierarchical_tags` makes it. It may hold
            slots too: `<|[TEXT:language]|>`.
          style: "prompt" keeps the line's words; "tags" has tags in their place, behind the last
            clip; "none" has nothing there. What slots give, and the answer, stay the same.

        Raises:
          ValueError: the line is wrong; the message says at which column. Or its closed sets allow
            too many answers.
        """
        given, answer = parts_of(line, arrows=1)
        task = cls(_styled(given, tags, style), tuple(answer))
        if too_many := _too_many(task.stated):
            raise ValueError(too_many)
        return task

    @property
    def clips(self) -> tuple[str, ...]:
        """The fields that name clips."""
        return tuple(part.field for part in (*self.given, *self.answer) if heard(part))

    @property
    def stated(self) -> list[list[str]]:
        """What the line itself has of the answers, if these are closed: texts, and the sets that
        no sample brings."""
        own = lambda part: isinstance(part, Slot) and isinstance(part.closed_set, str)
        return [_texts(part, {}) for part in self._closed({}) or () if not own(part)]

    @property
    def words(self) -> tuple[str, ...]:
        """The fields with the words that are said in clips."""
        slots = (part for part in (*self.given, *self.answer) if heard(part))
        return tuple(slot.words for slot in slots if slot.words is not None)

    @property
    def tags(self) -> tuple[str, ...]:
        """The tags, `<|en|>`, that are the line's own, not a sample's."""
        own = lambda part: part.closed_set if isinstance(part.closed_set, tuple) else ()
        texts = (
            part if isinstance(part, str) else f" {' '.join(own(part))} "
            for part in (*self.given, *self.answer)
        )
        return tuple(dict.fromkeys(TAG.findall("".join(texts))))

    def compile(self, sample: Mapping, processor: Processor, *, learn: bool = True) -> Example:
        """Fills the line with a sample: to learn the answer, or (not `learn`) to give one, behind
        the answer's last slot that is not learned.

        Raises:
          BadSample: "missing field", "missing audio", "corrupt audio", "too long", "empty text",
            "not text", "outside closed set" or "special token in text".
        """
        given = _fill(self.given, sample, False)
        prompt, waves = _compile(given, processor)
        parts = self.answer if learn else self.answer[: self._measured_from(sample)]
        answer = _fill(parts, sample, True) + [Filled(PAD, learned=True)] * learn
        # Apart, or a token could hold the end of what is given and the beginning of an answer.
        for _, run in itertools.groupby(answer, key=lambda each: each.learned):
            said, more = _compile(list(run), processor, first=len(waves))
            prompt, waves = prompt + said, waves + more
        # a type of slot that says no words has none of them for each of its clips
        said = (each.words or ("",) * len(each.waves) for each in (*given, *answer))
        words = [text for texts in said for text in texts]
        return Example(prompt, waves, tuple(map(processor.tokenizer.encode, words)))

    def choices(self, sample: Mapping) -> list[str] | None:
        """All that can follow what is given of a sample, for `generate`; None if there is no end.

        What is given ends with the answer's last slot that is not learned.

        Raises:
          BadSample: "missing field", "not text" or "too many answers".
        """
        closed = self._closed(sample)
        if closed is None:
            return None
        sets = [_texts(part, sample) for part in closed]
        if too_many := _too_many(sets):
            raise BadSample("too many answers", too_many)
        return ["".join(parts) for parts in itertools.product(*sets)]

    def _closed(self, sample: Mapping) -> list[Part] | None:
        """What is learned behind what is given of a sample; None if a slot of it has no end."""
        behind = self.answer[self._measured_from(sample) :]
        learned = [part for part in behind if isinstance(part, str) or not part.no_loss]
        if any(isinstance(part, Slot) and part.closed_set is None for part in learned):
            return None
        return learned

    def _measured_from(self, sample: Mapping) -> int:
        """How many of the answer's parts are given: up to the last that is said but not learned."""
        given = lambda part: isinstance(part, Slot) and part.no_loss and not _left_out(part, sample)
        return max((i for i, part in enumerate(self.answer, 1) if given(part)), default=0)


def hierarchical_tags(
    task: str,
    *,
    audio_language: str = "unknown",
    text_language: str = "en",
    timestamps: bool = False,
    instruction: str | None = None,
) -> str:
    """Says a task in Qwen-Audio's tags.

    Args:
      task: one of TASKS; the first two transcribe, the others analyse.
      audio_language: of what is heard: a code, "unknown", or a slot such as `[TEXT:language]`.
      text_language: of the answer.
      instruction: on the answer's form: "itn", "wo_itn", "emotion_recognition", "scene", ...

    Source: arXiv:2311.07919, section 3.2, and Qwen-Audio's tokenizer.
    """
    if task not in TASKS:
        raise ValueError(f"wanted a task of {', '.join(TASKS)}, got {task!r}")
    for language in (audio_language, text_language):
        if not re.fullmatch(r"[a-z]{2,3}(_[a-z]+)?|unknown|\[TEXT:[^\[\]]+\]", language):
            raise ValueError(f"wanted a language code, unknown or [TEXT:...], got {language!r}")
    if instruction is not None and not re.fullmatch(r"\w+", instruction):
        raise ValueError(f"wanted one word as an output instruction, got {instruction!r}")
    start = "startoftranscript" if task in TASKS[:2] else "startofanalysis"
    times = "timestamps" if timestamps else "notimestamps"
    names = (start, audio_language, task, text_language, times, instruction)
    return "".join(f"<|{name}|>" for name in names if name is not None)


def _styled(given: list[Part], tags: str | None, style: str) -> tuple[Part, ...]:
    if style not in STYLES:
        raise ValueError(f"wanted a style of {', '.join(STYLES)}, got {style!r}")
    if style == "prompt":
        return tuple(given)
    hint: list[Part] = []
    if style == "tags":
        if not tags:
            raise ValueError("style 'tags' wants tags=, got none")
        try:
            (hint,) = parts_of(tags, arrows=0)
        except ValueError as error:
            raise ValueError(f"tags: {error}") from None
    slots: list[Part] = []
    for slot in (part for part in given if isinstance(part, Slot)):
        # the words that parted two texts are gone
        slots += [slot] if not slots or heard(slots[-1]) or heard(slot) else [" ", slot]
    clips = [i for i, slot in enumerate(slots, 1) if heard(slot)]
    last = clips[-1] if clips else 0
    return (*slots[:last], *hint, *slots[last:])


def _fill(parts: tuple[Part, ...], sample: Mapping, learned: bool) -> list[Filled]:
    filled = []
    for part in parts:
        if isinstance(part, str):
            filled.append(Filled(part, learned=learned))
            continue
        if _left_out(part, sample):
            continue
        made = part.kind.fill(_field(part.field, sample), part, sample)
        if part.no_loss and not made.waves and filled and filled[-1].text.isspace():
            filled[-1] = dataclasses.replace(filled[-1], learned=False)  # a word begins with it
        filled.append(dataclasses.replace(made, learned=learned and not part.no_loss))
    return filled


def _left_out(slot: Slot, sample: Mapping) -> bool:
    return slot.optional and is_empty(sample.get(slot.field))


def _texts(part: Part, sample: Mapping) -> list[str]:
    """What a slot with a closed set can say, "" too, where it can be left out; or literal text."""
    if isinstance(part, str):
        return [part]
    own = isinstance(part.closed_set, str)
    if own and _left_out(part, sample) and is_empty(sample.get(part.closed_set)):
        return [""]
    return [*closed_set(part, sample), *[""] * part.optional]


def _too_many(sets: list[list[str]]) -> str | None:
    """Says so, if all that sets can say together is more than `MOST`, and than any of them."""
    sizes = [len(texts) for texts in sets]
    if (count := math.prod(sizes)) <= max([MOST, *sizes]):
        return None
    return f"wanted closed sets that allow at most {MOST} answers together, got {count}"


def _compile(
    filled: list[Filled], processor: Processor, first: int = 0
) -> tuple[Prompt, tuple[Wave, ...]]:
    """Tokenizes what belongs together; its clips are the row's `first` and following."""
    waves = tuple(wave for each in filled for wave in each.waves)
    ends = list(itertools.accumulate(len(each.text) for each in filled))
    spans = [
        (end - len(each.text), end) for each, end in zip(filled, ends, strict=True) if each.learned
    ]
    text = "".join(each.text for each in filled)
    if text.count(AUDIO) != len(waves):
        raise BadSample("special token in text", f"wanted {AUDIO} for clips alone, got {text!r}")
    compiled = processor.tokenizer.compile(text, [count_tokens(wave) for wave in waves], spans)
    return tuple(
        segment if segment.clip is None else dataclasses.replace(segment, clip=first + segment.clip)
        for segment in compiled
    ), waves


def _field(name: str, sample: Mapping) -> Any:
    if name not in sample:
        raise BadSample("missing field", f"no {name!r} among {', '.join(sample) or 'no fields'}")
    return sample[name]
