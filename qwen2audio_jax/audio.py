"""File, bytes or array -> mono waveform at 16 kHz."""

import base64
import contextlib
import functools
import http.client
import io
import math
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import soundfile
import soxr
from jaxtyping import Float

from qwen2audio_jax.patience import passing, patiently

SAMPLE_RATE = 16_000
SHORTEST = 0.025  # seconds: one analysis window of the log-mel
LOWEST_RATE = 1000  # Hz: below it nothing audible is left, and resampling multiplies the memory
QUIETEST = 1e-6  # full scale: a thirtieth of 16-bit sound's smallest step
LOUDEST = 100  # full scales: mixed or filtered sound stays far below, integers as floats do not
CANCELLED = 1e-3  # what is left of a channel once its opposite is added: rounding
TIMEOUT = 10  # seconds that a server may stay mute
LARGEST = 1 << 30  # bytes that a server may send
STREAMED = 0x7FFF0000  # bytes: writers that cannot seek back state sizes from here upwards
UNKNOWN = 1 << 62  # samples: libsndfile's figure for a FLAC that states none is larger

# What libsndfile does not read, by its first bytes.
FOREIGN = {
    "m4a or mp4": re.compile(rb".{4}ftyp", re.DOTALL),
    "webm or mkv": re.compile(rb"\x1aE\xdf\xa3"),
    "wma": re.compile(rb"\x30\x26\xb2\x75"),
    "aac": re.compile(rb"\xff[\xf0\xf1\xf8\xf9]"),
    "amr": re.compile(rb"#!AMR"),
}
# libsndfile's words that would mislead the reader, and better ones.
REASONS = {
    "Format not recognised": "it is not audio, or in a format that cannot be read",
    "File does not exist or is not a regular file (possibly a pipe?)": "no whole MPEG frame in it",
    "Internal error : SF_INFO struct incomplete": "its header states no sampling rate",
}
CUT = re.compile(
    r"^\s*(?:data|SSND|Data Size|Riff size|riff)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE
)
# An mp3's first frame may hold which fields follow: bit 0 is the frames', bit 1 the bytes'.
XING = re.compile(rb"\xff.{3,40}?(?:Xing|Info)...(?P<fields>.)", re.DOTALL)

Source = Any  # path, URL, data URL, bytes-like, or (samples, rate); anything else is refused


class AudioError(ValueError):
    """One line: which source cannot be heard, and why."""


class TooLong(AudioError):
    """It lasts longer than whoever loads it would hear."""


class Silent(AudioError):
    """There is nothing to hear in it."""


class _Passing(AudioError):
    """A server does not answer as it should; it may yet."""


def load(
    source: Source,
    *,
    longest: float = math.inf,
    offset: float = 0.0,
    duration: float | None = None,
) -> Float[np.ndarray, " S"]:
    """Brings sound from anywhere into the one form the model hears: mono at 16 kHz.

    Args:
      source: a path (`~` too); an http, https, file or base64 data URL; a sound file's bytes; or
        (samples, rate), where samples are [S], [channels, S] or [S, channels], integers counting
        as fractions of their type's full range.
      longest: seconds; of a file that lasts longer no more than these are decoded.
      offset: seconds of the source before what is to be heard.
      duration: seconds that are to be heard; None: up to the end.

    Returns:
      Float32 samples, full scale 1 but not clipped; what `librosa.load(path, sr=16000)` gives.

    Raises:
      AudioError: it cannot be had, is not sound, stops before its header says, holds NaN,
        infinity or integers as floats, or lasts under 25 ms, or there is no such piece of it; or
        `TooLong`, `Silent`.
    """
    try:
        if not (0 <= offset < math.inf and (duration is None or duration > 0)):
            raise AudioError(
                "wanted an offset from 0 and a duration above 0, got an offset of "
                f"{offset:g} s and a duration of {duration} s"
            )
        cut = offset > 0 or duration is not None
        if isinstance(source, tuple | list):
            samples, rate = _from_array(source)
        else:
            samples, rate = _decode(content(source), math.inf if cut else longest)
        wave = _listen(samples, rate)
        wave = _piece(wave, offset, duration) if cut else wave
        _refuse_longer(len(wave) / SAMPLE_RATE, longest)
        return wave
    except AudioError as error:
        raise type(error)(f"{name(source)}: {error}") from None
    except OSError as error:  # the disk is full, or there are no file descriptors left
        raise AudioError(f"{name(source)}: cannot be read: {error.strerror or error}") from None


def name(source: Source) -> str:
    """What to call a source in messages."""
    if isinstance(source, bytes | bytearray | memoryview):
        return f"{memoryview(source).nbytes} bytes"
    if isinstance(source, tuple | list):
        try:
            samples, rate = source
            return f"{max(np.shape(samples)) / rate:.1f} s of samples at {rate} Hz"
        except (TypeError, ValueError, ZeroDivisionError):
            return "samples"
    if isinstance(source, str) and source.startswith("data:"):
        return f"data URL of {len(source)} characters"
    if isinstance(source, str | os.PathLike):
        return os.fsdecode(source)
    return type(source).__name__


def split(wave: Float[np.ndarray, " S"], longest: int = 480_000) -> list[tuple[int, int]]:
    """Divides a long wave where the least is heard.

    Args:
      wave: mono samples at 16 kHz.
      longest: samples that a window may hold.

    Returns:
      Consecutive (start, stop) that cover the wave; each cut is at the quietest point of the last
      third before the limit, early enough to leave the last window a second of its own.
    """
    least = min(SAMPLE_RATE, longest // 3)
    windows, start = [], 0
    while len(wave) - start > longest:
        latest = min(start + longest, len(wave) - least)
        stop = _quietest(wave, start + max(longest * 2 // 3, 1), latest)
        windows.append((start, stop))
        start = stop
    return [*windows, (start, len(wave))]


def _quietest(wave: Float[np.ndarray, " S"], low: int, high: int) -> int:
    """The latest of the points of [low, high], 10 ms apart, with the least energy around."""
    hop, reach = SAMPLE_RATE // 100, 8  # a bell of 80 ms to either side: a pause, not a zero
    count = (high - low) // hop + 1
    first, last = low - reach * hop, low + (count - 1 + reach) * hop
    around = wave[max(first, 0) : last].astype(np.float64)
    around = np.pad(around, (max(-first, 0), max(last - len(wave), 0)))
    energy = np.square(around).reshape(-1, hop).sum(axis=1)
    bell = np.convolve(energy, np.hanning(2 * reach + 2)[1:-1], mode="valid")
    return low + hop * (count - 1 - int(np.argmin(bell[::-1])))


def _refuse_longer(seconds: float, longest: float, got: str = "") -> None:
    if seconds > longest:
        raise TooLong(f"wanted at most {longest:g} s, got {got or f'{seconds:.2f} s'}")


def _listen(samples: Float[np.ndarray, "S channels"], rate: float) -> Float[np.ndarray, " S2"]:
    """Refuses what cannot be heard; mixes and resamples the rest."""
    if not LOWEST_RATE <= rate < float("inf"):
        raise AudioError(f"wanted a sampling rate of at least {LOWEST_RATE} Hz, got {rate}")
    if not samples.size:
        raise AudioError("holds no samples")
    if (seconds := len(samples) / rate) < SHORTEST:
        raise AudioError(f"lasts {1000 * seconds:.3g} ms, wanted at least {1000 * SHORTEST:.0f} ms")
    if broken := samples.size - np.count_nonzero(np.isfinite(samples)):
        raise AudioError(f"{broken} of {samples.size} samples are NaN or infinite")
    mono = np.mean(samples, axis=1)
    peak, mixed = np.abs(samples).max(), np.abs(mono).max()
    if peak > LOUDEST:
        raise AudioError(
            f"wanted full scale 1, got a peak of {peak:.5g}: divide integers by their range"
        )
    if peak < QUIETEST:
        raise Silent(f"is silent: its peak is {peak:.1g} of full scale")
    if mixed < CANCELLED * peak:
        channels = f"its {samples.shape[1]} channels"
        raise Silent(f"is silent: {channels} cancel (opposite phase); pass one of them")
    if rate == SAMPLE_RATE:
        return mono
    wave = soxr.resample(mono, rate, SAMPLE_RATE, quality="HQ")
    size = int(np.ceil(len(mono) * (SAMPLE_RATE / rate)))  # soxr may be a sample off; as librosa
    return np.pad(wave[:size], (0, max(size - len(wave), 0)))


def _piece(
    wave: Float[np.ndarray, " S"], offset: float, duration: float | None
) -> Float[np.ndarray, " S2"]:
    """What is heard from then on, for so long."""
    seconds = len(wave) / SAMPLE_RATE
    end = seconds if duration is None else offset + duration
    if offset >= seconds or end > seconds + 0.1:  # times are written with few digits
        raise AudioError(f"lasts {seconds:.2f} s, wanted a piece from {offset:g} s to {end:g} s")
    piece = wave[round(offset * SAMPLE_RATE) : round(end * SAMPLE_RATE)]
    if len(piece) < SHORTEST * SAMPLE_RATE:
        wanted = f"at least {1000 * SHORTEST:.0f} ms"
        raise AudioError(f"lasts {1000 * len(piece) / SAMPLE_RATE:.3g} ms there, wanted {wanted}")
    if (peak := np.abs(piece).max()) < QUIETEST:
        raise Silent(f"is silent from {offset:g} s on: its peak is {peak:.1g} of full scale")
    return piece


def _from_array(source: tuple | list) -> tuple[Float[np.ndarray, "S channels"], float]:
    if len(source) != 2:
        raise AudioError(f"wanted (samples, rate), got {len(source)} values")
    try:
        samples, rate = np.asarray(source[0]), float(source[1])
    except (TypeError, ValueError, RuntimeError):
        raise AudioError("wanted (samples, rate): an array of numbers and a number") from None
    if samples.dtype.kind not in "iuf":
        raise AudioError(f"wanted float or integer samples, got {samples.dtype}")
    if samples.ndim not in (1, 2):
        raise AudioError(f"wanted samples in one or two dimensions, got shape {samples.shape}")
    if samples.ndim == 2 and samples.shape[0] < samples.shape[1]:
        samples = samples.T
    if samples.dtype.kind in "iu":
        full = 2.0 ** (8 * samples.dtype.itemsize - 1)
        samples = (samples - full * (samples.dtype.kind == "u")) / full
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinity, refused later
        samples = samples.astype(np.float32)
    return samples if samples.ndim == 2 else samples[:, None], rate


def content(source: Source) -> bytes:
    """A file's bytes, wherever it is, not yet decoded.

    Raises:
      AudioError: it cannot be read, or is not of the kinds that `load` takes.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    if not isinstance(source, str | os.PathLike):
        kind = type(source).__name__
        raise AudioError(f"wanted a path, a URL, bytes or (samples, rate), got {kind}")
    path = os.fsdecode(source)
    if path.startswith("data:"):
        return _inline(path)
    if scheme := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", path):
        if scheme[1].lower() in ("http", "https"):
            return patiently(functools.partial(_fetch, path), _Passing)
        if scheme[1].lower() != "file":
            raise AudioError(f"wanted an http, https, file or data URL, got {scheme[1]}")
        path = urllib.request.url2pathname(urllib.parse.urlsplit(path).path)
    try:
        return pathlib.Path(os.path.expanduser(path)).read_bytes()
    except FileNotFoundError:
        raise AudioError("there is no such file") from None
    except IsADirectoryError:
        raise AudioError("is a directory, wanted a sound file") from None
    except (OSError, ValueError) as error:
        raise AudioError(f"cannot be read: {getattr(error, 'strerror', error)}") from None


def _inline(url: str) -> bytes:
    head, _, body = url.partition(",")
    if not head.endswith(";base64"):
        raise AudioError("wanted data:<type>;base64,<bytes>")
    try:
        return base64.b64decode(re.sub(r"\s", "", urllib.parse.unquote(body)), validate=True)
    except ValueError as error:
        raise AudioError(f"is not base64: {error}") from None


def _fetch(url: str) -> bytes:
    try:
        # Some servers refuse Python's own name.
        request = urllib.request.Request(url, headers={"User-Agent": "qwen2audio_jax"})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            data = answer.read(LARGEST + 1)
            missing = answer.length or 0  # what is left of the stated length
    except urllib.error.HTTPError as error:
        with error:
            kind = _Passing if passing(error.code) else AudioError
            raise kind(f"the server answered {error.code} {error.reason}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        kind = AudioError if isinstance(error, ValueError) else _Passing
        if isinstance(reason, TimeoutError):  # which was patience enough
            reason, kind = f"no answer within {TIMEOUT} s", AudioError
        raise kind(f"cannot be fetched: {reason}") from None
    if len(data) > LARGEST:
        raise AudioError(f"is larger than {LARGEST} bytes")
    if missing:
        sizes = f"{len(data) + missing} bytes and sent {len(data)}"
        raise _Passing(f"truncated: the server promised {sizes}")
    return data


class _Forward(soundfile.SoundFile):
    """Reads from front to back only.

    Soundfile seeks after every read, which garbles an mp3 without a length in its header and fails
    at the end of a FLAC without one; and GSM 06.10 cannot seek at all.
    """

    def seekable(self) -> bool:
        return False


class _Bytes(io.BytesIO):
    """Stays where it is when damage sends libsndfile to before its beginning: what is raised there
    would be printed, with its trace, and not reach us."""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_SET and offset < 0:
            return self.tell()
        return super().seek(offset, whence)


class _Endless(_Bytes):
    """Pretends to be a hundred times as long.

    Of an mp3 without a length libsndfile guesses one from the file's size and the first frame's
    bitrate, and stops there: after half of a clip if that frame was twice as large as the rest.
    """

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_END and not offset:  # the size is asked for; before it are tags
            return super().seek(100 * self.getbuffer().nbytes)
        return super().seek(offset, whence)


def _decode(data: bytes, longest: float) -> tuple[Float[np.ndarray, "S channels"], float]:
    if not data:
        raise AudioError("is empty (0 bytes)")
    for kind, magic in FOREIGN.items():
        if magic.match(data):
            data = _ffmpeg(data, kind, longest)
            break
    _refuse_cut(data)
    file, samples, log = _play(_Bytes(data), longest)
    if file.format == "MP3":
        tag = XING.match(data, _after_id3(data))
        if len(samples) == file.frames and not (tag and tag["fields"][0] & 1):
            file, samples, log = _play(_Endless(data), longest)
    elif len(samples) < file.frames < UNKNOWN:
        lengths = f"{file.frames} samples, {len(samples)} are there"
        raise AudioError(f"truncated: its header says {lengths}")
    if (cut := CUT.search(log)) and int(cut[2]) < int(cut[1]) < STREAMED:
        raise AudioError(f"truncated: its header says {cut[1]} bytes of sound, {cut[2]} are there")
    if not len(samples):
        raise AudioError(f"holds no samples: its header says 0, in a file of {len(data)} bytes")
    return samples, float(file.samplerate)


def _play(data: _Bytes, longest: float) -> tuple[_Forward, Float[np.ndarray, "S channels"], str]:
    """Has libsndfile decode all there is; the file, closed, its samples, and what it logged."""
    file, got = None, 0
    try:
        with _quiet(), _Forward(data) as file:
            if _knows_length(file) and not CUT.search(file.extra_info):
                _refuse_longer(file.frames / file.samplerate, longest)
            blocks = [np.empty((0, file.channels), np.float32)]
            while len(block := file.read(4096, dtype="float32", always_2d=True)):
                blocks.append(block)
                got += len(block)
                _refuse_longer(got / file.samplerate, longest, "more")
            return file, np.concatenate(blocks), file.extra_info
    except soundfile.LibsndfileError as error:
        reason = error.error_string.rstrip(".").removeprefix("Error : ")
        if file is None:
            raise AudioError(REASONS.get(reason, f"cannot be decoded: {reason}")) from None
        whole = f" of its {file.frames / file.samplerate:.2f}" if _knows_length(file) else ""
        where = f"stops after {got / file.samplerate:.2f}{whole} s"
        raise AudioError(f"corrupt or truncated: {where} ({reason})") from None


def _knows_length(file: _Forward) -> bool:
    """Whether its header says how long it is; of an mp3 libsndfile may guess it."""
    return file.frames < UNKNOWN and file.format != "MP3"


def _refuse_cut(data: bytes) -> None:
    """Notices a missing end where libsndfile would return what is left in silence."""
    if data.startswith(b"OggS"):
        page = data[data.rindex(b"OggS") :]
        size = 27 + sum(page[26:27]) + sum(page[27 : 27 + sum(page[26:27])])
        if len(page) < size:
            raise AudioError(f"truncated: its last page has {len(page)} of its {size} bytes")
        if not page[5] & 4:
            raise AudioError(f"truncated: no end-of-stream mark in its {len(data)} bytes")
    stated = present = 0
    if data.startswith(b"caff"):
        at = data.find(b"data") + 12
        stated, present = int.from_bytes(data[at - 8 : at], "big", signed=True), len(data) - at
    elif tag := XING.match(data, _after_id3(data)):
        at = tag.end() + 4 * (tag["fields"][0] & 1)
        stated = int.from_bytes(data[at : at + 4], "big") if tag["fields"][0] & 2 else 0
        present = len(data) - tag.start()
    if present < stated:
        raise AudioError(f"truncated: its header says {stated} bytes of sound, {present} are there")


def _after_id3(data: bytes) -> int:
    if not data.startswith(b"ID3") or len(data) < 10:
        return 0
    return 10 + (data[6] << 21 | data[7] << 14 | data[8] << 7 | data[9])


def _ffmpeg(data: bytes, kind: str, longest: float) -> bytes:
    """Any format that ffmpeg knows -> wav, its rate and channels kept; it ends a second behind
    `longest`, if it is as long."""
    if (tool := shutil.which("ffmpeg")) is None:
        raise AudioError(f"{kind} needs ffmpeg on the PATH")
    with tempfile.TemporaryDirectory() as folder:
        clip = pathlib.Path(folder, "clip")  # m4a keeps its index at the end: a pipe will not do
        clip.write_bytes(data)
        command = [tool, "-nostdin", "-v", "error", "-protocol_whitelist", "file", "-i", str(clip)]
        command += ["-vn", "-c:a", "pcm_f32le", "-f", "wav"]
        command += [] if longest == math.inf else ["-t", f"{longest + 1:g}"]
        command += ["pipe:1"]
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
    # To ffmpeg a clip that stops too early is a message, yet a success.
    if done.returncode or done.stderr.strip():
        said = done.stderr.decode(errors="replace").strip().replace(str(clip), kind)
        reason = (
            re.sub(" @ 0x[0-9a-f]+", "", said.split("\n")[0]) or f"exit status {done.returncode}"
        )
        raise AudioError(f"ffmpeg cannot decode this {kind}: {reason}")
    return done.stdout


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps libmpg123, which writes to the terminal from C, from doing so.

    The terminal is the whole process's, so this waits for a moment when no other thread speaks.
    """
    if threading.active_count() > 1:
        yield
        return
    try:
        kept = os.dup(2)
    except OSError:  # closed: nothing can be written to it
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
