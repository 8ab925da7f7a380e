"""Words to speech: made utterances in hundreds of voices, for the demonstration and for tests.

The synthesiser is espeak-ng, which the `espeakng-loader` wheel carries (extra: `demo`).
"""

import _ctypes
import ctypes
import os
import pathlib
import threading

import numpy as np
import soxr
from jaxtyping import Float, Int16

from qwen2audio_jax.audio import SAMPLE_RATE

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = (
    *DIGITS,
    *("yes", "no", "up", "down", "left", "right", "stop", "go", "open", "close"),
    *("red", "green", "blue", "yellow", "black", "orange"),
    *("dog", "cat", "bird", "house", "window", "river", "mountain", "music", "coffee", "sugar"),
    *("paper", "happy", "summer", "kitchen"),
)

ACCENTS = ("en-us", "en-us-nyc", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan")

# A variant is a timbre: vocal tract, breath, larynx. All of espeak-ng 1.52's, except caricatures
# (Demonic, Tweaky, AnxiousAndy, kaukovalta, zac), `fast` (the default timbre once more) and
# Reed and caleb (they draw from the C library's global rand(), so no seed would hold).
TRAIN_VARIANTS = (
    *("adam", "Alex", "Alicia", "Andy", "anika", "anikaRobot", "Annie", "announcer", "antonio"),
    *("aunty", "belinda", "benjamin", "croak", "david", "Denis", "Diogo", "ed", "edward"),
    *("edward2", "f1", "f2", "f3", "f5", "Gene", "Gene2", "grandma", "grandpa", "gustave"),
    *("Henrique", "Hugo", "ian", "iven", "iven2", "iven3", "iven4", "Jacky", "john", "klatt"),
    *("klatt2", "klatt3", "klatt4", "klatt5", "klatt6", "Lee", "m1", "m2", "m3", "m4", "m5", "m6"),
    *("m7", "m8", "marcelo", "Marco", "max", "Michael", "michel", "miguel", "Mike", "mike2"),
    *("Mr serious", "Nguyen", "norbert", "pablo", "paul", "quincy", "RicishayMax"),
    *("RicishayMax2", "RicishayMax3", "rob", "robert", "robosoft", "robosoft2", "robosoft3"),
    *("robosoft4", "robosoft5", "robosoft7", "robosoft8", "sandro", "shelby", "steph", "steph2"),
    *("steph3", "Storm", "travis", "UniRobot", "whisper", "whisperf"),
)
# Several variants are near copies of each other, so the split goes by groups: variants were
# clustered by the distance of their log-mels on the same words (single linkage, 4 dB), and every
# eighth of the 62 clusters is held out. No training variant is closer than 4.7 dB to these, and
# there are women (Andrea, f4, linda), men and a robot among them.
HELD_OUT_VARIANTS = ("Andrea", "boris", "f4", "linda", "Mario", "pedro", "robosoft6", "victor")

TRAIN_VOICES = tuple(f"{accent}+{variant}" for variant in TRAIN_VARIANTS for accent in ACCENTS)
HELD_OUT_VOICES = tuple(f"{a}+{variant}" for variant in HELD_OUT_VARIANTS for a in ACCENTS)

_lock = threading.Lock()  # espeak-ng is one global state
_unload = _ctypes.FreeLibrary if os.name == "nt" else _ctypes.dlclose
_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)
_SYNCHRONOUS, _UTF8, _CHARACTERS = 2, 1, 1  # names and numbers: espeak-ng's speak_lib.h
_RATE, _VOLUME, _PITCH, _RANGE, _WORD_GAP = 1, 2, 3, 4, 7


def _find_espeak() -> tuple[str, pathlib.Path]:
    try:
        import espeakng_loader
    except ImportError:
        message = "speech synthesis needs espeak-ng: pip install 'qwen2audio_jax[demo]'"
        raise ImportError(message) from None
    return espeakng_loader.get_library_path(), pathlib.Path(espeakng_loader.get_data_path())


def _synthesise(
    text: str, voice: str, settings: dict[int, int]
) -> tuple[Int16[np.ndarray, " S"], int]:
    """Samples and their rate, from a library that is loaded for this one call.

    espeak-ng keeps the phases of flutter, noise and echo in static variables that no call resets:
    in a library that stays loaded the same words sound different each time.
    """
    library_path, data = _find_espeak()
    variant = voice.partition("+")[2]
    if variant and not (data / "voices" / "!v" / variant).is_file():  # espeak-ng would ignore it
        raise ValueError(f"espeak-ng has no voice variant {variant!r} (asked for {voice!r})")
    chunks = []

    @_Callback
    def collect(samples, count, events):
        if samples and count > 0:
            chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    with _lock:
        library = ctypes.CDLL(library_path)
        try:
            rate = library.espeak_Initialize(_SYNCHRONOUS, 0, os.fsencode(data), 0)
            if rate <= 0:
                raise RuntimeError(f"espeak-ng does not start with its data at {data}")
            library.espeak_SetSynthCallback(collect)
            library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # breath; else seeded by the clock
            if library.espeak_SetVoiceByName(voice.encode()):
                raise ValueError(f"espeak-ng has no voice {voice!r}")
            for parameter, value in settings.items():
                library.espeak_SetParameter(parameter, value, 0)
            encoded = text.encode()
            library.espeak_Synth(
                encoded, ctypes.c_size_t(len(encoded) + 1), 0, _CHARACTERS, 0, _UTF8, None, None
            )
            library.espeak_Terminate()
        finally:
            _unload(library._handle)
    return np.concatenate(chunks) if chunks else np.zeros(0, np.int16), rate


def speak(
    text: str,
    *,
    voice: str = "en-us",
    rate: int = 175,
    pitch: int = 50,
    pitch_range: int = 50,
    word_gap: int = 0,
) -> Float[np.ndarray, " S"]:
    """Says `text`: mono float32 at 16 kHz, the same bits for the same arguments in any process.

    Args:
      text: what to say.
      voice: a language of espeak-ng, or a language and a variant: "en-us", "en-gb-x-rp+f3".
      rate: words per minute, 80 to 450.
      pitch: 0 to 99, relative to the voice's own.
      pitch_range: 0 (monotone) to 100.
      word_gap: extra pause between words, in units of 10 ms.

    Raises:
      ImportError: the `espeakng-loader` wheel is not installed.
      ValueError: no such voice, a number out of its range, or nothing to say in `text`.
    """
    limits = {
        "rate": (rate, 80, 450),
        "pitch": (pitch, 0, 99),
        "pitch_range": (pitch_range, 0, 100),
    }
    for name, (value, low, high) in limits.items():
        if not low <= value <= high:
            raise ValueError(f"{name} must be {low} to {high}, got {value}")
    settings = {
        _RATE: rate,
        _VOLUME: 60,  # at espeak-ng's 100, one variant in four clips
        _PITCH: pitch,
        _RANGE: pitch_range,
        _WORD_GAP: word_gap,
    }
    samples, sample_rate = _synthesise(text, voice, settings)
    if not samples.any():
        raise ValueError(f"espeak-ng found nothing to say in {text!r}")
    wave = soxr.resample(samples.astype(np.float32) / 32768, sample_rate, SAMPLE_RATE)
    return wave.astype(np.float32)


def trim(wave: Float[np.ndarray, " S"], *, decibels: float = 40.0) -> Float[np.ndarray, " R"]:
    """Drops what lies before and after speech: 10 ms windows `decibels` below the loudest."""
    window = SAMPLE_RATE // 100
    power = np.add.reduceat(np.square(wave), np.arange(0, len(wave), window))
    loud = np.flatnonzero(power > power.max() * 10 ** (-decibels / 10))
    return wave[loud[0] * window : (loud[-1] + 1) * window] if len(loud) else wave
