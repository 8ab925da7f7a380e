"""Sounds and music by numpy, each with its name: what a small world sounds like besides speech.

Waves are mono float32 at 16 kHz, within [-1, 1]. What makes a sound its own (its frequencies) is
drawn by `dial`, so that held-out sounds differ from all others in every one of these numbers.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import scipy.fft
from jaxtyping import Float

from qwen2audio_jax.audio import SAMPLE_RATE

CELLS = 20  # of a dial's range
HELD_OUT_CELLS = (2, 7, 12, 17)
EVENTS = ("beep", "bell", "buzz", "click", "hiss", "rising chirp", "falling chirp")
PERIOD = 1024  # samples of a wavetable
# A church bell's partials, relative to the strike note: frequency, level, seconds to decay by 1/e.
BELL = ((0.5, 0.5, 0.25), (1.0, 1.0, 0.2), (1.19, 0.5, 0.15), (1.5, 0.4, 0.1), (2.0, 0.6, 0.1))

Samples = Float[np.ndarray, " _"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instrument:
    """A timbre: levels of the harmonics, and how a note begins, lasts and wavers."""

    harmonics: tuple[float, ...]
    attack: float  # seconds
    decay: float = np.inf  # seconds to 1/e
    vibrato: float = 0.0  # depth, relative to the frequency


INSTRUMENTS = {
    "flute": Instrument(harmonics=(1.0, 0.2, 0.05), attack=0.06, vibrato=0.004),
    "organ": Instrument(harmonics=(1.0, 0.8, 0.0, 0.7, 0.0, 0.0, 0.0, 0.6), attack=0.01),
    "piano": Instrument(harmonics=(1.0, 0.5, 0.3, 0.15, 0.1, 0.05), attack=0.004, decay=0.12),
    "violin": Instrument(
        harmonics=tuple(h**-0.7 for h in range(1, 13)), attack=0.09, vibrato=0.012
    ),
}
CHORDS = {"rising": (0, 4, 7), "falling": (7, 4, 0)}  # semitones above the root, in their order
BEATS = {"slow": (0.5, 0.65), "fast": (0.15, 0.22)}  # seconds from one to the next
TONES = {"low": (150.0, 400.0), "high": (1200.0, 3000.0)}  # Hz


def dial(rng: np.random.Generator, low: float, high: float, *, held_out: bool) -> float:
    """Draws from a range, evenly in octaves, in cells that only held-out sounds use, or others."""
    cell = rng.choice(HELD_OUT_CELLS) if held_out else rng.integers(CELLS)
    while not held_out and cell in HELD_OUT_CELLS:
        cell = rng.integers(CELLS)
    return float(low * (high / low) ** ((cell + rng.random()) / CELLS))


def event(
    kind: str,
    rng: np.random.Generator,
    *,
    held_out: bool = False,
    seconds: tuple[float, float] = (0.15, 0.35),
) -> Samples:
    """One sound of EVENTS, of a length within `seconds` (a click is shorter)."""
    length = rng.uniform(*seconds)
    t = _times(0.04 if kind == "click" else length)
    draw = lambda low, high: dial(rng, low, high, held_out=held_out)
    if kind == "beep":
        wave = np.sin(2 * np.pi * draw(300.0, 2400.0) * t)
    elif kind == "bell":
        strike = draw(500.0, 1800.0)
        wave = sum(a * np.exp(-t / d) * np.sin(2 * np.pi * f * strike * t) for f, a, d in BELL)
    elif kind == "buzz":
        wave = _periodic(draw(70.0, 160.0) * t, np.ones(30))
    elif kind == "click":
        wave = np.exp(-t / 0.003) * np.sin(2 * np.pi * draw(1500.0, 5000.0) * t)
    elif kind == "hiss":
        wave = _band(len(t), draw(2000.0, 5000.0), rng)
    elif kind in ("rising chirp", "falling chirp"):
        start, octaves = draw(250.0, 700.0), draw(1.0, 2.2)
        # the phase of an exponential sweep is the integral of its frequency
        phase = start * length / (octaves * np.log(2)) * 2 ** (octaves * t / length)
        wave = np.sin(2 * np.pi * phase)
        wave = wave[::-1] if kind == "falling chirp" else wave
    else:
        raise ValueError(f"wanted a sound of {', '.join(EVENTS)}, got {kind!r}")
    return _finish(wave)


def tone(height: str, rng: np.random.Generator, *, held_out: bool = False) -> Samples:
    """A beep that is "low" or "high"."""
    frequency = dial(rng, *TONES[height], held_out=held_out)
    return _finish(np.sin(2 * np.pi * frequency * _times(rng.uniform(0.3, 0.6))))


def two_tones(higher: str, rng: np.random.Generator, *, held_out: bool = False) -> Samples:
    """Two beeps, the "first" or the "second" of them higher by half an octave or more."""
    low = dial(rng, 250.0, 1000.0, held_out=held_out)
    high = low * 2 ** dial(rng, 0.5, 1.5, held_out=held_out)
    pair = (high, low) if higher == "first" else (low, high)
    t = _times(rng.uniform(0.25, 0.4))
    return sequence([_finish(np.sin(2 * np.pi * f * t)) for f in pair], rng, gap=(0.08, 0.15))


def note(instrument: str, frequency: float, seconds: float) -> Samples:
    """One note of INSTRUMENTS."""
    played, t = INSTRUMENTS[instrument], _times(seconds)
    # Wavering at 5.5 Hz, as fingers do.
    phase = frequency * (t - played.vibrato / (2 * np.pi * 5.5) * np.cos(2 * np.pi * 5.5 * t))
    wave = _periodic(phase, np.array(played.harmonics))
    return wave * np.minimum(t / played.attack, 1) * np.exp(-t / played.decay)


def chord(
    motion: str, instrument: str, rng: np.random.Generator, *, held_out: bool = False
) -> Samples:
    """A major triad, its notes one by one, "rising" or "falling", and then together."""
    root = dial(rng, 330.0, 660.0, held_out=held_out)
    notes = [root * 2 ** (semitones / 12) for semitones in CHORDS[motion]]
    step = rng.uniform(0.16, 0.24)
    together = sum(note(instrument, frequency, 0.5) for frequency in notes)
    broken = [_finish(note(instrument, frequency, step)) for frequency in notes]
    return np.concatenate([*broken, _finish(together)])


def melody(instrument: str, rng: np.random.Generator, *, held_out: bool = False) -> Samples:
    """Two to four notes."""
    seconds = rng.uniform(0.25, 0.45)
    notes = [dial(rng, 260.0, 700.0, held_out=held_out) for _ in range(rng.integers(2, 5))]
    return np.concatenate([_finish(note(instrument, each, seconds)) for each in notes])


def rhythm(tempo: str, rng: np.random.Generator, *, held_out: bool = False) -> Samples:
    """A drum that beats four to seven times, "slow" or "fast"."""
    beat = dial(rng, *BEATS[tempo], held_out=held_out)
    skin, t = dial(rng, 90.0, 220.0, held_out=held_out), _times(0.12)
    snare = rng.standard_normal(len(t), dtype=np.float32) * np.exp(-t / 0.015)
    stroke = _finish(np.sin(2 * np.pi * skin * t) * np.exp(-t / 0.04) + 0.4 * snare)
    count = rng.integers(4, 6 if tempo == "slow" else 8)
    wave = np.zeros(round(beat * SAMPLE_RATE) * (count - 1) + len(stroke), np.float32)
    for start in range(count):
        at = start * round(beat * SAMPLE_RATE)
        wave[at : at + len(stroke)] += stroke
    return wave


def sequence(
    waves: Sequence[Samples], rng: np.random.Generator, *, gap: tuple[float, float] = (0.12, 0.3)
) -> Samples:
    """One after another, with a silence of `gap` seconds between them."""
    parts = [waves[0]]
    for wave in waves[1:]:
        parts += [np.zeros(round(rng.uniform(*gap) * SAMPLE_RATE), np.float32), wave]
    return np.concatenate(parts)


def surround(wave: Samples, rng: np.random.Generator) -> Samples:
    """Up to 0.15 s of silence on either side, mostly little."""
    return np.pad(wave, (0.15 * SAMPLE_RATE * rng.random(2) ** 2).astype(int))


def _times(seconds: float) -> Float[np.ndarray, " S"]:
    return np.arange(round(seconds * SAMPLE_RATE), dtype=np.float32) / SAMPLE_RATE


def _periodic(
    phase: Float[np.ndarray, " S"], harmonics: Float[np.ndarray, " K"]
) -> Float[np.ndarray, " S"]:
    """A sum of harmonics, looked up in one period: far faster than as many sines."""
    spectrum = np.zeros(PERIOD // 2 + 1, np.complex64)
    spectrum[1 : len(harmonics) + 1] = -1j * harmonics * PERIOD / 2
    table = scipy.fft.irfft(spectrum, PERIOD)
    return table[(phase * PERIOD).astype(np.int32) % PERIOD]


def _band(samples: int, centre: float, rng: np.random.Generator) -> Float[np.ndarray, " S"]:
    """Noise within a third of an octave below and above `centre` Hz."""
    size = scipy.fft.next_fast_len(samples, real=True)
    spectrum = scipy.fft.rfft(rng.standard_normal(size, dtype=np.float32))
    bins = np.arange(len(spectrum), dtype=np.float32) * np.float32(SAMPLE_RATE / size / centre)
    spectrum[(bins < 2 ** (-1 / 3)) | (bins > 2 ** (1 / 3))] = 0
    return scipy.fft.irfft(spectrum, size)[:samples]


def _finish(wave: Float[np.ndarray, " S"]) -> Float[np.ndarray, " S"]:
    """The peak at one half, and 4 ms to come and go in: an edge would be a click."""
    fade = np.minimum(np.arange(1, len(wave) + 1) / (0.004 * SAMPLE_RATE), 1)
    wave = wave * np.minimum(fade, fade[::-1])
    return (0.5 / np.abs(wave).max() * wave).astype(np.float32)
