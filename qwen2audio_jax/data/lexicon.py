"""The words of a small world in five languages, and how they are said (extra: `demo`)."""

import dataclasses
import functools
import re
import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from qwen2audio_jax.audio import SAMPLE_RATE
from qwen2audio_jax.data import augment, synth

LANGUAGES = {"en": "English", "de": "German", "es": "Spanish", "fr": "French", "zh": "Chinese"}
_ESPEAK = {"zh": "cmn"}  # where espeak-ng has another name for the language
# fmt: off
LEXICON = (
    # en        de         es          fr         zh
    ("zero",   "null",    "cero",     "zéro",    "零"),
    ("one",    "eins",    "uno",      "un",      "一"),
    ("two",    "zwei",    "dos",      "deux",    "二"),
    ("three",  "drei",    "tres",     "trois",   "三"),
    ("four",   "vier",    "cuatro",   "quatre",  "四"),
    ("five",   "fünf",    "cinco",    "cinq",    "五"),
    ("six",    "sechs",   "seis",     "six",     "六"),
    ("seven",  "sieben",  "siete",    "sept",    "七"),
    ("eight",  "acht",    "ocho",     "huit",    "八"),
    ("nine",   "neun",    "nueve",    "neuf",    "九"),
    ("red",    "rot",     "rojo",     "rouge",   "红"),
    ("green",  "grün",    "verde",    "vert",    "绿"),
    ("blue",   "blau",    "azul",     "bleu",    "蓝"),
    ("yellow", "gelb",    "amarillo", "jaune",   "黄"),
    ("black",  "schwarz", "negro",    "noir",    "黑"),
    ("dog",    "Hund",    "perro",    "chien",   "狗"),
    ("cat",    "Katze",   "gato",     "chat",    "猫"),
    ("bird",   "Vogel",   "pájaro",   "oiseau",  "鸟"),
    ("house",  "Haus",    "casa",     "maison",  "房子"),
    ("river",  "Fluss",   "río",      "rivière", "河"),
)
# fmt: on
SMALL = (*synth.DIGITS, "red", "green", "blue", "dog", "cat", "bird")

# Whose fundamental is that of a woman or a man (at espeak-ng's middle pitch 140 to 260 Hz, and 80
# to 115 Hz, measured), and who neither whispers nor creaks.
FEMALE = ("Alicia", "anika", "Annie", "aunty", "belinda", "f1", "f2", "f3", "f5", "grandma",
          "shelby", "steph")  # fmt: skip
MALE = ("Andy", "antonio", "Denis", "Diogo", "Henrique", "Jacky", "john", "klatt2", "klatt6", "Lee",
        "m1", "m2", "m3", "m7", "marcelo", "max", "Michael", "miguel", "Mr serious", "pablo",
        "paul", "robert", "Storm", "travis")  # fmt: skip
# Others whose fundamental is a man's, at every pitch of espeak-ng's: they breathe, croak, buzz.
DEEP = (*MALE, "adam", "Alex", "benjamin", "croak", "david", "ed", "edward", "edward2", "Gene",
        "Gene2", "grandpa", "gustave", "Hugo", "iven", "iven2", "iven3", "iven4", "klatt", "klatt3",
        "klatt4", "klatt5", "m4", "m5", "m6", "m8", "Marco", "michel", "Mike", "mike2", "norbert",
        "RicishayMax", "RicishayMax2", "RicishayMax3", "rob", "robosoft2", "robosoft3", "robosoft4",
        "robosoft5", "robosoft7", "sandro")  # fmt: skip
HELD_OUT_FEMALE, HELD_OUT_MALE = ("Andrea", "f4", "linda"), ("boris", "Mario", "pedro", "victor")
GENDERS = {
    **dict.fromkeys((*FEMALE, *HELD_OUT_FEMALE), "female"),
    **dict.fromkeys((*MALE, *HELD_OUT_MALE), "male"),
}
# Who is known by name: the women and the men of training whose long-term spectra are farthest apart
# (11 dB and more, measured), each with an accent.
PEOPLE = {
    "Anna": "en-us+Alicia",
    "Clara": "en-gb-x-rp+belinda",
    "Maria": "en-us-nyc+steph",
    "Ben": "en-us+Lee",
    "Hugo": "en-gb-scotland+travis",
    "Oscar": "en-gb-x-rp+klatt2",
}

# Of what is said in training; the rest recurs, in another room each time, for espeak-ng is slow.
FRESH = 0.15


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manner:
    """How something is said; each number is drawn from its range."""

    language: str = "en"
    voice: str | None = None  # anybody's
    gender: str | None = None  # any
    variants: tuple[str, ...] = ()  # one of these timbres, if any are named
    rate: tuple[int, int] = (120, 230)  # words per minute
    pitch: tuple[int, int] = (35, 65)  # 0 to 99, relative to the voice's own
    range: tuple[int, int] = (20, 90)  # 0 monotone, to 100
    tract: tuple[float, float] = (1.0, 1.0)  # how much shorter a vocal tract than the voice's own
    breath: tuple[float, float] = (0.0, 0.0)  # in place of so much of the voice's power


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Said:
    """Speech: mono samples at 16 kHz, and whose it is."""

    wave: Float[np.ndarray, " _"]
    voice: str

    @property
    def gender(self) -> str | None:
        return GENDERS.get(self.voice.partition("+")[2])


def pooled(
    rng: np.random.Generator, name: str, *, held_out: bool, size: int = 3000
) -> np.random.Generator:
    """A generator to draw words and voices from; in training mostly one of `size`, which recur."""
    fresh = held_out or rng.random() < FRESH
    number = int(rng.integers(size, 1 << 40) if fresh else rng.integers(size))
    return np.random.default_rng((zlib.crc32(name.encode()), held_out, number))


def say(
    text: str, rng: np.random.Generator, manner: Manner = Manner(), *, held_out: bool = False
) -> Said:
    """Says `text` in some voice, trimmed, its peak at one half."""
    voice = manner.voice or _voice(rng, manner, held_out)
    own = manner.tract == (1.0, 1.0)
    tract = 1.0 if own else rng.uniform(*manner.tract)
    settings = {
        "rate": round(int(rng.integers(*manner.rate)) / tract),  # heard as fast as it was drawn
        "pitch": int(rng.integers(*manner.pitch)),
        "pitch_range": int(rng.integers(*manner.range)),
    }
    wave = _speak(text, voice, *settings.items()).astype(np.float32) / 32767
    wave = wave if own else augment.change_speed(wave, tract)
    if manner.breath[1]:
        wave = augment.hoarse(wave, rng, share=rng.uniform(*manner.breath))
    return Said(wave=wave, voice=voice)


def say_apart(
    words: Sequence[str], rng: np.random.Generator, manner: Manner = Manner(), *, held_out: bool
) -> tuple[Said, list[tuple[float, float]]]:
    """Says word after word, and when: start and end of each in seconds."""
    seed, parts, times = int(rng.integers(1 << 40)), [], []
    at = 0
    for word in words:
        pause = int(rng.uniform(0.08, 0.35) * SAMPLE_RATE)
        # the same voice at the same pace for each word
        said = say(word, np.random.default_rng(seed), manner, held_out=held_out)
        parts += [np.zeros(pause, np.float32), said.wave]
        times.append(((at + pause) / SAMPLE_RATE, (at + pause + len(said.wave)) / SAMPLE_RATE))
        at += pause + len(said.wave)
    return Said(wave=np.concatenate(parts), voice=said.voice), times


def spoken(question: str) -> str:
    """A question's words alone, as recognition writes them."""
    return re.sub(r"[^\w\s]", "", question).lower()


def words(language: str) -> tuple[str, ...]:
    """What is said in a language; in English also words that are not translated."""
    if language == "en":
        return synth.WORDS
    column = list(LANGUAGES).index(language)
    return tuple(row[column] for row in LEXICON)


def phrase(rng: np.random.Generator, vocabulary: Sequence[str], *, most: int) -> list[str]:
    """One to `most` words; a lone digit more often than chance, as numbers are said alone."""
    if rng.random() < 0.2:
        return [str(vocabulary[rng.integers(10)])]
    return [
        str(vocabulary[i]) for i in rng.integers(len(vocabulary), size=rng.integers(1, most + 1))
    ]


def translate(concepts: Sequence[int], language: str) -> list[str]:
    """Rows of LEXICON in a language."""
    column = list(LANGUAGES).index(language)
    return [LEXICON[i][column] for i in concepts]


def join(words: Sequence[str], language: str) -> str:
    """Words as they are written in a row: Chinese has no spaces."""
    return ("" if language == "zh" else " ").join(words)


def _voice(rng: np.random.Generator, manner: Manner, held_out: bool) -> str:
    everybody = synth.HELD_OUT_VARIANTS if held_out else synth.TRAIN_VARIANTS
    variants = manner.variants or everybody
    if manner.gender is not None:
        variants = [each for each in variants if GENDERS.get(each) == manner.gender]
    variant = variants[rng.integers(len(variants))]
    if manner.language != "en":
        return f"{_ESPEAK.get(manner.language, manner.language)}+{variant}"
    return f"{synth.ACCENTS[rng.integers(len(synth.ACCENTS))]}+{variant}"


@functools.lru_cache(maxsize=30_000)
def _speak(text: str, voice: str, *settings: tuple[str, int]) -> np.ndarray:
    """Kept as 16 bits: tens of thousands of them stay in memory, a gigabyte at most."""
    wave = synth.trim(synth.speak(text, voice=voice, **dict(settings)))
    return np.round(wave * (32767 / 2 / np.abs(wave).max())).astype(np.int16)
