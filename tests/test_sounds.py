"""Made sounds are what their names say, in waveform and spectrum."""

import numpy as np
import pytest

from qwen2audio_jax.data import sounds

RATE = 16_000


def peak_frequency(wave):
    """Of the strongest partial, in Hz."""
    padded = np.fft.rfft(wave * np.hanning(len(wave)), 1 << 16)
    return np.abs(padded).argmax() * RATE / (1 << 16)


def onsets(wave):
    """How often the envelope comes out of silence, over 10 ms."""
    loud = np.abs(wave[: len(wave) // 160 * 160]).reshape(-1, 160).max(axis=1) > 0.02
    return int(loud[0]) + int((loud[1:] & ~loud[:-1]).sum())


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("kind", sounds.EVENTS)
def test_events_are_short_level_and_seeded(kind, held_out):
    """Equal seeds give equal bits, others do not; nothing clips, starts or ends with an edge."""
    make = lambda seed: sounds.event(kind, np.random.default_rng(seed), held_out=held_out)
    for seed in range(5):
        wave = make(seed)
        assert wave.dtype == np.float32 and 0.03 < len(wave) / RATE < 0.4
        assert np.abs(wave).max() == pytest.approx(0.5)
        assert np.abs(wave[[0, -1]]).max() < 0.02
        np.testing.assert_array_equal(wave, make(seed))
    assert len({make(seed).tobytes() for seed in range(5)}) == 5


def test_held_out_frequencies_are_no_others():
    """The two kinds of draw share no cell of the range, and reach all of it between them."""
    rng = np.random.default_rng(0)
    cells = {}
    for held_out in (False, True):
        drawn = [sounds.dial(rng, 100.0, 1600.0, held_out=held_out) for _ in range(400)]
        assert min(drawn) >= 100 and max(drawn) <= 1600
        cells[held_out] = {int(np.log2(x / 100) / 4 * sounds.CELLS) for x in drawn}
    assert cells[True] == set(sounds.HELD_OUT_CELLS)
    assert cells[True] | cells[False] == set(range(sounds.CELLS))
    assert not cells[True] & cells[False]


def test_chirps_go_where_they_say():
    """The second half of a rising chirp is higher than the first, by at least half an octave."""
    for seed in range(20):
        for kind, sign in (("rising chirp", 1), ("falling chirp", -1)):
            halves = np.array_split(sounds.event(kind, np.random.default_rng(seed)), 2)
            first, second = map(peak_frequency, halves)
            assert sign * np.log2(second / first) > 0.4, (kind, seed)


def test_the_higher_tone_is_higher():
    """Also "low" and "high" tones are far apart."""
    for seed in range(10):
        for held_out in (False, True):
            rng = np.random.default_rng(seed)
            low, high = (sounds.tone(each, rng, held_out=held_out) for each in ("low", "high"))
            assert peak_frequency(low) < 410 and peak_frequency(high) > 1190
            pair = sounds.two_tones("second", rng, held_out=held_out)
            silent = np.flatnonzero(pair == 0)
            first, second = peak_frequency(pair[: silent[20]]), peak_frequency(pair[silent[-20] :])
            assert second > 1.4 * first


@pytest.mark.parametrize("instrument", sounds.INSTRUMENTS)
def test_a_chord_is_broken_upwards_or_downwards(instrument):
    """The notes of a major triad, one by one: four and seven semitones above the lowest."""
    for motion, steps in (("rising", [4, 7]), ("falling", [-3, -7])):
        wave = sounds.chord(motion, instrument, np.random.default_rng(3))
        step = round((len(wave) - 0.5 * RATE) / 3)
        notes = [fundamental(wave[i * step : (i + 1) * step]) for i in range(3)]
        semitones = 12 * np.log2(np.array(notes[1:]) / notes[0])
        np.testing.assert_allclose(semitones, steps, atol=0.35)


def fundamental(wave):
    """The lag at which a wave repeats, between 300 and 1100 Hz, as Hz."""
    power = np.abs(np.fft.rfft(wave, 1 << 16)) ** 2
    frequencies = np.arange(len(power)) * RATE / (1 << 16)
    low = (frequencies > 300) & (frequencies < 1050)
    return frequencies[low][power[low].argmax()]


def test_drums_keep_time():
    """Strokes follow each other as slowly or as fast as they should."""
    for tempo, (shortest, longest) in sounds.BEATS.items():
        for seed in range(5):
            wave = sounds.rhythm(tempo, np.random.default_rng(seed))
            assert onsets(wave) in range(4, 8)
            between = (len(wave) / RATE - 0.12) / (onsets(wave) - 1)
            assert shortest - 0.001 < between < longest + 0.001


def test_repetition_can_be_counted():
    """As many bursts in the envelope as there are waves in a sequence."""
    rng = np.random.default_rng(0)
    for kind in sounds.EVENTS:
        wave = sounds.event(kind, rng, seconds=(0.1, 0.2))
        for number in (1, 3, 5):
            assert onsets(sounds.sequence([wave] * number, rng)) == number, kind


def test_an_unknown_sound_is_refused():
    with pytest.raises(ValueError, match=r"wanted a sound of beep, .*, got 'moo'"):
        sounds.event("moo", np.random.default_rng(0))
