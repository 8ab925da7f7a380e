"""Augmentations change what they say they change, and nothing else."""

import numpy as np
import pytest

from qwen2audio_jax.data import augment
from qwen2audio_jax.data.augment import Augmentation

RATE = augment.SAMPLE_RATE


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def noise(rng):
    return coloured(rng, 0.0)


def coloured(rng, slope, samples=RATE):
    return augment.coloured_noise(samples, rng, slope=slope)


def level(wave, low, high):
    """Power in decibels between two frequencies, in Hz."""
    power = np.abs(np.fft.rfft(wave)) ** 2
    frequencies = np.fft.rfftfreq(len(wave), 1 / RATE)
    return 10 * np.log10(power[(frequencies >= low) & (frequencies < high)].mean())


def tone(frequency, samples=RATE):
    return np.sin(2 * np.pi * frequency * np.arange(samples) / RATE).astype(np.float32)


@pytest.mark.parametrize("samples", [1, 321, 6_000, RATE, 5 * RATE])
@pytest.mark.parametrize("make", [tone, lambda _, samples: np.zeros(samples, np.float32)])
def test_augmented_sound_is_fit_for_the_model(make, samples):
    """Any length, silence included, comes out finite, float32, within full scale, long enough."""
    for seed in range(40):
        wave = make(440, samples)
        kept = wave.copy()
        out = augment.augment(wave, np.random.default_rng(seed))
        assert out.dtype == np.float32 and out.ndim == 1 and len(out) > 400
        assert np.isfinite(out).all() and np.abs(out).max() <= 1
        np.testing.assert_array_equal(wave, kept)


def test_a_seed_decides_everything(chirp):
    """The same generator state gives the same bits, another gives another sound."""
    one, same, other = (augment.augment(chirp(1), np.random.default_rng(s)) for s in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert len(one) != len(other) or np.abs(one - other).max() > 0.01


def test_what_is_not_asked_for_is_not_done(rng):
    """Nothing but the level changes; of a telephone nothing is left above 4 kHz."""
    none = dict.fromkeys(("speed", "silence", "room", "microphone", "noise", "telephone"), 0.0)
    wave = 0.1 * rng.standard_normal(RATE).astype(np.float32)
    for seed in range(5):
        out = augment.augment(wave, np.random.default_rng(seed), Augmentation(**none))
        np.testing.assert_allclose(out / np.abs(out).max(), wave / np.abs(wave).max(), atol=1e-6)
        far = Augmentation(**{**none, "telephone": 1.0})
        narrow = augment.augment(wave, np.random.default_rng(seed), far)
        assert level(narrow, 500, 3500) - level(narrow, 4500, 7500) > 30


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"noise": 1.5}, "a chance of noise from 0 to 1, got 1.5"),
        ({"speeds": (0.0, 1.0)}, "speeds as a range, got 0.0 to 1.0"),
        ({"snr": (40.0, 5.0)}, "snr as a range, got 40.0 to 5.0"),
        ({"peak": (-26.0, 3.0)}, "at most 0 dB of full scale, got 3.0"),
        ({"span": 1.0}, "below 1, got 2 of 0.15 and 2 of 1.0"),
    ],
)
def test_augmentation_that_means_nothing_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**wrong)


def test_a_hoarse_voice_has_less_of_a_pitch(rng):
    """As much less as is said; when something is said, and in which bands, stays."""
    voice = tone(150) + tone(300) + tone(450)
    voice[RATE // 2 :] *= 0.1
    for share in (0.0, 0.5, 1.0):
        out = augment.hoarse(voice, rng, share=share)
        assert out.shape == voice.shape and out.dtype == np.float32
        assert np.corrcoef(out, voice)[0, 1] == pytest.approx(np.sqrt(1 - share), abs=0.15)
        first, second = np.array_split(out, 2)
        assert level(first, 100, 500) - level(second, 100, 500) > 15
        assert level(first, 100, 500) - level(first, 2000, 4000) > 20
    short = augment.hoarse(voice[:50], rng, share=0.5)
    assert short.shape == (50,) and np.isfinite(short).all()


def test_what_is_timed_stays_where_it_was():
    """A click after a second, whatever else is done to it; else it moves."""
    click = np.zeros(2 * RATE, np.float32)
    click[RATE] = 1
    moved = []
    for seed in range(20):
        out = augment.augment(click, np.random.default_rng(seed), timed=True)
        assert len(out) == len(click) and abs(np.abs(out).argmax() - RATE) < 20
        moved.append(len(augment.augment(click, np.random.default_rng(seed))) != len(click))
    assert sum(moved) > 10


def test_noise_has_the_asked_power(rng):
    """The ratio of speech to noise is what was asked for."""
    wave, noise = tone(440), coloured(rng, 1.0)
    added = augment.add_noise(wave, noise, snr=12.0) - wave
    assert 10 * np.log10(np.mean(wave**2) / np.mean(added**2)) == pytest.approx(12, abs=0.01)


@pytest.mark.parametrize("slope", [0.0, 1.0, 2.0])
def test_noise_has_the_asked_colour(rng, slope):
    """Power falls by 3 dB an octave for each unit of slope."""
    noise = coloured(rng, slope, 4 * RATE)
    octaves = np.log2(2000 / 250)
    fall = level(noise, 225, 275) - level(noise, 1800, 2200)
    assert fall == pytest.approx(3.01 * slope * octaves, abs=1.0)


def test_hum_and_murmur_lie_where_they_should(rng):
    """Hum is low harmonics of the mains; murmur is in the band of speech."""
    hum, murmur = augment.hum(RATE, rng), augment.murmur(RATE, rng)
    assert level(hum, 40, 400) > level(hum, 1000, 8000) + 40
    assert level(murmur, 300, 2000) > level(murmur, 6500, 8000) + 20
    assert hum.dtype == murmur.dtype == np.float32


def test_a_telephone_passes_nothing_above_4_khz(noise):
    """Below half the rate sound is unchanged in level, above it is gone; time does not move."""
    out = augment.telephone(noise)
    assert len(out) == len(noise)
    assert level(out, 200, 3000) == pytest.approx(level(noise, 200, 3000), abs=0.2)
    assert level(out, 4500, 8000) < level(noise, 4500, 8000) - 40
    assert np.argmax(np.correlate(out, noise, "same")) == len(noise) // 2


@pytest.mark.parametrize("factor", [0.85, 1.0, 1.2])
def test_speed_moves_time_and_frequency(factor):
    """Faster is shorter and higher by the same factor."""
    out = augment.change_speed(tone(1000), factor)
    assert len(out) == pytest.approx(RATE / factor, abs=2)
    peak = np.argmax(np.abs(np.fft.rfft(out))) * RATE / len(out)
    assert peak == pytest.approx(1000 * factor, rel=0.01)


def test_equalising_gives_the_asked_gains(noise):
    """Flat is the identity; a tilt lowers one end and raises the other."""
    flat = augment.equalise(noise, np.zeros(6))
    np.testing.assert_allclose(flat, noise, atol=1e-5)
    tilted = augment.equalise(noise, np.linspace(-10, 10, 6))
    assert level(tilted, 60, 70) == pytest.approx(level(noise, 60, 70) - 9.7, abs=1)
    assert level(tilted, 7500, 8000) == pytest.approx(level(noise, 7500, 8000) + 9.8, abs=1)


def test_a_room_adds_a_tail_and_keeps_the_direct_sound(rng):
    """A click stays where it is; behind it there is decaying energy, before it nothing."""
    click = np.zeros(RATE, np.float32)
    click[4000] = 1
    out = augment.reverberate(click, rng, seconds=0.3, level=0.5)
    assert out[4000] == pytest.approx(1, abs=1e-4) and np.abs(out[:3990]).max() < 1e-4
    early, late = (np.sum(out[s : s + 800] ** 2) for s in (4001, 7000))
    assert early > 100 * late > 0
    assert np.sum(out[4001:] ** 2) == pytest.approx(0.5, rel=0.05)


def test_masks_hide_some_and_keep_the_rest(rng):
    """What is masked is the mean; the rest is untouched, and most of it remains."""
    mel = rng.standard_normal((128, 60)).astype(np.float32)
    kept = mel.copy()
    masked = 0
    for _ in range(20):
        out = augment.spec_augment(mel, rng)
        changed = out != mel
        np.testing.assert_array_equal(out[changed], mel.mean())
        assert changed.mean() < 0.5
        masked += changed.any()
    assert masked > 15
    np.testing.assert_array_equal(mel, kept)


def test_masks_have_limits_of_their_own(rng):
    """No masks asked for, none made; time masks alone leave whole frames or nothing."""
    mel = rng.standard_normal((80, 100)).astype(np.float32)
    np.testing.assert_array_equal(
        augment.spec_augment(mel, rng, Augmentation(bands=0, spans=0)), mel
    )
    half = Augmentation(bands=0, spans=1, span=0.5)
    changed = augment.spec_augment(mel, rng, half) != mel
    assert set(changed.sum(0)) <= {0, 80} and 0 < changed.any(0).sum() <= 50


def test_no_span_of_a_long_clip_is_longer_than_a_second(rng):
    """As in the paper's policies, whose fraction only shortens it further; it may be as long."""
    mel = rng.standard_normal((80, 3000)).astype(np.float32)
    one = Augmentation(bands=0, spans=1)
    longest = max((augment.spec_augment(mel, rng, one) != mel).any(0).sum() for _ in range(200))
    assert 90 < longest <= 100


def test_speech_stays_speech_under_augmentation(shared_data):
    """Real digits keep most of their length and some energy, whatever is done to them."""
    import soundfile

    for i, path in enumerate(sorted((shared_data / "fsdd" / "recordings").glob("*_1.wav"))[:20]):
        wave, _ = soundfile.read(path, dtype="float32")
        out = augment.augment(augment.change_speed(wave, 0.5), np.random.default_rng(i))
        assert len(out) > len(wave) * 2 / 1.25
        assert np.sqrt(np.mean(out**2)) > 1e-3
