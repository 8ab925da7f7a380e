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


def test_a_run_shows_what_is_measured_of_all_that_is_held_out(tmp_path, monkeypatch):
    """Margins of rewards, too, which may be what the best checkpoint is chosen by."""
    shown = []
    save = lambda figure, path: shown.append(figure) or figure.savefig(path)
    monkeypatch.setattr(draw, "_save", save)
    steps = [{"step": i, "loss": 1 / i, "accuracy": 0.5} for i in range(1, 40)]
    names = ("accuracy", "rewards/margins", "rewards/chosen", "logps/chosen")
    figures = {f"eval/{source}{name}": 0.5 for source in ("", "a.jsonl/") for name in names}
    draw.training([*steps, {"step": 20} | figures, {"step": 39} | figures], tmp_path / "a.png")
    lines = shown[0].axes[3].get_lines()
    assert [line.get_label() for line in lines] == ["accuracy", "rewards/margins"]
    assert image.imread(tmp_path / "a.png").shape[0] > 300


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
