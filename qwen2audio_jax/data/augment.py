"""Waveforms and mels made harder, seeded: other rooms, microphones, noises, speakers.

Waveforms are mono float32 at 16 kHz. Each function is pure; `augment` and `spec_augment` are the
mixtures that training uses.
"""

import dataclasses
import math

import numpy as np
import scipy.fft
import scipy.signal
import soxr
from jaxtyping import Float

from qwen2audio_jax.audio import SAMPLE_RATE

SHORTEST = 800  # samples; 320 or fewer would give the model no audio token
LONGEST_SPAN = 100  # frames that are hidden: a second, which hides few words


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What is done to a clip that is augmented, and to one that is masked.

    A chance is that of each such clip; a range is drawn from evenly.
    """

    speed: float = 0.8
    """The chance of another speed, which moves pitch and formants, too."""
    speeds: tuple[float, float] = (0.85, 1.2)
    """Relative to the clip's own."""
    silence: float = 0.5
    """The chance of up to 0.3 s of silence before and behind."""
    room: float = 0.3
    """The chance of a room's echo."""
    microphone: float = 0.6
    """The chance of a microphone's colour, of up to 8 dB."""
    noise: float = 0.7
    """The chance of noise, hum or distant voices."""
    snr: tuple[float, float] = (5.0, 40.0)
    """Decibels that the clip is above them."""
    telephone: float = 0.1
    """The chance that nothing above 4 kHz is left, as of recordings at 8 kHz."""
    peak: tuple[float, float] = (-26.0, 0.0)
    """Decibels of the loudest sample, of full scale."""
    bands: int = 2
    """Up to so many bands of a masked clip's mel are hidden."""
    band: float = 0.15
    """The widest, as a part of all."""
    spans: int = 2
    """Up to so many spans of time are hidden."""
    span: float = 0.1
    """The longest, as a part of the clip; never more than a second."""

    def __post_init__(self):
        for name in ("speed", "silence", "room", "microphone", "noise", "telephone"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"wanted a chance of {name} from 0 to 1, got {getattr(self, name)}"
                )
        for name, least in (("speeds", 0.1), ("snr", -math.inf), ("peak", -math.inf)):
            low, high = getattr(self, name)
            if not (least <= low <= high and all(map(math.isfinite, (low, high)))):
                raise ValueError(f"wanted {name} as a range, got {low} to {high}")
        if self.peak[1] > 0:
            raise ValueError(f"wanted a peak of at most 0 dB of full scale, got {self.peak[1]}")
        if min(self.bands, self.spans) < 0 or not (0 <= self.band < 1 and 0 <= self.span < 1):
            raise ValueError(
                f"wanted bands and spans from 0, each a part of the mel below 1, got "
                f"{self.bands} of {self.band} and {self.spans} of {self.span}"
            )


USUAL = Augmentation()


def set_peak(wave: Float[np.ndarray, " S"], decibels: float) -> Float[np.ndarray, " S"]:
    """Scales so that the loudest sample is `decibels` relative to full scale."""
    peak = np.abs(wave).max(initial=0.0)
    return wave * np.float32(10 ** (decibels / 20) / peak) if peak else wave


def change_speed(wave: Float[np.ndarray, " S"], factor: float) -> Float[np.ndarray, " R"]:
    """Plays `factor` times as fast; formants and pitch move too, as in a shorter vocal tract."""
    return soxr.resample(wave, SAMPLE_RATE * factor, SAMPLE_RATE, quality="MQ")


def hoarse(
    wave: Float[np.ndarray, " S"], rng: np.random.Generator, *, share: float
) -> Float[np.ndarray, " S"]:
    """Breath in place of a `share` of the voice's power: noise with the same spectrum over time."""
    window = min(400, len(wave))
    _, _, spectrum = scipy.signal.stft(wave, nperseg=window)
    phases = np.exp(2j * np.pi * rng.random(spectrum.shape))
    breath = scipy.signal.istft(spectrum * phases, nperseg=window)[1][: len(wave)]
    breath = np.pad(breath, (0, len(wave) - len(breath)))
    breath *= np.sqrt(np.mean(wave**2) / max(np.mean(breath**2), 1e-12))
    mixed = np.sqrt(1 - share) * wave + np.sqrt(share) * breath
    return mixed.astype(np.float32)


def telephone(wave: Float[np.ndarray, " S"], *, rate: int = 8_000) -> Float[np.ndarray, " S"]:
    """What is left after a recording at `rate` Hz: nothing above half of it."""
    narrow = soxr.resample(wave, SAMPLE_RATE, rate, quality="MQ")
    wide = soxr.resample(narrow, rate, SAMPLE_RATE, quality="MQ")[: len(wave)]
    return np.pad(wide, (0, len(wave) - len(wide)))


def equalise(
    wave: Float[np.ndarray, " S"], decibels: Float[np.ndarray, " K"]
) -> Float[np.ndarray, " S"]:
    """A microphone's colour: gains at K frequencies, evenly spaced in octaves, 60 Hz to 8 kHz."""
    size = scipy.fft.next_fast_len(len(wave) + 400, real=True)  # 400: the filter's tail
    octaves = np.log2(np.maximum(np.fft.rfftfreq(size, 1 / SAMPLE_RATE), 1.0))
    knots = np.linspace(np.log2(60), np.log2(SAMPLE_RATE / 2), len(decibels))
    gains = (10 ** (np.interp(octaves, knots, decibels) / 20)).astype(np.float32)
    return scipy.fft.irfft(scipy.fft.rfft(wave, size) * gains, size)[: len(wave)]


def reverberate(
    wave: Float[np.ndarray, " S"], rng: np.random.Generator, *, seconds: float, level: float
) -> Float[np.ndarray, " S"]:
    """A room: noise that decays by 60 dB in `seconds`, with `level` times the direct energy."""
    t = np.arange(round(seconds * SAMPLE_RATE), dtype=np.float32)
    room = rng.standard_normal(len(t), dtype=np.float32) * 10 ** (-3 * t / len(t))
    room *= np.sqrt(level / max(np.sum(room**2), 1e-9))
    room[0] = 1.0
    return scipy.signal.fftconvolve(wave, room)[: len(wave)]


def coloured_noise(
    samples: int, rng: np.random.Generator, *, slope: float
) -> Float[np.ndarray, " S"]:
    """Noise whose power falls as 1 / f**slope: 0 is white, 1 pink, 2 brown."""
    size = scipy.fft.next_fast_len(samples, real=True)
    bins = np.maximum(np.arange(size // 2 + 1, dtype=np.float32), size * 50 / SAMPLE_RATE)
    spectrum = scipy.fft.rfft(rng.standard_normal(size, dtype=np.float32)) * bins ** (-slope / 2)
    return scipy.fft.irfft(spectrum, size)[:samples]


def hum(samples: int, rng: np.random.Generator) -> Float[np.ndarray, " S"]:
    """The mains, 50 or 60 Hz, with its harmonics."""
    t = np.arange(samples, dtype=np.float32) / SAMPLE_RATE
    mains = rng.choice([50.0, 60.0])
    harmonics = np.arange(1, 7)
    weights = rng.random(6) / harmonics
    phases = rng.uniform(0, 2 * np.pi, 6)
    angles = 2 * np.pi * mains * np.outer(harmonics, t) + phases[:, None]
    return (weights @ np.sin(angles)).astype(np.float32)


def murmur(samples: int, rng: np.random.Generator) -> Float[np.ndarray, " S"]:
    """Distant voices: noise in the band of speech that swells some four times a second."""
    speech_band = np.array([-30.0, -5.0, 0.0, 0.0, -5.0, -25.0])
    noise = equalise(coloured_noise(samples, rng, slope=1.0), speech_band)
    t = np.arange(samples, dtype=np.float32) / SAMPLE_RATE
    swell = 1 + 0.9 * np.sin(2 * np.pi * (rng.uniform(2, 6) * t + rng.random()))
    return (noise * swell).astype(np.float32)


def add_noise(
    wave: Float[np.ndarray, " S"], noise: Float[np.ndarray, " S"], *, snr: float
) -> Float[np.ndarray, " S"]:
    """Mixes so that speech has `snr` decibels more power than noise."""
    power, noise_power = np.mean(np.square(wave)), np.mean(np.square(noise))
    if not noise_power:
        return wave
    return wave + noise * np.float32(np.sqrt(power / noise_power * 10 ** (-snr / 10)))


def any_noise(samples: int, rng: np.random.Generator) -> Float[np.ndarray, " S"]:
    """Noise of a random kind; the coloured kinds are the most frequent, as in recordings."""
    kind = rng.random()
    if kind < 0.6:
        return coloured_noise(samples, rng, slope=rng.uniform(0, 2))
    return hum(samples, rng) if kind < 0.75 else murmur(samples, rng)


def augment(
    wave: Float[np.ndarray, " S"],
    rng: np.random.Generator,
    how: Augmentation = USUAL,
    *,
    timed: bool = False,
) -> Float[np.ndarray, " R"]:
    """Another speaker, room, microphone and noise, in the order in which sound meets them.

    By `USUAL` one clip in ten or so stays nearly clean; the level always changes. The result is
    float32 within [-1, 1] and at least 50 ms long.

    Args:
      timed: whether all has to be heard when it was: no other speed then, and no silence before.
    """
    if rng.random() < how.speed:
        factor = rng.uniform(*how.speeds)
        wave = wave if timed else change_speed(wave, factor)
    if rng.random() < how.silence:
        margins = (0.3 * SAMPLE_RATE * rng.random(2) ** 2).astype(int)
        wave = wave if timed else np.pad(wave, margins)
    wave = np.pad(wave, (0, max(0, SHORTEST - len(wave))))
    if rng.random() < how.room:
        wave = reverberate(
            wave, rng, seconds=rng.uniform(0.05, 0.4), level=10 ** rng.uniform(-1.5, 0)
        )
    if rng.random() < how.microphone:
        wave = equalise(wave, rng.uniform(-8, 8, size=6))
    if rng.random() < how.noise:
        wave = add_noise(wave, any_noise(len(wave), rng), snr=rng.uniform(*how.snr))
    if rng.random() < how.telephone:
        wave = telephone(wave)
    return set_peak(wave, rng.uniform(*how.peak)).astype(np.float32).clip(-1, 1)


def spec_augment(
    mel: Float[np.ndarray, "M T"], rng: np.random.Generator, how: Augmentation = USUAL
) -> Float[np.ndarray, "M T"]:
    """Hides up to `how.bands` bands and `how.spans` spans of time behind the mel's mean.

    Args:
      mel: log-mel of a clip, without padding.
      rng: where and how wide; spans are short relative to the clip, so that short words survive.

    Source: SpecAugment (arXiv:1904.08779), without time warping.
    """
    mel, mean = mel.copy(), mel.mean()
    M, T = mel.shape
    for axis, masks, most in (
        (0, how.bands, int(M * how.band)),
        (1, how.spans, min(int(T * how.span), LONGEST_SPAN)),
    ):
        for _ in range(masks):
            width = rng.integers(0, most + 1)
            start = rng.integers(0, mel.shape[axis] - width + 1)
            np.moveaxis(mel, axis, 0)[start : start + width] = mean
    return mel
