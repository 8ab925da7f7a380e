"""Pictures are written and show what they are about."""

import numpy as np
import pytest
from flax import nnx

from qwen2audio_jax import Processor, Qwen2Audio, draw, preset
from qwen2audio_jax.data.world import World
from qwen2audio_jax.evaluation.world import Row

image = pytest.importorskip("matplotlib.image")


def test_stages_show_what_each_did(tmp_path):
    """Steps that lower the loss, and tasks that get better, make another picture."""
    row = lambda task, metric, value: Row(task=task, metric=metric, value=value, n=4)
    rows = lambda a, b: [row("recognise en", "wer", a), row("chat", "exact", b)]
    falling = [{"step": i + 1, "loss": 3 / (1 + i)} for i in range(40)]
    histories = {"pretrain": falling, "sft": falling[:20]}
    draw.stages(histories, {"pretrain": rows(0.4, 0.0), "sft": rows(0.1, 0.8)}, tmp_path / "a.png")
    flat = {"pretrain": [{**each, "loss": 3.0} for each in falling], "sft": falling[:20]}
    draw.stages(flat, {"pretrain": rows(1.4, 0.0), "sft": rows(1.4, 0.1)}, tmp_path / "b.png")
    a, b = (image.imread(tmp_path / f"{name}.png") for name in "ab")
    assert a.shape == b.shape and a.shape[0] > 300
    assert (a != b).any(axis=-1).mean() > 0.01


@pytest.mark.slow
def test_heard_shows_a_clip_and_its_words(tmp_path, chirp):
    """Mel and attention fill most of the picture with colours."""
    World.named("small").write_tokenizer(tmp_path, vocabulary=512)
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
