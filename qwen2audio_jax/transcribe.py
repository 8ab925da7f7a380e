"""Clips of any length -> what is said in them, and when."""

import dataclasses
import html
import re
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import tqdm
from jaxtyping import Float

from qwen2audio_jax import audio
from qwen2audio_jax import prompt as prompts
from qwen2audio_jax.generate import GREEDY, generate
from qwen2audio_jax.model import Qwen2Audio
from qwen2audio_jax.processor import Processor, count_tokens
from qwen2audio_jax.sampling import Sampling

SHORTEST_WINDOW, LONGEST_WINDOW = 1.0, 30.0  # seconds
POOL = 8  # batches that are held in memory, so that clips of like length meet in one
HEARD = f"{prompts.AUDIO_BOS}{prompts.AUDIO}{prompts.AUDIO_EOS}"  # a clip, before its prompt
# <|sil|> has the form of a language's tag, and says that nobody speaks.
LANGUAGE = re.compile(r"\s*<\|(?!sil\b)([a-z]{2,3}(?:-[A-Za-z]+)?)\|>")
UNSPACED = re.compile(
    r"[\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window:
    """What is said between two times, in seconds from the clip's beginning."""

    start: float
    end: float
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transcript:
    """What is said in a clip, or why that cannot be told.

    Attributes:
      audio: the clip's name.
      text: all windows' texts, joined.
      seconds: how long the clip lasts.
      windows: its parts, each heard by itself; together they cover it.
      language: the tag that the model began its answer with, if it did: "en".
      cut: an answer was as long as it may be: words may be missing.
      error: one line that says what is wrong with the clip; there is no text then.
    """

    audio: str
    text: str | None = None
    seconds: float | None = None
    windows: tuple[Window, ...] = ()
    language: str | None = None
    cut: bool = False
    error: str | None = None


@dataclasses.dataclass(kw_only=True, eq=False)
class _Part:
    """A window on its way through the model."""

    clip: int  # which of its pool's
    start: int  # samples
    wave: Float[np.ndarray, " S"]
    text: str = ""
    language: str | None = None
    cut: bool = False


def transcribe(
    model: Qwen2Audio,
    processor: Processor,
    sources: Sequence[audio.Source],
    *,
    language: str | None = None,
    prompt: str | None = None,
    chat: bool = False,
    window: float | None = None,
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    sampling: Sampling = GREEDY,
    progress: bool = False,
) -> Iterator[Transcript]:
    """Writes down what is said in clips of any length.

    A clip that is longer than a window is cut at the quietest point before its end. Windows of like
    length are heard together, whatever clip they are from.

    Args:
      sources: paths, URLs, bytes or (samples, rate).
      language: what is spoken, "en" or "zh", say; None: the model is to tell.
      prompt: what to ask of the model in place of its prompt for recognition; it follows the
        clip.
      chat: ask in a user's turn of a conversation, as Instruct models are used to.
      window: seconds that are heard at once, at most 30; None: what the checkpoint has learned.
      batch_size: windows that are heard together.
      max_new_tokens: the longest answer to a window; None: 256, or what the context has room for.
      progress: show a progress bar.

    Yields:
      One result per source, in order. A clip that cannot be heard is an error in its own.

    Raises:
      ValueError: the model does not know the language, an answer of `max_new_tokens` does not fit
        its context, or a window has no such length.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    window = processor.window if window is None else window
    if not SHORTEST_WINDOW <= window <= LONGEST_WINDOW:
        raise ValueError(
            f"wanted windows of {SHORTEST_WINDOW:g} to {LONGEST_WINDOW:g} s, got {window:g}"
        )
    text = _prompt(processor, language, prompt)
    if chat:
        parts = [prompts.CLIP, {"type": "text", "text": text.removeprefix(HEARD)}]
        turn = [{"role": "user", "content": parts}]
        text = processor.template.render(turn, add_generation_prompt=True)
    hear = lambda parts, rows: _hear(model, processor, text, parts, rows, max_new_tokens, sampling)
    return _transcripts(hear, sources, round(window * audio.SAMPLE_RATE), batch_size, progress)


def _prompt(processor: Processor, language: str | None, prompt: str | None) -> str:
    if prompt is not None:
        return HEARD + prompt
    if language is None:
        return prompts.transcription("en").removesuffix("<|en|>")
    tag = f"<|{language}|>"
    core = processor.tokenizer.core
    if core.token_to_id(tag) is None:
        known = [match[1] for word in core.get_vocab() if (match := LANGUAGE.fullmatch(word))]
        # The tags of a tokenizer that has none are plain text.
        if known or not LANGUAGE.fullmatch(tag):
            known = ", ".join(sorted(known)) or "codes like en or zh"
            raise ValueError(f"wanted a language that the model knows ({known}), got {language!r}")
    return prompts.transcription(language)


def _transcripts(hear, sources, window, batch_size, progress) -> Iterator[Transcript]:
    rows = 1
    with tqdm.tqdm(
        total=len(sources), unit=" windows", delay=1, leave=False, disable=not progress
    ) as shown:
        for results, parts in _pools(sources, window, POOL * batch_size):
            shown.total += len(parts) - len(results)  # a clip counts for one until it is cut
            # A model that is given silence makes something up.
            heard = [part for part in parts if np.abs(part.wave).max() >= audio.QUIETEST]
            shown.update(len(parts) - len(heard))
            waiting = sorted(heard, key=lambda part: len(part.wave))
            for first in range(0, len(waiting), batch_size):
                batch = waiting[first : first + batch_size]
                # A power of two, and never fewer than before: what is left over at the end
                # compiles nothing anew.
                rows = max(rows, min(1 << (len(batch) - 1).bit_length(), batch_size))
                hear(batch, rows)
                shown.update(len(batch))
            for i, result in enumerate(results):
                yield _finish(result, [part for part in parts if part.clip == i])


def _pools(sources, window: int, enough: int) -> Iterator[tuple[list[Transcript], list[_Part]]]:
    """Loads clips until they have `enough` windows, again and again."""
    results, parts = [], []
    for source in sources:
        try:
            wave = audio.load(source)
        except audio.AudioError as error:
            results.append(Transcript(audio=audio.name(source), error=str(error)))
            continue
        for start, stop in audio.split(wave, window):
            parts.append(_Part(clip=len(results), start=start, wave=wave[start:stop]))
        seconds = len(wave) / audio.SAMPLE_RATE
        results.append(Transcript(audio=audio.name(source), seconds=seconds))
        if len(parts) >= enough:
            yield results, parts
            results, parts = [], []
    yield results, parts


def _hear(model, processor, text, parts, rows, max_new_tokens, sampling) -> None:
    """Fills in parts' texts; the last is heard again and again until there are so many rows."""
    waves = [part.wave for part in parts]
    waves += waves[-1:] * (rows - len(parts))
    compiled = [processor.tokenizer.compile(text, [count_tokens(wave)]) for wave in waves]
    inputs = processor.batch(compiled, waves)
    tokens = generate(model, inputs, max_new_tokens=max_new_tokens, sampling=sampling)
    tokens = tokens[: len(parts)]
    texts = processor.decode(tokens, skip_special_tokens=False)
    for part, row, text in zip(parts, tokens, texts, strict=True):
        part.cut = not np.isin(row, model.config.end_tokens).any()
        part.language = match[1] if (match := LANGUAGE.match(text)) else None
        part.text = " ".join(prompts.TAG.sub(" ", text).split())


def _finish(result: Transcript, parts: list[_Part]) -> Transcript:
    if result.error is not None:
        return result
    rate = audio.SAMPLE_RATE
    windows = tuple(
        Window(start=part.start / rate, end=(part.start + len(part.wave)) / rate, text=part.text)
        for part in parts
    )
    return dataclasses.replace(
        result,
        text=join([part.text for part in parts]),
        windows=windows,
        language=next((part.language for part in parts if part.language), None),
        cut=any(part.cut for part in parts),
    )


def join(texts: Sequence[str]) -> str:
    """Joins consecutive texts: by a space, except between Chinese or Japanese characters."""
    joined = ""
    for text in filter(None, texts):
        spaced = joined and not (UNSPACED.match(joined[-1]) and UNSPACED.match(text))
        joined += f" {text}" if spaced else text
    return joined


def subtitles(windows: Sequence[Window], form: Literal["srt", "vtt"]) -> str:
    """Writes SubRip or WebVTT; windows in which nothing is said are left out."""
    spoken = [window for window in windows if window.text]
    cues = []
    for number, window in enumerate(spoken, 1):
        start, end = clock(window.start), clock(window.end)
        if form == "srt":
            # SubRip has no escapes.
            times, text = f"{start} --> {end}".replace(".", ","), window.text.replace("-->", "->")
        else:
            times, text = f"{start} --> {end}", html.escape(window.text, quote=False)
        cues.append(f"{number}\n{times}\n{text}\n")
    return "\n".join(["WEBVTT\n", *cues] if form == "vtt" else cues)


def clock(seconds: float) -> str:
    """Hours, minutes, seconds and milliseconds: 00:01:02.345."""
    total = round(seconds * 1000)
    minutes, milliseconds = divmod(total, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{milliseconds // 1000:02}.{milliseconds % 1000:03}"
