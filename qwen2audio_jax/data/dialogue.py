"""Conversations about a small world: for SFT in two modes, and pairs of answers for DPO.

Audio analysis is a clip and a written question. In voice chat nothing is written: the question is
spoken, by itself or about the clip before it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qwen2audio_jax.audio import SAMPLE_RATE
from qwen2audio_jax.data import lexicon, sounds, synth
from qwen2audio_jax.data.lexicon import LANGUAGES, Manner

NO_SPEECH = "I hear no speech."
ASKING = Manner(rate=(150, 230))
OPPOSITES = (("up", "down"), ("left", "right"), ("open", "close"), ("stop", "go"), ("yes", "no"))

Chat = Callable[[np.random.Generator], tuple[str, str]]


def plus(rng: np.random.Generator) -> tuple[str, str]:
    total = int(rng.integers(10))
    first = int(rng.integers(total + 1))
    words = (synth.DIGITS[n] for n in (first, total - first))
    return "What is {} plus {}?".format(*words), f"It is {synth.DIGITS[total]}."


def after(rng: np.random.Generator) -> tuple[str, str]:
    n = int(rng.integers(9))
    return f"What comes after {synth.DIGITS[n]}?", f"It is {synth.DIGITS[n + 1]}."


def greeting(rng: np.random.Generator) -> tuple[str, str]:
    return (("Hello!", "Hello to you."), ("Goodbye!", "Goodbye to you."))[rng.integers(2)]


def opposite(rng: np.random.Generator) -> tuple[str, str]:
    pair = OPPOSITES[rng.integers(len(OPPOSITES))]
    given = int(rng.integers(2))
    return f"What is the opposite of {pair[given]}?", f"It is {pair[1 - given]}."


def foreign(rng: np.random.Generator) -> tuple[str, str]:
    concept = int(rng.integers(len(lexicon.LEXICON)))
    language = list(LANGUAGES)[rng.integers(1, len(LANGUAGES))]
    (there,), (here,) = (lexicon.translate([concept], each) for each in (language, "en"))
    return f"How do you say {here} in {LANGUAGES[language]}?", f"It is {there}."


SMALL_CHATS: tuple[Chat, ...] = (plus, after, greeting)
FULL_CHATS: tuple[Chat, ...] = (*SMALL_CHATS, opposite, foreign)


def chat_question(rng: np.random.Generator, chat: Chat) -> str:
    return chat(rng)[0]


def say_question(question: str, rng: np.random.Generator, *, held_out: bool) -> tuple:
    """A question as a clip."""
    text = lexicon.spoken(question)
    pool = lexicon.pooled(rng, text, held_out=held_out, size=20)
    said = lexicon.say(text, pool, ASKING, held_out=held_out)
    return sounds.surround(said.wave, rng), SAMPLE_RATE


def analysis(tasks: Sequence[Any], rng: np.random.Generator, *, held_out: bool) -> dict[str, Any]:
    """A clip and a written question; then perhaps another one about the same clip.

    It says whether the answer would be untrue at another speed.
    """
    task, sample = _sample(tasks, rng, held_out)
    messages = [
        _user(_clip(sample["audio"]), {"type": "text", "text": task.question(sample, rng)}),
        _assistant(task.reply_to(sample)),
    ]
    others = [each for each in tasks if each is not task and each.name in sample.get("facts", ())]
    if others and rng.random() < 0.3:
        other = others[rng.integers(len(others))]
        fact = {"text": sample["facts"][other.name]}
        messages += [
            _user({"type": "text", "text": other.question(fact, rng)}),
            _assistant(other.reply_to(fact)),
        ]
    return {"messages": messages, "task": task.name, "timed": task.timed}


def chat(
    tasks: Sequence[Any],
    chats: Sequence[Chat],
    rng: np.random.Generator,
    *,
    held_out: bool,
) -> dict[str, Any]:
    """A spoken question, answered; half of them are about a clip that precedes it."""
    if rng.random() < 0.5:
        about = chats[rng.integers(len(chats))]
        question, answer = about(rng)
        content = [_clip(say_question(question, rng, held_out=held_out), lexicon.spoken(question))]
        name, timed = about.__name__, False
    else:
        task, sample = _sample(tasks, rng, held_out)
        question, answer = task.question(sample, rng), task.reply_to(sample)
        asked = say_question(question, rng, held_out=held_out)
        content, name = [_clip(sample["audio"]), _clip(asked, lexicon.spoken(question))], task.name
        timed = task.timed
    messages = [_user(*content), _assistant(answer)]
    return {"messages": messages, "task": name, "timed": timed}


def preference(
    recognition: Any,
    tasks: Sequence[Any],
    silent: Callable[[np.random.Generator], Any],
    rng: np.random.Generator,
    *,
    held_out: bool,
) -> dict[str, Any]:
    """Asks what is said: where nobody speaks, "I hear no speech." is better than invented words.

    Of five pairs nobody speaks in two, somebody in one; two ask for something else, where the right
    answer is better than that to another clip: what preferences do not speak of is forgotten.

    Args:
      recognition: the task whose question is asked, and that says what could be invented.
      tasks: what else is asked for.
      silent: makes a clip, with its rate, in which nobody speaks.
    """
    kind = ("silence", "silence", "speech", "other", "other")[rng.integers(5)]
    if kind == "other":
        return _right_or_wrong(tasks, rng, held_out)
    sample, speaks = recognition.draw(rng, held_out), kind == "speech"
    answers = [recognition.reply_to(sample), NO_SPEECH]
    chosen, rejected = answers if speaks else reversed(answers)
    heard = sample["audio"] if speaks else silent(rng)
    question = {"type": "text", "text": recognition.question(sample, rng)}
    return {
        "messages": [_user(_clip(heard), question)],
        "chosen": chosen,
        "rejected": rejected,
        "task": "speech" if speaks else "no speech",
    }


def _right_or_wrong(
    tasks: Sequence[Any], rng: np.random.Generator, held_out: bool
) -> dict[str, Any]:
    """A task's right answer, and the right one to another clip."""
    task, sample = _sample(tasks, rng, held_out)
    question = {"type": "text", "text": task.question(sample, rng)}
    wrong = sample
    while wrong["text"] == sample["text"]:
        wrong = task.draw(rng, held_out)
    return {
        "messages": [_user(_clip(sample["audio"]), question)],
        "chosen": task.reply_to(sample),
        "rejected": task.reply_to(wrong),
        "task": "other tasks",
    }


def _sample(tasks: Sequence[Any], rng: np.random.Generator, held_out: bool) -> tuple:
    asked = [task for task in tasks if task.asked]
    weights = np.array([task.weight for task in asked])
    task = asked[rng.choice(len(asked), p=weights / weights.sum())]
    return task, task.draw(rng, held_out)


def _clip(audio: tuple, words: str = "") -> dict[str, Any]:
    return {"type": "audio", "audio": audio, "words": words}


def _user(*parts: dict) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def _assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}
