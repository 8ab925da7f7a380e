"""Clips of any length are written down whole, in order, at their times."""

import numpy as np
import pytest
import tiny

from qwen2audio_jax import Processor, Qwen2Audio, audio, programs
from qwen2audio_jax import transcribe as transcription
from qwen2audio_jax.transcribe import Window, clock, join, subtitles, transcribe

NEW = 6


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tiny.save(tmp_path_factory.mktemp("tiny"))
    return Qwen2Audio.from_pretrained(folder), Processor.from_pretrained(folder)


@pytest.fixture
def write(pair):
    """Transcribes (samples, 16000) or other sources with the random model."""

    def run(*sources, **options):
        sources = [(s, 16_000) if isinstance(s, np.ndarray) else s for s in sources]
        return list(transcribe(*pair, sources, **{"max_new_tokens": NEW} | options))

    return run


@pytest.fixture
def saying(monkeypatch, pair):
    """Makes the model say texts, in the order in which windows are heard; keeps its inputs."""
    processor = pair[1]
    heard = []

    def say(*texts, end=True):
        left = iter(texts)

        def generate(model, inputs, **options):
            heard.append(inputs)
            rows = [
                processor.tokenizer.encode(next(left, "")) + [model.config.end_tokens[-1]] * end
                for _ in inputs["input_ids"]
            ]
            longest = max(map(len, rows))
            return np.array([row + [0] * (longest - len(row)) for row in rows])

        monkeypatch.setattr(transcription, "generate", generate)
        return heard

    return say


def test_windows_cover_a_long_clip(saying, write, chirp):
    """A clip of 70 s is heard whole, cut in its pauses, and every part knows when it was."""
    wave = chirp(70.0)
    for pause in (26.0, 51.0):
        wave[int(16_000 * pause) : int(16_000 * (pause + 0.4))] *= 1e-3
    # The last window, of 19 s, is the shortest and so the first to be heard.
    saying("three", "two", "one")
    [result] = write(wave)
    assert [w.text for w in result.windows] == ["one", "two", "three"]
    assert result.text == "one two three" and result.seconds == 70.0
    starts, ends = [w.start for w in result.windows], [w.end for w in result.windows]
    assert starts[0] == 0 and ends[-1] == 70.0 and starts[1:] == ends[:-1]
    np.testing.assert_allclose(starts[1:], [26.2, 51.2], atol=0.2)


def test_windows_are_as_long_as_asked_or_as_the_checkpoint_has_learned(
    saying, write, chirp, pair, tmp_path
):
    """10 s in windows of 4 s; without a word those of the checkpoint's own settings."""
    wave = chirp(10.0)
    saying("any", "thing")
    [whole], [cut] = write(wave), write(wave, window=4.0)
    assert len(whole.windows) == 1 and len(cut.windows) >= 3
    assert all(w.end - w.start <= 4.0 for w in cut.windows) and cut.windows[-1].end == 10.0
    pair[1].save_pretrained(tmp_path, window=4.0)
    own = Processor.from_pretrained(tmp_path)
    own.save_pretrained(tmp_path / "copy")
    assert Processor.from_pretrained(tmp_path / "copy").window == own.window == 4.0
    [result] = transcribe(pair[0], own, [(wave, 16_000)])
    times = lambda windows: [(w.start, w.end) for w in windows]
    assert times(result.windows) == times(cut.windows)


@pytest.mark.parametrize("window", [0.5, 31.0, float("nan")])
def test_a_window_that_nothing_can_hear_is_refused(write, chirp, window):
    with pytest.raises(ValueError, match=rf"wanted windows of 1 to 30 s, got {window:g}"):
        write(chirp(1.0), window=window)


def test_the_progress_of_one_long_clip_is_that_of_its_windows(saying, write, chirp, monkeypatch):
    """Silent windows, and clips that cannot be heard, are done without being heard."""
    bars = []

    class Bar(transcription.tqdm.tqdm):
        def close(self):
            bars.append((self.n, self.total))
            super().close()

    monkeypatch.setattr(transcription.tqdm, "tqdm", Bar)
    saying()
    long, silent = chirp(10.0), np.zeros(16_000)
    results = write(long, silent, b"no sound", window=4.0, progress=True)
    assert len(results) == 3 and len(results[0].windows) >= 3
    assert bars[0] == (sum(len(result.windows) for result in results),) * 2


def test_alone_or_together(write, chirp):
    """Clips of unlike lengths get the same texts in one batch, in several, and alone."""
    waves = [chirp(seconds, i) for i, seconds in enumerate((0.9, 0.5, 2.5))]
    alone = [write(wave)[0] for wave in waves]
    assert write(*waves) == alone == write(*waves, batch_size=2)
    assert len({result.text for result in alone}) > 1


def test_order_survives_pools(monkeypatch, write, chirp):
    """Results come in the sources' order, also where memory holds only some clips at a time."""
    monkeypatch.setattr(transcription, "POOL", 1)
    seconds = [0.9, 0.5, 0.6, 0.7, 0.3]
    results = write(*(chirp(each) for each in seconds), batch_size=2)
    assert [result.seconds for result in results] == seconds


@pytest.mark.parametrize(("clips", "rows"), [(1, 1), (3, 4), (9, 8), (17, 8)])
def test_what_is_left_over_compiles_nothing(saying, write, chirp, clips, rows):
    """Batches have one size throughout, and no result is of a row that fills one up."""
    texts = [f"{i}" for i in range(clips)]
    heard = saying(*texts)
    results = write(*(chirp(0.5, i) for i in range(clips)))
    assert [result.text for result in results] == texts
    assert {len(inputs["input_ids"]) for inputs in heard} == {rows}


def test_rows_that_fill_up_change_nothing(write, pair, chirp):
    """A second run with fewer clips left over compiles nothing, and gives the same texts."""
    waves = [chirp(0.5, i) for i in range(5)]
    whole = write(*waves, batch_size=4)
    compiled = programs.prefill._cache_size()
    assert write(*waves[:4], batch_size=4) == whole[:4]
    assert write(*waves[1:], waves[0], batch_size=4) == [*whole[1:], whole[0]]
    assert write(*waves[:3], batch_size=4) == whole[:3]
    assert programs.prefill._cache_size() == compiled


def test_short_clips_do_not_pay_for_long_ones(saying, write, chirp):
    """Windows of like length share a batch."""
    heard = saying(*"abcd")
    write(chirp(20.0), chirp(0.5), chirp(21.0), chirp(0.6), batch_size=2)
    assert [inputs["input_features"].shape for inputs in heard] == [(2, 128, 104), (2, 128, 2504)]


def test_a_bad_clip_is_its_own_error(write, chirp, tmp_path):
    """What cannot be heard says why in its own result, and its neighbours are heard."""
    (tmp_path / "noise.wav").write_bytes(b"not audio at all")
    bad, missing = str(tmp_path / "noise.wav"), str(tmp_path / "missing.wav")
    first, second, third, fourth = write(bad, chirp(1.0), missing, chirp(0.5))
    assert first.audio == bad and bad in first.error and first.text is None
    assert "no such file" in third.error and third.seconds is None and third.windows == ()
    assert second.error is None and second.text == write(chirp(1.0))[0].text
    assert fourth.error is None and fourth.seconds == 0.5
    assert [result.error is None for result in write(missing, missing)] == [False, False]
    assert write() == []


def test_language(saying, write, chirp):
    """A tag that the model begins with is the language, and no part of the text."""
    heard = saying("<|en|> one  two", "<|en|>one")
    [told] = write(chirp(1.0))
    assert (told.language, told.text) == ("en", "one two")
    [given] = write(chirp(1.0), language="en")
    told, given = (inputs["input_ids"][0].tolist() for inputs in heard)
    # The answer begins with the tag that the prompt would have ended with.
    assert given[:-1] == told
    with pytest.raises(ValueError, match=r"wanted a language that the model knows \(en\), got"):
        write(chirp(1.0), language="fr")


def test_in_a_chat(saying, write, pair, chirp):
    """The same prompt, or the user's, in a turn of a conversation."""
    for options, text in (
        ({"language": "en"}, "Detect the language and recognize the speech: <|en|>"),
        ({"prompt": "Write down what is said."}, "Write down what is said."),
    ):
        heard = saying("one")
        write(chirp(1.0), chat=True, **options)
        parts = [{"type": "audio", "audio": (chirp(1.0), 16_000)}, {"type": "text", "text": text}]
        expected = pair[1]([{"role": "user", "content": parts}])
        np.testing.assert_array_equal(heard[-1]["input_ids"], expected["input_ids"])


def test_own_prompt(saying, write, pair, chirp):
    """A prompt of the user's takes the place of recognition's."""
    heard = saying("a bell")
    write(chirp(1.0), prompt="Generate the caption in English:")
    [text] = pair[1].decode(heard[0]["input_ids"])
    assert text == "Generate the caption in English:"


def test_a_cut_answer_is_said_to_be(saying, write, chirp):
    """Words that the limit may have cost are never missing in silence."""
    saying("one")
    assert not write(chirp(1.0))[0].cut
    saying("one", end=False)
    assert write(chirp(1.0))[0].cut


def test_silence_in_a_long_clip(saying, write, chirp):
    """A window without sound is not given to the model, which would make something up."""
    wave = np.concatenate([chirp(20.0), np.zeros(45 * 16_000, np.float32)])
    heard = saying("one")
    [result] = write(wave)
    assert result.text == "one" and len(result.windows) == 3
    assert [len(inputs["input_ids"]) for inputs in heard] == [1]


def test_mistakes(write, chirp):
    """What can never work is refused at once, with both numbers."""
    with pytest.raises(ValueError, match="batch_size must be 1 or more, got 0"):
        write(chirp(1.0), batch_size=0)
    with pytest.raises(ValueError, match="5000 new ones do not fit the context of 2048"):
        write(chirp(1.0), max_new_tokens=5000)
    with pytest.raises(ValueError, match="got 'not a code'"):
        write(chirp(1.0), language="not a code")


def test_real_speech(saying, write, shared_data):
    """Half a minute of English, then of German: cut between words."""
    clip = shared_data / "speech_other" / "multilingual_en_de.mp3"
    wave = audio.load(clip)
    saying("two", "one", "three")
    [result] = write(str(clip))
    for window in result.windows[1:]:
        at = round(window.start * 16_000)
        pause = np.sqrt(np.mean(wave[at - 800 : at + 800] ** 2))
        assert pause < 0.2 * np.sqrt(np.mean(wave**2))


def test_join():
    """Languages without spaces are joined without."""
    assert join(["one", "", "two."]) == "one two."
    assert join(["今天天气", "很好。", "そうです"]) == "今天天气很好。そうです"
    assert join(["说", "OK", "吧", "네", "네"]) == "说 OK 吧 네 네"
    assert join(["今 天", "好"]) == "今 天好" and join([]) == ""


def test_clock():
    """Times round to milliseconds and carry."""
    assert clock(0.0) == "00:00:00.000"
    assert clock(59.9996) == "00:01:00.000"
    assert clock(3661.5) == "01:01:01.500"
    assert clock(360_000.001) == "100:00:00.001"


def test_subtitles():
    """Cues are numbered, escaped as each format needs, and left out where nothing is said."""
    windows = [
        Window(start=0.0, end=28.25, text="a <b> & c --> d"),
        Window(start=28.25, end=40.0, text=""),
        Window(start=40.0, end=61.0, text="说完了"),
    ]
    assert subtitles(windows, "srt") == (
        "1\n00:00:00,000 --> 00:00:28,250\na <b> & c -> d\n\n"
        "2\n00:00:40,000 --> 00:01:01,000\n说完了\n"
    )
    assert subtitles(windows, "vtt") == (
        "WEBVTT\n\n1\n00:00:00.000 --> 00:00:28.250\na &lt;b&gt; &amp; c --&gt; d\n\n"
        "2\n00:00:40.000 --> 00:01:01.000\n说完了\n"
    )
    assert subtitles([], "vtt") == "WEBVTT\n" and subtitles([], "srt") == ""
