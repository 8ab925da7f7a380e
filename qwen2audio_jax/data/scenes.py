"""Clips that are composed, with what is true of them: seeds for a small world's samples.

A maker takes a generator and whether the clip is held out, and gives the sample's fields; `text`
is what should be answered. Held-out clips are by other voices, and of other sounds.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qwen2audio_jax.audio import SAMPLE_RATE
from qwen2audio_jax.data import augment, lexicon, sounds, synth
from qwen2audio_jax.data.lexicon import Manner

SHORT = (0.1, 0.2)  # seconds of a sound among others
SLOW, FAST = (90, 125), (250, 320)  # words per minute
LOW, HIGH = (0, 12), (88, 100)  # of espeak-ng's pitch: 55 to 80 Hz and 115 to 185, of its men
# Men are few to tell a low voice from a large or a hoarse one: whoever is as deep is among them,
# each is heard in many sizes, by which low ones stay below 95 Hz and high ones above 100, and half
# the time with breath in place of much of his voice. Without, a hoarse man's high voice is taken
# for a low one.
SIZES, BREATHS = (0.88, 1.12), ((0.0, 0.0), (0.0, 0.7))
SPEEDS = {"slow": SLOW, "fast": FAST}
PITCHES = {"low": LOW, "high": HIGH}
# Stand-ins: how voices tend to go when somebody feels so.
EMOTIONS = {"happy": (HIGH, FAST), "calm": (HIGH, SLOW), "angry": (LOW, FAST), "sad": (LOW, SLOW)}
NUMBERS = synth.DIGITS
WHO = {"male": "a man", "female": "a woman"}
QUESTIONS = (
    *("What comes first?", "What comes last?"),
    *("How many {many} are there?", "Is there a {about}?"),
)
# The words that captions are made of, besides what is said and heard.
CAPTIONS = ("a man says", "a woman says", "a rising chord on the piano, then a slow drum")

Sample = dict[str, Any]


def pick(rng: np.random.Generator, options: Sequence) -> Any:
    return options[rng.integers(len(options))]


def _made(wave: np.ndarray, text: str, rng: np.random.Generator, **fields: Any) -> Sample:
    return {"audio": (sounds.surround(wave, rng), SAMPLE_RATE), "text": text, **fields}


def speech(
    rng: np.random.Generator,
    held_out: bool,
    *,
    language: str,
    vocabulary: tuple[str, ...],
    most: int,
    questions: tuple[Callable[[np.random.Generator], str], ...] = (),
    into: str | None = None,
) -> Sample:
    """Words of a language: as they are, or `into` another language.

    Args:
      most: words at most.
      questions: what is said in one clip of five, rather than words by chance.
    """
    pool = lexicon.pooled(rng, f"speech {language} {most}", held_out=held_out, size=1500)
    if questions and pool.random() < 0.2:
        words = lexicon.spoken(pick(pool, questions)(pool)).split()
    else:
        words = lexicon.phrase(pool, vocabulary, most=most)
    text = lexicon.join(words, language)
    said = lexicon.say(text, pool, Manner(language=language), held_out=held_out)
    facts = {f"recognise {language}": text}
    if into is not None:
        text = lexicon.join(lexicon.translate([*map(vocabulary.index, words)], into), into)
    if said.gender:
        facts["gender"] = said.gender
    return _made(said.wave, text, rng, language=language, facts=facts)


def timed(
    rng: np.random.Generator, held_out: bool, *, vocabulary: tuple[str, ...], most: int
) -> Sample:
    """Words, and when each begins and ends, to a tenth of a second."""
    pool = lexicon.pooled(rng, "timed", held_out=held_out)
    words = [str(pick(pool, vocabulary)) for _ in range(pool.integers(1, most + 1))]
    said, times = lexicon.say_apart(words, pool, held_out=held_out)
    mark = lambda seconds: f"<|{round(seconds, 1):.2f}|>"
    text = "".join(
        f"{mark(start)}{word}{mark(end)}" for word, (start, end) in zip(words, times, strict=True)
    )
    return {"audio": (said.wave, SAMPLE_RATE), "text": text, "language": "en", "times": times}


def manner(
    rng: np.random.Generator,
    held_out: bool,
    *,
    kind: str,
    vocabulary: tuple[str, ...],
) -> Sample:
    """Who speaks or how: "voice", "gender", "pitch", "rate" or "emotion".

    A voice that is known by name is heard in training, too; what it says when held out is not: a
    word longer than all it is learned by.
    Pitch is a man's, relative to other men: beside women's it would be their gender. In training he
    is of any size.
    """
    pool = lexicon.pooled(rng, kind, held_out=held_out)
    among = {
        "voice": lexicon.PEOPLE,
        "gender": ("male", "female"),
        "pitch": PITCHES,
        "rate": SPEEDS,
        "emotion": EMOTIONS,
    }
    text = pick(pool, tuple(among[kind]))
    men = (
        {"gender": "male"}
        if held_out
        else {
            "variants": lexicon.DEEP,
            "tract": SIZES,
            "breath": pick(pool, BREATHS),
        }
    )
    men["range"] = (20, 50)
    how = {
        "voice": lambda: Manner(voice=lexicon.PEOPLE[text]),
        "gender": lambda: Manner(gender=text),
        "pitch": lambda: Manner(pitch=PITCHES[text], **men),
        "rate": lambda: Manner(rate=SPEEDS[text]),
        "emotion": lambda: Manner(pitch=EMOTIONS[text][0], rate=EMOTIONS[text][1], **men),
    }[kind]()
    number = 4 if kind == "voice" and held_out else pool.integers(2, 4)
    words = [str(pick(pool, vocabulary)) for _ in range(number)]
    said = lexicon.say(" ".join(words), pool, how, held_out=held_out)
    facts = {"gender": said.gender} if said.gender else {}
    if kind in ("voice", "gender"):  # recognition trains no pitches and speeds of the others
        facts["recognise en"] = " ".join(words)
    return _made(said.wave, text, rng, facts=facts)


def presence(rng: np.random.Generator, held_out: bool, *, vocabulary: tuple[str, ...]) -> Sample:
    """Whether somebody speaks."""
    if rng.random() < 0.5:
        return _made(unspoken(rng, held_out), "no speech", rng)
    sample = speech(rng, held_out, language="en", vocabulary=vocabulary, most=3)
    return {**sample, "text": "speech"}


def unspoken(rng: np.random.Generator, held_out: bool) -> np.ndarray:
    """Sounds, music or noise, and nobody speaks."""
    kind = rng.integers(4)
    if kind == 0:
        length = int(rng.uniform(0.4, 1.8) * SAMPLE_RATE)
        return augment.set_peak(augment.any_noise(length, rng), rng.uniform(-30, -6))
    if kind == 1:
        return sounds.melody(pick(rng, tuple(sounds.INSTRUMENTS)), rng, held_out=held_out)
    if kind == 2:
        return sounds.rhythm(pick(rng, tuple(sounds.BEATS)), rng, held_out=held_out)
    return sounds.sequence(
        [
            sounds.event(pick(rng, sounds.EVENTS), rng, held_out=held_out)
            for _ in range(rng.integers(1, 4))
        ],
        rng,
    )


def sound(rng: np.random.Generator, held_out: bool) -> Sample:
    """One event."""
    kind = pick(rng, sounds.EVENTS)
    return _made(sounds.event(kind, rng, held_out=held_out, seconds=(0.2, 0.5)), kind, rng)


def count(rng: np.random.Generator, held_out: bool, *, most: int) -> Sample:
    """The same event, one to `most` times."""
    number = int(rng.integers(1, most + 1))
    return _made(_repeated(pick(rng, sounds.EVENTS), number, rng, held_out), NUMBERS[number], rng)


def order(rng: np.random.Generator, held_out: bool) -> Sample:
    """Two or three different events."""
    kinds = rng.choice(sounds.EVENTS, size=rng.integers(2, 4), replace=False).tolist()
    waves = [sounds.event(kind, rng, held_out=held_out, seconds=SHORT) for kind in kinds]
    return _made(sounds.sequence(waves, rng), ", ".join(kinds), rng)


def drawn(
    rng: np.random.Generator,
    held_out: bool,
    *,
    make: Callable[..., np.ndarray],
    among: tuple[str, ...],
) -> Sample:
    """What a function of sounds.py makes of one of `among`, its first argument."""
    text = pick(rng, among)
    return _made(make(text, rng, held_out=held_out), text, rng)


def chord(rng: np.random.Generator, held_out: bool) -> Sample:
    """A chord on any instrument."""
    motion = pick(rng, tuple(sounds.CHORDS))
    instrument = pick(rng, tuple(sounds.INSTRUMENTS))
    return _made(sounds.chord(motion, instrument, rng, held_out=held_out), motion, rng)


def caption(rng: np.random.Generator, held_out: bool, *, vocabulary: tuple[str, ...]) -> Sample:
    """One or two of: somebody says something, events, a chord, a drum."""
    makers = (
        lambda: _speaker(rng, held_out, vocabulary),
        lambda: _events(rng, held_out),
        lambda: _chord(rng, held_out),
        lambda: _drum(rng, held_out),
    )
    chosen = rng.choice(len(makers), size=rng.integers(1, 3), replace=False)
    texts, waves = zip(*(makers[i]() for i in chosen), strict=True)
    text = ", then ".join(texts)
    return _made(sounds.sequence(waves, rng, gap=(0.2, 0.4)), text, rng)


def question(rng: np.random.Generator, held_out: bool) -> Sample:
    """Two or three kinds of events, some repeated, and a question about them."""
    size = int(rng.integers(2, 4))
    kinds = rng.choice(sounds.EVENTS, size=size, replace=False).tolist()
    counts = rng.integers(1, 3, size=size).tolist()
    waves = [_repeated(k, n, rng, held_out) for k, n in zip(kinds, counts, strict=True)]
    about = pick(rng, kinds if rng.random() < 0.6 else sounds.EVENTS)
    number = dict(zip(kinds, counts, strict=True)).get(about, 0)
    answers = (kinds[0], kinds[-1], NUMBERS[number], "yes" if number else "no")
    asked = rng.integers(len(QUESTIONS))
    wave = sounds.sequence(waves, rng, gap=(0.2, 0.35))
    return _made(wave, answers[asked], rng, question=_ask(QUESTIONS[asked], about))


def any_question(rng: np.random.Generator) -> str:
    """A question that `question` may ask."""
    return _ask(pick(rng, QUESTIONS), pick(rng, sounds.EVENTS))


def _ask(question: str, about: str) -> str:
    return question.format(about=about, many=plural(about))


def plural(kind: str) -> str:
    return kind + ("es" if kind[-1] in "sz" else "s")


def _repeated(kind: str, number: int, rng: np.random.Generator, held_out: bool) -> np.ndarray:
    wave = sounds.event(kind, rng, held_out=held_out, seconds=SHORT)
    return sounds.sequence([wave] * number, rng, gap=(0.12, 0.25))


def _speaker(rng: np.random.Generator, held_out: bool, vocabulary: tuple[str, ...]) -> tuple:
    pool = lexicon.pooled(rng, "caption", held_out=held_out)
    gender = pick(pool, tuple(WHO))
    text = " ".join(lexicon.phrase(pool, vocabulary, most=2))
    said = lexicon.say(text, pool, Manner(gender=gender), held_out=held_out)
    return f"{WHO[gender]} says {text}", said.wave


def _events(rng: np.random.Generator, held_out: bool) -> tuple:
    kind, number = pick(rng, sounds.EVENTS), int(rng.integers(1, 4))
    text = f"a {kind}" if number == 1 else f"{NUMBERS[number]} {plural(kind)}"
    return text, _repeated(kind, number, rng, held_out)


def _chord(rng: np.random.Generator, held_out: bool) -> tuple:
    motion = pick(rng, tuple(sounds.CHORDS))
    instrument = pick(rng, tuple(sounds.INSTRUMENTS))
    wave = sounds.chord(motion, instrument, rng, held_out=held_out)
    return f"a {motion} chord on the {instrument}", wave


def _drum(rng: np.random.Generator, held_out: bool) -> tuple:
    tempo = pick(rng, tuple(sounds.BEATS))
    return f"a {tempo} drum", sounds.rhythm(tempo, rng, held_out=held_out)
