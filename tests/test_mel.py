"""Our log-mel is Whisper's: in numpy, and compiled."""

import jax
import jax.numpy as jnp
import librosa
import numpy as np
import pytest
from transformers import WhisperFeatureExtractor

from qwen2audio_jax import audio, mel

CLIPS = (
    "odd_containers/derived/jfk2s_44100.wav",
    "odd_containers/audioread/test-1.mp3",
    "speech_en/silero_test.opus",
    "speech_zh/wenet_long.wav",
    "sound_events/applause.flac",
    "music/piano.flac",
    "music/sir_duke_fast.ogg",
)
LENGTHS = (0.025, 0.05, 0.31, 1, 4.0317, 17.3, 29.98, 29.99, 30)


@pytest.fixture(scope="module", params=[80, 128])
def mels(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def reference(mels):
    """The reference's picture of one clip: by its numpy code, float64; by torch's float32."""
    extractor = WhisperFeatureExtractor(feature_size=mels)

    def draw(wave):
        padded = np.pad(wave, (0, mel.LONGEST - len(wave)))[None]
        exact = extractor._np_extract_fbank_features(padded, "cpu")[0]
        torch = extractor(wave, sampling_rate=16_000, return_tensors="np").input_features[0]
        return exact, torch

    return draw


@pytest.fixture(scope="module")
def compiled(mels):
    return jax.jit(lambda waves: mel.log_mel_jax(waves, mels=mels))


def compare(wave, mels, reference, compiled):
    # torch's float32 FFT is up to 5e-5 away from the reference's own float64 on real clips.
    exact, torch = reference(wave)
    ours = mel.log_mel(wave, mels=mels)
    assert ours.dtype == np.float32 and ours.shape == (mels, 3000)
    np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-6)
    np.testing.assert_allclose(ours, torch, rtol=0, atol=1e-4)
    padded = np.pad(wave, (0, mel.LONGEST - len(wave)))[None]
    np.testing.assert_allclose(compiled(padded)[0], torch, rtol=0, atol=1e-4)


def test_filters_are_librosas(mels):
    """Slaney's filters to the last bits of float32."""
    theirs = librosa.filters.mel(sr=16_000, n_fft=400, n_mels=mels)
    np.testing.assert_allclose(mel.filters(mels), theirs, rtol=0, atol=1e-8)


def test_filters_are_whispers(mels, shared_data):
    """OpenAI's own file holds the same filters."""
    theirs = np.load(shared_data / "whisper_assets" / "mel_filters.npz")[f"mel_{mels}"]
    np.testing.assert_allclose(mel.filters(mels), theirs, rtol=0, atol=1e-8)


@pytest.mark.parametrize("seconds", LENGTHS)
def test_made_sound_equals_the_reference(seconds, chirp, mels, reference, compiled):
    """Numpy and compiled, from one window to 30 s, both edges included."""
    compare(chirp(seconds), mels, reference, compiled)


@pytest.mark.parametrize("clip", CLIPS)
def test_real_sound_equals_the_reference(clip, shared_data, mels, reference, compiled):
    """Speech, noises and music draw the same picture."""
    compare(audio.load(shared_data / clip)[: mel.LONGEST], mels, reference, compiled)


@pytest.mark.parametrize("samples", [1, 159, 160, 161, 200, 320, 479_799, 479_961])
def test_odd_lengths_equal_the_reference(samples, chirp, mels, reference, compiled):
    """Nothing depends on a length that fits the hop."""
    compare(chirp(30, seed=samples)[:samples], mels, reference, compiled)


@pytest.mark.parametrize("frames", [1, 60, 101, 103, 2999])
def test_fewer_frames_are_the_first_of_3000(frames, chirp):
    """A short picture is the long one's beginning, whether it ends in or after the clip."""
    wave = chirp(1.01)
    np.testing.assert_array_equal(mel.log_mel(wave, frames=frames), mel.log_mel(wave)[:, :frames])


@pytest.mark.parametrize("samples", [160, 320, 16_000, 48_000])
def test_compiled_short_rows_are_the_first_of_3000(samples, chirp, mels, reference):
    """A bucket's rows, padded with zeros, are the reference's first columns."""
    clips = [chirp(3, seed)[: max(1, samples - 200 - 900 * seed)] for seed in range(3)]
    waves = np.stack([np.pad(clip, (0, samples - len(clip))) for clip in clips])
    ours = mel.log_mel_jax(jnp.asarray(waves), mels=mels)
    assert ours.shape == (3, mels, samples // 160)
    for row, clip in zip(ours, clips, strict=True):
        exact, _ = reference(clip)
        np.testing.assert_allclose(row, exact[:, : samples // 160], rtol=0, atol=1e-4)


def test_silence_is_one_colour(compiled, mels):
    """All zeros are -1.5 everywhere, also next to a row that sounds."""
    assert (mel.log_mel(np.zeros(16_000, np.float32), mels=mels) == -1.5).all()
    waves = np.zeros((2, mel.LONGEST), np.float32)
    waves[1, :4000] = 0.5
    assert (compiled(waves)[0] == -1.5).all()


def test_a_clip_of_wrong_length_is_refused():
    """Nothing is cut in silence: the message holds both lengths."""
    with pytest.raises(ValueError, match=r"480000 samples \(30 s\), got 0"):
        mel.log_mel(np.zeros(0, np.float32))
    with pytest.raises(ValueError, match=r"480000 samples \(30 s\), got 480001"):
        mel.log_mel(np.zeros(480_001, np.float32))
    with pytest.raises(ValueError, match="3000 frames, got 3001"):
        mel.log_mel(np.zeros(400, np.float32), frames=3001)
    for samples in (0, 161, 480_160):
        with pytest.raises(
            ValueError, match=f"multiple of 160 up to 480000 samples, got {samples}"
        ):
            mel.log_mel_jax(jnp.zeros((1, samples)))


def test_frames_and_tokens_are_counted_as_the_reference_counts():
    """l = ceil(n / 160) up to 3000; two halvings later, (l + 1) // 4."""
    assert [mel.frames(n) for n in (0, 1, 160, 161, 480_000, 10**6)] == [0, 1, 1, 2, 3000, 3000]
    lengths = np.arange(1, 3001)
    positions = (lengths - 1) // 2 + 1
    np.testing.assert_array_equal(mel.audio_tokens(lengths), (positions - 2) // 2 + 1)
    assert mel.audio_tokens(mel.frames(16_000)) == 25
    assert mel.audio_tokens(3000) == 750
    assert mel.audio_tokens(mel.frames(320)) == 0
    assert mel.audio_tokens(mel.frames(round(4.032 * 16_000))) == 101
