"""Pictures of what a model hears and learns; needs matplotlib (extra: `demo`)."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from qwen2audio_jax import look, prompt
from qwen2audio_jax.audio import SAMPLE_RATE
from qwen2audio_jax.model import Qwen2Audio
from qwen2audio_jax.processor import Processor


def training(rows: Sequence[Mapping[str, int | float]], path: pathlib.Path) -> None:
    """A run's log: loss, gradients, speed, and what was measured on held-out samples."""
    steps = [row for row in rows if "loss" in row]
    scores = [row for row in rows if any(name.startswith("eval/") for name in row)]
    figure, axes = _figure(2, 2, (10.0, 6.4))
    panels = {
        "loss": "loss per learned token or pair",
        "accuracy": "right: next tokens, or preferred answers",
        "tokens_per_second": "tokens per second",
    }
    for panel, (name, label) in zip(axes.flat, panels.items(), strict=False):
        values = np.array([row.get(name, np.nan) for row in steps])
        numbers = [row["step"] for row in steps]
        panel.plot(numbers, values, alpha=0.25, color="C0", linewidth=0.8)
        panel.plot(numbers, _smooth(values), color="C0")
        panel.set(xlabel="step", ylabel=label)
    names = sorted({name for row in scores for name in row if _of_all(name)})
    for name in names:
        known = [(row["step"], row[name]) for row in scores if name in row]
        axes[1, 1].plot(*zip(*known, strict=True), marker=".", label=name.removeprefix("eval/"))
    axes[1, 1].set(xlabel="step", ylabel="held out")
    if names:
        axes[1, 1].legend(fontsize="small")
    _save(figure, path)


def stages(
    histories: Mapping[str, Sequence[Mapping[str, int | float]]],
    scores: Mapping[str, Sequence[Any]],
    path: pathlib.Path,
) -> None:
    """Stages of training side by side: each one's loss, and what was known after it.

    Args:
      histories: by stage, rows with `step` and `loss`.
      scores: by stage, the same evaluation.world.Rows.
    """
    figure, (left, right) = _figure(1, 2, (12.0, 5.0))
    start = 0
    for color, (name, rows) in enumerate(histories.items()):
        steps = start + np.array([row["step"] for row in rows])
        values = np.array([row["loss"] for row in rows])
        left.plot(steps, values, alpha=0.2, color=f"C{color}", linewidth=0.8)
        left.plot(steps, _smooth(values), color=f"C{color}", label=name)
        start = steps[-1]
    left.set(xlabel="step", ylabel="loss per learned token or pair", yscale="log")
    left.legend()
    tasks = [row.task for row in next(iter(scores.values()))]
    height = 0.8 / len(scores)
    for color, (name, rows) in enumerate(scores.items()):
        share = [100 * (1 - row.value if row.metric == "wer" else row.value) for row in rows]
        places = np.arange(len(tasks)) + height * color
        right.barh(places, np.clip(share, 0, 100), height, color=f"C{color}", label=name)
    right.set_yticks(np.arange(len(tasks)) + 0.4 - height / 2, tasks, fontsize="small")
    right.invert_yaxis()
    right.set(xlabel="held out, right after each stage, %", xlim=(0, 100))
    _save(figure, path)


def heard(
    model: Qwen2Audio,
    processor: Processor,
    wave: Float[np.ndarray, " S"],
    text: str,
    path: pathlib.Path,
) -> None:
    """A clip's log-mel over where in it the decoder looks while it writes each word of `text`."""
    given = prompt.transcription("en")
    inputs = processor(text=given + text, audio=[(wave, SAMPLE_RATE)])
    weights = np.asarray(look.decoder_attention(model, **inputs))[:, 0].mean(axis=1)
    ids = inputs["input_ids"][0]
    slots = np.flatnonzero(ids == processor.tokenizer.audio_id)
    words = processor.tokenizer.encode(text)
    # the row that foresees a word is the one before it
    rows = weights[:, len(ids) - len(words) - 1 : -1, slots[0] : slots[-1] + 1]
    rows = rows / rows.max(axis=2, keepdims=True)
    seconds = len(slots) * 0.04
    figure, axes = _figure(2, 1, (9.0, 5.5), sharex=True)
    frames = int(inputs["feature_attention_mask"].sum())
    mel(axes[0], inputs["input_features"][0, :, :frames])
    axes[0].set(xlabel="")
    axes[1].imshow(
        rows.max(axis=0), aspect="auto", cmap="magma", extent=(0, seconds, len(words), 0)
    )
    names = [processor.tokenizer.decode([word]).strip() for word in words]
    axes[1].set_yticks(np.arange(len(words)) + 0.5, names)
    axes[1].set(xlabel="seconds", ylabel="written")
    axes[0].set_title("what is heard: log-mel")
    axes[1].set_title("where the decoder looks while it writes: strongest layer, mean over heads")
    _save(figure, path)


def mel(axes, picture: Float[np.ndarray, "M T"]) -> None:
    """One log-mel on a matplotlib axes, time in seconds."""
    bands, frames = picture.shape
    axes.imshow(
        picture, origin="lower", aspect="auto", cmap="magma", extent=(0, frames / 100, 0, bands)
    )
    axes.set(xlabel="seconds", ylabel="mel band")


def _of_all(name: str) -> bool:
    """Whether a figure is one of all that is held out, rather than of a source, or of one side."""
    return name.startswith("eval/") and (name.count("/") == 1 or name == "eval/rewards/margins")


def _smooth(values: Float[np.ndarray, " steps"], window: int = 25) -> Float[np.ndarray, " steps"]:
    kernel = np.ones(min(window, len(values)))
    total = np.convolve(values, kernel)[: len(values)]
    return total / np.convolve(np.ones(len(values)), kernel)[: len(values)]


def _figure(rows: int, columns: int, size: tuple[float, float], **options):
    from matplotlib.figure import Figure  # no pyplot: no window system is looked for

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def _save(figure, path: pathlib.Path) -> None:
    figure.savefig(path, dpi=110)
