"""How a run went, for whoever opens its folder: summary.md and summary.png."""

import importlib.util
import json
import pathlib
from collections.abc import Sequence

from qwen2audio_jax import draw
from qwen2audio_jax.training.log import Row
from qwen2audio_jax.training.run import SETTINGS


def write(
    folder: pathlib.Path,
    rows: Sequence[Row],
    data: str,
    best: int | None,
    metric: str,
) -> None:
    """Writes a run's summary.

    Args:
      rows: its log.
      data: a table of what it was trained on.
      best: the step of the best checkpoint, by `metric`.
    """
    steps = [row for row in rows if "loss" in row]
    scores = [row for row in rows if any(name.startswith("eval/") for name in row)]
    lines = [f"# {folder.resolve().name}", ""]
    if steps:
        last, hours = steps[-1], sum(row["seconds"] for row in steps) / 3600
        lines += [
            f"{last['step']} steps in {hours:.2f} hours; the last loss was {last['loss']:.4f}, "
            f"{int(last['skipped'])} steps were skipped; the device waited for data for "
            f"{_waited(steps):.1%} of the time, and {_first(steps):.1f} s for the first batch. "
            f"Settings: [{SETTINGS}]({SETTINGS}).",
            "",
        ]
    if scores:
        lines += [*_table(scores), ""]
    if best is not None:
        where = "model/, the last" if steps and best == steps[-1]["step"] else "model-best/"
        lines += [f"The best by {metric} is {where}, of step {best}.", ""]
    lines += _answers(folder / "answers.jsonl")
    lines += ["What it was trained on:", "", "```", data, "```", ""]
    if importlib.util.find_spec("matplotlib") and steps:
        draw.training(rows, folder / "summary.png")
        lines += ["![loss, accuracy, speed, held-out figures](summary.png)", ""]
    (folder / "summary.md").write_text("\n".join(lines), "utf-8")


def _waited(steps: Sequence[Row]) -> float:
    return sum(row.get("waited", 0.0) for row in steps) / sum(row["seconds"] for row in steps)


def _first(steps: Sequence[Row]) -> float:
    """Seconds until batches came, of every start."""
    return sum(row.get("first_batch", 0.0) for row in steps)


def _table(scores: Sequence[Row]) -> list[str]:
    """A row for each figure, a column for the first evaluations and the last ones."""
    shown = scores if len(scores) <= 6 else [*scores[:2], *scores[-4:]]
    names = sorted({name for row in shown for name in row if name.startswith("eval/")})
    number = lambda row, name: f"{row[name]:.4f}" if name in row else ""
    return [
        "| held out | " + " | ".join(f"step {row['step']}" for row in shown) + " |",
        "|---|" + "---|" * len(shown),
        *(
            f"| {name.removeprefix('eval/')} | "
            + " | ".join(number(row, name) for row in shown)
            + " |"
            for name in names
        ),
    ]


def _answers(path: pathlib.Path, most: int = 8) -> list[str]:
    if not path.exists():
        return []
    found = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
    cell = lambda text: " ".join(text.replace("|", "\\|").split())
    rows = [f"| {cell(each['wanted'])} | {cell(each['got'])} |" for each in found[:most]]
    return ["| wanted | answered |", "|---|---|", *rows, ""]
