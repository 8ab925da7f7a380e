"""The score compares each clip with what was heard in that clip."""

import numpy as np
import pytest
import small
from flax import nnx

from qwen2audio_jax import Processor, Qwen2Audio
from qwen2audio_jax.data.world import World
from qwen2audio_jax.evaluation import recognition

WORDS = ("one", "two", "three", "four", "five")


def test_what_was_heard_returns_in_the_clips_order(monkeypatch, tmp_path, chirp):
    """Clips are heard in batches sorted by length, and scored in the order they came in."""
    World.named("small").write_tokenizer(tmp_path, vocabulary=512)
    processor = Processor.from_pretrained(tmp_path)
    lengths = [0.5, 0.2, 0.4, 0.1, 0.3]  # seconds; a clip of 0.n s is heard as the n-th word
    batches = []

    def hear(model, inputs, *, max_new_tokens):
        frames = inputs["feature_attention_mask"].sum(axis=1)
        batches.append(frames.tolist())
        rows = [processor.tokenizer.encode(f" {WORDS[n // 10 - 1]}") for n in frames]
        return np.array([row + [processor.tokenizer.pad_id] * (5 - len(row)) for row in rows])

    monkeypatch.setattr(recognition, "generate", hear)
    said = ["five", "two", "four", "ten", "three"]
    model = Qwen2Audio(small.CONFIG, rngs=nnx.Rngs(0))
    score = recognition.score(model, processor, [chirp(s) for s in lengths], said, batch=2)
    assert batches == [[10, 20], [30, 40], [50]]
    assert score.heard == ("five", "two", "four", "one", "three")
    assert score.references == tuple(said) and score.clips == 5
    assert score.word_error_rate == pytest.approx(1 / 5)
