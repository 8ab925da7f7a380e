"""Whether saying a task in words, in tags, or not at all makes a better model: Qwen2-Audio's claim.

    python -m benchmarks.prompts                          # nine trainings, an hour and a half
    python -m benchmarks.prompts --seeds 0 --steps 20 --clips 4 --world small --out /tmp/prompts

The same samples of a made world are learned from nothing three times: with natural-language
prompts, with Qwen-Audio's hierarchical tags, and with no hint at the task; from several seeds.
Batches hold equally many samples, so that equally many tokens are learned. Each is then asked for
held-out samples the way it was trained, and the first also in paraphrases that no training had.
Answers are free: nothing keeps them in a closed set. A benchmark that was stopped goes on.
"""

import dataclasses
import pathlib
from typing import Any, Literal

import numpy as np

from benchmarks import sides
from qwen2audio_jax import Processor, Qwen2Audio
from qwen2audio_jax.data.instruction import STYLES
from qwen2audio_jax.data.world import World
from qwen2audio_jax.evaluation import world as evaluation
from qwen2audio_jax.training import log, stage
from qwen2audio_jax.training.data_config import DataConfig
from qwen2audio_jax.training.optimizer import OptimizerConfig
from qwen2audio_jax.training.settings import LoopConfig, Settings
from train import command, demo
from train.configs import laptop

KNOBS = ("world", "steps", "seeds", "clips")  # what figures depend on
ASKED = {"prompt": ("prompt", "paraphrase"), "tags": ("tags",), "none": ("none",)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How much is trained, and where results go."""

    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 900
    clips: int = 100
    """Held-out samples of each task."""
    world: Literal["small", "full"] = "small"
    runs: pathlib.Path = pathlib.Path("runs/prompts")
    """A folder for the trainings, to go on with."""
    out: pathlib.Path | None = None
    """A JSON file; a table and a plot are put beside it."""


def main(options: Options) -> None:
    world = World.named(options.world)
    demo.begin(demo.Demo(world=options.world, out=options.runs), world)
    figures = []
    for seed in options.seeds:
        for style in STYLES:
            figures += measure(options, world, style, seed)
            print(table(figures), flush=True)
    if options.out is not None:
        content = sides.machine() | {name: getattr(options, name) for name in KNOBS}
        about = f"`python -m benchmarks.prompts`, {options.steps} steps"
        sides.save(options.out, content | {"figures": figures}, about, [table(figures)])
        draw(figures, options.out.with_suffix(".png"))


def measure(options: Options, world: World, style: str, seed: int) -> list[dict[str, Any]]:
    """Trains one model, and scores it in every way that it can be asked."""
    folder = options.runs / f"{style}-{seed}"
    settings = Settings(
        out=folder,
        model=str(options.runs / "start"),
        from_scratch=True,
        seed=seed,
        scan_layers=False,
        ctc=0.3,
        tensorboard=False,
        data=DataConfig(
            train=(f"world:{options.world}/tasks",),
            style=style,
            buckets=laptop(100, 190, 340),
            augmented=0.4,
            masked=0.4,
        ),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=1e-3,
            steps=options.steps,
            warmup_steps=options.steps // 20,
            weight_decay=0.05,
        ),
        loop=LoopConfig(save_every=300, keep=1, best="loss"),
    )
    if stage.train(settings) is not None:
        raise KeyboardInterrupt
    model = Qwen2Audio.from_pretrained(folder / "model", dtype="float32")
    processor = Processor.from_pretrained(folder / "model")
    learned = sum(row["tokens"] for row in log.read(folder / log.LOG) if "loss" in row)
    tasks = [skill.name for skill in world.tasks]
    return [
        {
            "asked": asked,
            "seed": seed,
            "learned_tokens": learned,
            "right": {
                row.task: 1 - row.value if row.metric == "wer" else row.value
                for row in evaluation.score(
                    model,
                    processor,
                    world,
                    options.clips,
                    kinds=tasks,
                    style=style,
                    paraphrased=asked == "paraphrase",
                )
            },
        }
        for asked in ASKED[style]
    ]


def table(figures: list[dict[str, Any]]) -> str:
    """What is right after each, the mean over seeds and how far apart they are."""
    ways = list(dict.fromkeys(each["asked"] for each in figures))
    tasks = list(figures[0]["right"])
    lines = [f"| right, % | {' | '.join(ways)} |", "|---|" + "---|" * len(ways)]
    for task in [*tasks, "mean"]:
        cells = []
        for way in ways:
            values = [100 * value(each, task) for each in figures if each["asked"] == way]
            cells.append(f"{np.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})")
        lines.append(f"| {task} | {' | '.join(cells)} |")
    learned = [
        np.mean([each["learned_tokens"] for each in figures if each["asked"] == way])
        for way in ways
    ]
    lines.append(f"| tokens learned | {' | '.join(f'{count:,.0f}' for count in learned)} |")
    return "\n".join(lines)


def value(figure: dict[str, Any], task: str) -> float:
    return (
        float(np.mean(list(figure["right"].values()))) if task == "mean" else figure["right"][task]
    )


def draw(figures: list[dict[str, Any]], path: pathlib.Path) -> None:
    """A point for each seed, a bar for their mean."""
    from matplotlib.figure import Figure

    ways = list(dict.fromkeys(each["asked"] for each in figures))
    tasks = [*figures[0]["right"], "mean"]
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(ways)
    for color, way in enumerate(ways):
        rows = [each for each in figures if each["asked"] == way]
        values = 100 * np.array([[value(row, task) for task in tasks] for row in rows])
        places = np.arange(len(tasks)) + (color - (len(ways) - 1) / 2) * width
        axes.bar(places, values.mean(axis=0), width, color=f"C{color}", alpha=0.6, label=way)
        axes.plot(places, values.T, ".", color="black", markersize=4)
    axes.set_xticks(np.arange(len(tasks)), tasks)
    axes.set(ylabel="held out, right, %", ylim=(0, 105))
    figure.legend(ncols=len(ways), loc="outside upper center")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    command.run(main, Options, "benchmarks.prompts", __doc__, extra="demo")
