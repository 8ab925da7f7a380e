"""Sources and lines of a run's settings -> samples, as they are learned and as they are asked."""

import json

import pytest
import soundfile
import words

pytest.importorskip("grain")

from qwen2audio_jax import Processor
from qwen2audio_jax.training import inputs
from qwen2audio_jax.training.settings import DataConfig

ASR = "[AUDIO:speech] Detect the language and recognize the speech: -> <|en|>[TEXT:text]"


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return Processor(words.made_tokenizer(tmp_path_factory.mktemp("words")))


@pytest.fixture
def rows(tmp_path, chirp):
    """Writes a manifest beside a clip, 0.wav; gives its path."""
    soundfile.write(tmp_path / "0.wav", chirp(0.2), 16_000)

    def write(*rows):
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return str(tmp_path / "rows.jsonl")

    return write


def test_clips_lie_beside_their_manifest_whatever_their_field(rows, processor):
    """A task's own fields name them, also for what is held out."""
    path = rows({"speech": "0.wav", "text": "yes"})
    data = DataConfig(train=(path,), held_out=(path,), tasks=(ASR,))
    (part,), (kept,) = inputs.training(data), inputs.held_out(data, 5)
    for each in (part, kept.part):
        example = each.compile(each.source[0], processor)
        assert len(example.waves[0]) == 3200
        assert inputs.prompt_and_answer(example, processor)[1] == "<|en|>yes"


def test_a_rate_of_nothing_is_refused():
    with pytest.raises(ValueError, match="wanted a sampling rate of at least 1, got 0"):
        DataConfig(rate=0)
