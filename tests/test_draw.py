"""Pictures are written and show what they are about."""

import numpy as np
import pytest
from flax import nnx

from qwen2audio_jax import Processor, Qwen2Audio, draw, preset
from qwen2audio_jax.data import lessons

image = pytest.importorskip("matplotlib.image")


def test_history_shows_a_curve(tmp_path):
    """Steps that differ make another picture than steps that do not."""
    falling = [{"loss": 3 / (1 + i), "accuracy": i / 40} for i in range(40)]
    draw.history(falling, tmp_path / "falling.png")
    draw.history(falling[:1] * 40, tmp_path / "flat.png")
    falling, flat = (image.imread(tmp_path / f"{name}.png") for name in ("falling", "flat"))
    assert falling.shape == flat.shape and falling.shape[0] > 300
    assert (falling != flat).any(axis=-1).mean() > 0.005


def test_heard_shows_a_clip_and_its_words(tmp_path, chirp):
    """Mel and attention fill most of the picture with colours."""
    lessons.write_tokenizer(tmp_path, [], vocabulary=512)
    model = Qwen2Audio(preset("tiny"), rngs=nnx.Rngs(0))
    processor = Processor.from_pretrained(tmp_path)
    draw.heard(model, processor, chirp(0.6), "seven two", tmp_path / "heard.png")
    picture = image.imread(tmp_path / "heard.png")[..., :3]
    coloured = np.ptp(picture, axis=-1) > 0.1
    assert coloured.mean() > 0.4
    assert len(np.unique((255 * picture[coloured]).astype(int), axis=0)) > 100


def test_a_mel_s_axes_are_in_seconds_and_bands():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    draw.mel(axes, np.zeros((80, 250), np.float32))
    assert axes.get_xlim() == (0, 2.5) and axes.get_ylim() == (0, 80)
