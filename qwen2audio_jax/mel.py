"""Waveform -> log-mel, 10 ms a frame."""

import functools
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qwen2audio_jax.audio import SAMPLE_RATE

N_FFT = 400  # samples: 25 ms under one window
HOP = 160  # samples: 10 ms from one frame to the next
FRAMES = 3000  # frames in the 30 s that the reference pads every clip to
LONGEST = FRAMES * HOP  # samples
FLOOR = 1e-10  # power that counts as none
RANGE = 8.0  # log10 below the clip's peak: 80 dB
EXACT = jax.lax.Precision.HIGHEST  # else TPUs multiply in bfloat16

Integers = TypeVar("Integers", int, np.integer, np.ndarray, Array)


@functools.cache
def filters(mels: int) -> Float[np.ndarray, "M F"]:
    """Triangles that gather a spectrum's power into bands: Slaney's scale and norm, 0-8 kHz.

    Source: `librosa.filters.mel(sr=16000, n_fft=400, n_mels=mels)`.
    """
    # Slaney's scale: 200/3 Hz a mel up to 1 kHz = 15 mel, then 27 mels for every factor of 6.4.
    top = 15 + 27 * np.log(SAMPLE_RATE / 2 / 1000) / np.log(6.4)
    mel = np.linspace(0, top, mels + 2)
    edges = np.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))
    low, centre, high = (edges[i : mels + i, None] for i in range(3))
    hertz = np.fft.rfftfreq(N_FFT, 1 / SAMPLE_RATE)
    rising, falling = (hertz - low) / (centre - low), (high - hertz) / (high - centre)
    weights = np.maximum(0, np.minimum(rising, falling)) * 2 / (high - low)
    weights.flags.writeable = False
    return weights


def frames(samples: int) -> int:
    """Frames that a clip fills; the reference cuts it at 30 s."""
    return min(-(-samples // HOP), FRAMES)


def audio_tokens(frames: Integers) -> Integers:
    """Audio states, and so tokens, that the encoder makes of a clip's frames."""
    return (frames + 1) // 4


def log_mel(
    wave: Float[np.ndarray, " S"], *, mels: int = 128, frames: int = FRAMES
) -> Float[np.ndarray, "M T"]:
    """Draws sound as the picture the encoder reads.

    Args:
      wave: mono samples in [-1, 1] at 16 kHz, 30 s at most.
      mels: frequency bands, M.
      frames: columns to return, T; the cost is that of the clip's own.

    Returns:
      log10 power of the clip padded with zeros to 30 s, one column per 10 ms, floored 80 dB below
      the peak, then (x + 4) / 4; its first columns, float32.

    Raises:
      ValueError: `wave` is empty or over 30 s, or `frames` is not within 1..3000.

    Source: Whisper (arXiv:2212.04356), section 2.2.
    """
    if not 0 < len(wave) <= LONGEST:
        raise ValueError(f"wanted a wave of 1 to {LONGEST} samples (30 s), got {len(wave)}")
    if not 0 < frames <= FRAMES:
        raise ValueError(f"wanted 1 to {FRAMES} frames, got {frames}")
    # The columns whose window touches the clip; the peak may lie in any of them.
    heard = min(-(-(len(wave) + N_FFT // 2) // HOP), FRAMES)
    # Only the 3000th window reaches the right edge, and hears the clip's end reflected there.
    padded = np.zeros(LONGEST if heard == FRAMES else heard * HOP + N_FFT // 2)
    padded[: len(wave)] = wave
    padded = np.pad(padded, N_FFT // 2, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, N_FFT)[::HOP][:heard]
    power = np.square(np.abs(np.fft.rfft(windows * _hann())))
    log = np.log10(np.maximum(filters(mels) @ power.T, FLOOR))
    floor = log.max() - RANGE
    image = np.full((mels, frames), max(floor, np.log10(FLOOR)))
    image[:, :heard] = np.maximum(log, floor)[:, :frames]
    return ((image + 4) / 4).astype(np.float32)


@functools.cache
def _hann() -> Float[np.ndarray, " n_fft"]:
    return np.hanning(N_FFT + 1)[:-1]  # periodic


def log_mel_jax(waves: Float[Array, "B S"], *, mels: int = 128) -> Float[Array, "B M T"]:
    """`log_mel` of a batch, for use inside `jax.jit`, in float32.

    The columns are the first S / 160 of each row's own 30 s picture. Only these are looked at for
    a row's peak: leave 200 samples after the longest clip, and it is the reference's.

    Args:
      waves: mono samples in [-1, 1] at 16 kHz, zeros after each clip; S is a multiple of 160.
      mels: frequency bands, M.

    Raises:
      ValueError: S is 0, over 30 s, or no multiple of 160.
    """
    S = waves.shape[1]
    if not 0 < S <= LONGEST or S % HOP:
        raise ValueError(f"wanted a multiple of {HOP} up to {LONGEST} samples, got {S}")
    windows = _windows(waves.astype(jnp.float32)) * _hann().astype(np.float32)
    # A DFT by matrices, its window folded about the middle where cosine is even and sine is odd.
    # On 71 real clips it was within 4e-5 of float64, where jnp.fft was within 5e-5 and the unfolded
    # matrix within 1.1e-4; it feeds a TPU's matrix unit, and takes 5 ms of a CPU for 30 s.
    cosine, sine = _dft()
    ahead, behind = windows[..., 1 : N_FFT // 2], windows[..., : N_FFT // 2 : -1]
    even = jnp.concatenate([windows[..., :1], ahead + behind, windows[..., N_FFT // 2, None]], -1)
    power = jnp.square(_sums(even, cosine)) + jnp.square(_sums(ahead - behind, sine))
    bands = jnp.einsum("MF,BTF->BMT", filters(mels).astype(np.float32), power, precision=EXACT)
    log = jnp.log10(jnp.maximum(bands, FLOOR))
    log = jnp.maximum(log, log.max(axis=(1, 2), keepdims=True) - RANGE)
    return (log + 4) / 4


def _sums(windows: Float[Array, "B T n"], waves: Float[np.ndarray, "n F"]) -> Float[Array, "B T F"]:
    """Their product, in which every fourth sample has a sum of its own.

    Some CPUs add all 200 one after the other; where a loud tone's sums run far above what a quiet
    band ends with, the picture was up to 1.7e-4 away from float64's (like this: 4e-5).
    """
    parts = [
        jnp.einsum("BTn,nF->BTF", windows[..., i::4], waves[i::4], precision=EXACT)
        for i in range(4)
    ]
    return parts[0] + parts[1] + parts[2] + parts[3]


def _windows(waves: Float[Array, "B S"]) -> Float[Array, "B T n_fft"]:
    """What each column hears: 200 samples to either side of its centre."""
    B, S = waves.shape
    half = N_FFT // 2
    # The reference reflects its 30 s at both ends; behind a shorter row it still has zeros.
    left = jnp.pad(waves, ((0, 0), (0, max(0, half + 1 - S))))[:, half:0:-1]
    right = waves[:, -2 : -2 - HOP // 4 : -1] if S == LONGEST else jnp.zeros((B, HOP // 4))
    # A window is five blocks of 80 samples, a hop two: slices in place of a gather.
    blocks = jnp.concatenate([left, waves, right], axis=1).reshape(B, -1, HOP // 2)
    T = S // HOP
    return jnp.concatenate([blocks[:, i : i + 2 * T : 2] for i in range(5)], axis=-1)


@functools.cache
def _dft() -> tuple[Float[np.ndarray, "even F"], Float[np.ndarray, "odd F"]]:
    angle = 2 * np.pi / N_FFT * np.outer(np.arange(N_FFT // 2 + 1), np.arange(N_FFT // 2 + 1))
    return np.cos(angle).astype(np.float32), np.sin(angle)[1:-1].astype(np.float32)
