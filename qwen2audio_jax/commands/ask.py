"""`qwen2audio ask`: answers about clips, each by itself or all together."""

import argparse
import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import tqdm
from jaxtyping import Int

from qwen2audio_jax import audio
from qwen2audio_jax import prompt as prompts
from qwen2audio_jax.commands import session
from qwen2audio_jax.generate import generate, room
from qwen2audio_jax.model import Qwen2Audio
from qwen2audio_jax.processor import Processor, Wave
from qwen2audio_jax.stream import stream


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """A prompt and its clips, or why it cannot be asked."""

    clips: Sequence[str]
    prompt: prompts.Prompt = ()
    waves: Sequence[Wave] = ()
    error: str | None = None

    @property
    def name(self) -> str:
        return ", ".join(map(audio.name, self.clips))

    @property
    def ids(self) -> Int[np.ndarray, " L"]:
        return np.concatenate([segment.ids for segment in self.prompt])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    text: str
    cut: bool  # was as long as it may be: words may be missing


def run(options: argparse.Namespace) -> int:
    clips, text = separate(options.arguments, options.question)
    groups = [clips] if options.together else [[clip] for clip in clips]
    sampling = session.sampling(options)
    processor = Processor.from_pretrained(options.model)
    model, failed = None, False
    # `disable=None` leaves the bar out where stderr is no terminal.
    with tqdm.tqdm(total=len(groups), disable=None if len(groups) > 1 else True) as shown:
        for first in range(0, len(groups), options.batch_size):
            batch = groups[first : first + options.batch_size]
            questions = [prepare(processor, options.system, group, text) for group in batch]
            if any(question.error is None for question in questions):
                model = model or session.load(options)
                questions = [fit(model, each, options.max_new_tokens) for each in questions]
            good = [question for question in questions if question.error is None]
            limits = {"max_new_tokens": options.max_new_tokens, "sampling": sampling}
            if good and len(groups) == 1 and not options.json:
                say(model, processor, good[0], limits)
                continue
            answers = iter(answer(model, processor, good, limits) if good else ())
            for question in questions:
                reply = None if question.error is not None else next(answers)
                show(question, reply, alone=len(groups) == 1, as_json=options.json)
            failed |= len(good) < len(questions)
            shown.update(len(batch))
    return 2 if failed else 0


def separate(arguments: Sequence[str], question: str | None) -> tuple[list[str], str | None]:
    """Tells clips from the question.

    Raises:
      ValueError: there is no clip, or more than one question.
    """
    clips = [each for each in arguments if session.is_clip(each)]
    texts = [each for each in arguments if not session.is_clip(each)]
    texts += [] if question is None else [question]
    if len(texts) > 1:
        listed = ", ".join(map(repr, texts))
        raise ValueError(f"wanted one question, in quotes, and clips that exist; got {listed}")
    if not clips:
        raise ValueError(f"wanted a clip, got the question {texts[0]!r} alone")
    return clips, texts[0] if texts else None


def prepare(
    processor: Processor, system: str | None, clips: Sequence[str], text: str | None
) -> Question:
    parts = [{"type": "audio", "audio": clip} for clip in clips]
    parts += [] if text is None else [{"type": "text", "text": text}]
    messages = [] if system is None else [{"role": "system", "content": system}]
    try:
        with session.noting():
            prompt, waves = processor.conversation([*messages, {"role": "user", "content": parts}])
    except audio.AudioError as error:
        return Question(clips=clips, error=str(error))
    return Question(clips=clips, prompt=prompt, waves=waves)


def fit(model: Qwen2Audio, question: Question, max_new_tokens: int | None) -> Question:
    """Refuses a question that is too long for the context; others are asked all the same."""
    if question.error is not None:
        return question
    try:
        room(model, [question.ids], max_new_tokens)
    except ValueError as error:
        return dataclasses.replace(question, error=f"{question.name}: {error}")
    return question


def say(model: Qwen2Audio, processor: Processor, question: Question, limits: dict) -> None:
    """Prints an answer while it is made."""
    inputs = processor.batch([question.prompt], question.waves)
    pieces = stream(model, processor, inputs, **limits)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    if pieces.cut:
        session.note_cut(question.name)


def answer(
    model: Qwen2Audio, processor: Processor, questions: Sequence[Question], limits: dict
) -> list[Answer]:
    inputs = processor.batch(
        [question.prompt for question in questions],
        [wave for question in questions for wave in question.waves],
    )
    tokens = generate(model, inputs, **limits)
    cut = ~np.isin(tokens, model.config.end_tokens).any(axis=1)
    texts = processor.decode(tokens)
    return [Answer(text=text, cut=bool(c)) for text, c in zip(texts, cut, strict=True)]


def show(question: Question, answer: Answer | None, *, alone: bool, as_json: bool) -> None:
    if as_json:
        session.put(_record(question, answer))
    elif answer is None:
        session.error(question.error)
    else:
        session.put(answer.text if alone else f"{question.name}: {answer.text}")
        if answer.cut:
            session.note_cut(question.name)


def _record(question: Question, answer: Answer | None) -> str:
    names = [audio.name(clip) for clip in question.clips]
    name = names[0] if len(names) == 1 else names
    if answer is None:
        return session.record(audio=name, error=question.error)
    ends = np.cumsum([0, *map(len, question.waves)]) / audio.SAMPLE_RATE
    windows = [
        {"start": round(start, 3), "end": round(end, 3)} for start, end in itertools.pairwise(ends)
    ]
    several = len(names) == 1 and len(windows) > 1
    return session.record(
        audio=name,
        text=answer.text,
        seconds=round(ends[-1], 3),
        windows=windows if several else None,
        cut=answer.cut,
    )
