"""Whether voice chat and audio analysis, learned together, are learned any worse than alone.

    python -m train.demo && python -m benchmarks.modes         # another eight minutes
    python -m benchmarks.modes --world full --demo runs/tiny --manifest digits/manifest.jsonl

What the demonstration's pretraining left is fine-tuned twice more, with one mode each: as its SFT
was, on as many samples of that mode, and as many of the tasks that are kept in memory. All are then
asked for the same held-out conversations. A benchmark that was stopped goes on.
"""

import dataclasses
import pathlib
from typing import Any, Literal

from benchmarks import sides
from qwen2audio_jax.data.world import MODES, World
from qwen2audio_jax.evaluation import world as evaluation
from qwen2audio_jax.training import memory, run, stage
from qwen2audio_jax.training.settings import Settings
from train import command, demo


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Which demonstration, and where results go."""

    demo: pathlib.Path = pathlib.Path("runs/demo")
    """What `python -m train.demo` left; the two trainings go beside its stages."""
    world: Literal["small", "full"] = "small"
    """What the demonstration was of."""
    manifest: tuple[str, ...] = ()
    """The recordings that it had."""
    clips: int = 400
    """Held-out conversations of each mode."""
    out: pathlib.Path | None = None
    """A JSON file; a table is put beside it."""


def main(options: Options) -> None:
    joint = together(options)
    world = World.named(options.world)
    right = {"together": score(joint.out, world, MODES, options.clips)}
    for mode in MODES:
        settings = alone(joint, mode)
        if stage.train(settings) is not None:
            raise KeyboardInterrupt
        right["alone"] = right.get("alone", {}) | score(settings.out, world, [mode], options.clips)
    print(table(right))
    if options.out is not None:
        content = sides.machine() | {"world": options.world, "clips": options.clips}
        steps = f"{joint.optimizer.steps} steps together, {settings.optimizer.steps} alone"
        sides.save(options.out, content | {"right": right}, f"SFT, {steps}", [table(right)])


def together(options: Options) -> Settings:
    """The demonstration's SFT, as it was run.

    Raises:
      FileNotFoundError: it was not.
      ValueError: it was, with other settings than train.demo has now.
    """
    settings = demo.plan(
        demo.Demo(world=options.world, out=options.demo, manifest=options.manifest)
    )[1]
    if not (settings.out / "model").exists():
        raise FileNotFoundError(f"{settings.out}: wanted what train.demo leaves, found no model")
    ran = run.begun(settings.out)["optimizer"]
    shown = {name: ran[name] for name in ("steps", "warmup_steps")}
    optimizer = dataclasses.replace(settings.optimizer, **shown)
    settings = run.fed(dataclasses.replace(settings, optimizer=optimizer), 1)
    run.compare(settings.out, settings)
    return settings


def alone(joint: Settings, mode: str) -> Settings:
    """The same with one mode: in fewer steps, for as much of it and of the tasks."""
    data = joint.data
    kind = lambda source: source.rpartition("/")[2]
    others = set(MODES) - {mode}
    kept = [i for i, source in enumerate(data.train) if kind(source) not in others]
    of_kept = lambda values: tuple(values[i] for i in kept)
    part = sum(of_kept(data.weights)) / sum(data.weights)
    steps = round(part * joint.optimizer.steps)
    return dataclasses.replace(
        joint,
        out=joint.out.with_name(f"{joint.out.name}-{mode}"),
        data=dataclasses.replace(
            data,
            train=of_kept(data.train),
            tasks=of_kept(data.tasks),
            weights=of_kept(data.weights),
        ),
        optimizer=dataclasses.replace(
            joint.optimizer, steps=steps, warmup_steps=round(part * joint.optimizer.warmup_steps)
        ),
    )


def score(
    folder: pathlib.Path, world: World, modes: list[str] | tuple[str, ...], clips: int
) -> dict[str, float]:
    """The part of each mode's answers that are right to the letter."""
    rows = evaluation.score(*demo.load(folder), world, clips, kinds=modes)
    return {row.task: row.value for row in rows}


def table(right: dict[str, Any]) -> str:
    lines = ["| right to the letter, % | alone | together | points |", "|---|---|---|---|"]
    for mode in MODES:
        a, b = (100 * right[way][mode] for way in ("alone", "together"))
        lines.append(f"| {mode} | {a:.1f} | {b:.1f} | {b - a:+.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    memory.keep()
    command.run(main, Options, "benchmarks.modes", __doc__, extra="demo")
