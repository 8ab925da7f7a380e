"""Made speech is what it says it is, and the same bits every time."""

import multiprocessing
import sys
import threading
import time

import numpy as np
import pytest

from qwen2audio_jax.data import synth

pytest.importorskip("espeakng_loader")


def test_every_voice_exists_and_speaks():
    """Each listed variant is in the synthesiser's data and gives a sound of a word's length."""
    for voice in (*synth.TRAIN_VOICES[::5], *synth.HELD_OUT_VOICES[::5], *synth.TRAIN_VOICES[:5]):
        wave = synth.trim(synth.speak("seven", voice=voice))
        assert wave.dtype == np.float32
        assert 0.2 < len(wave) / synth.SAMPLE_RATE < 0.9, voice
        assert np.sqrt(np.mean(wave**2)) > 0.005 and np.abs(wave).max() < 1.1, voice


def test_held_out_timbres_are_never_trained_on():
    """The split goes by variant, so a held-out timbre is in training under no accent."""
    assert not set(synth.TRAIN_VARIANTS) & set(synth.HELD_OUT_VARIANTS)
    assert len(set(synth.TRAIN_VOICES)) == len(synth.TRAIN_VOICES) > 400
    assert len(set(synth.HELD_OUT_VOICES)) == len(synth.HELD_OUT_VOICES) == 40


def test_sound_does_not_depend_on_what_was_said_before():
    """Flutter, noise and echo start afresh: equal arguments give equal bits."""
    for variant in ("f3", "whisper", "robosoft2", "klatt4", "Alicia"):
        first = synth.speak("seven three", voice=f"en-us+{variant}")
        synth.speak("something else", voice="en-us+f1")
        np.testing.assert_array_equal(first, synth.speak("seven three", voice=f"en-us+{variant}"))


BREATHY = ("en-us+whisper", "en-us+f3", "en-us+Alicia", "en-us+sandro")


def _waves(numbers):
    voices = BREATHY + synth.TRAIN_VOICES[::11]
    return [synth.speak("seven green birds", voice=voices[number]) for number in numbers]


def test_processes_agree_bit_for_bit():
    """Words sound the same in a fresh worker process, seconds later, as here."""
    here = _waves(range(8))
    time.sleep(1.1)  # a noise seeded by the clock would be another one by now
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        there = pool.apply(_waves, (range(8),))
    for a, b in zip(here, there, strict=True):
        np.testing.assert_array_equal(a, b)


def test_threads_agree():
    """Threads that speak at the same time do not hear each other."""
    results = {}
    threads = [
        threading.Thread(target=lambda i=i: results.update({i: _waves([i % 2])[0]}))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(8):
        np.testing.assert_array_equal(results[i], results[i % 2])


def test_rate_and_pitch_are_heard():
    """More words per minute take less time; a higher pitch has a shorter period."""
    slow, fast = (len(synth.trim(synth.speak("yellow", rate=r))) for r in (110, 260))
    assert slow > 1.5 * fast

    def period(pitch):
        wave = synth.trim(synth.speak("no", pitch=pitch, pitch_range=0))
        correlation = np.correlate(wave, wave, "full")[len(wave) :]
        return 40 + np.argmax(correlation[40:400])

    assert period(90) < 0.8 * period(10)


def test_trim_removes_the_silence_around_speech():
    """Silence before and after goes, silence is kept where there is nothing else."""
    wave = np.zeros(8000, np.float32)
    wave[3200:4800] = 0.1
    assert len(synth.trim(wave)) == 1600
    assert len(synth.trim(np.zeros(500, np.float32))) == 500


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"voice": "en-us+nobody"}, "no voice variant 'nobody'"),
        ({"voice": "xx-nowhere"}, "no voice 'xx-nowhere'"),
        ({"rate": 20}, "rate must be 80 to 450, got 20"),
        ({"text": " "}, "nothing to say in ' '"),
    ],
)
def test_mistakes_are_named(arguments, message):
    """A voice or a number that espeak-ng would silently replace is refused."""
    with pytest.raises(ValueError, match=message):
        synth.speak(**{"text": "one", **arguments})


def test_a_missing_synthesiser_says_how_to_install_it(monkeypatch):
    """Without the wheel, the error is the command that brings it."""
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(ImportError, match=r"pip install 'qwen2audio_jax\[demo\]'"):
        synth.speak("one")
