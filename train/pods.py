"""What the 7b preset needs of pods, as a table and a picture: every program is compiled, here.

    python -m train.pods docs/pods.md                 # two hours of processors
    python -m train.pods docs/pods.md --only v5e      # those again; the others stay

The picture, docs/pods.png, shows how time and memory grow with the chips, 16 to 1024 of them, each
of which has as much to do, and with the sound in a row. What was compiled goes to docs/pods.json as
it comes, so that what was interrupted goes on.
"""

import dataclasses
import json
import math
import pathlib
import subprocess
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import tyro

from qwen2audio_jax.training.chips import CHIPS, GIB
from train import command


@dataclasses.dataclass(frozen=True)
class Step:
    """What is compiled.

    Attributes:
      told: what else `train.compile` is told.
      slices: how many of these chips, joined by a network.
      sound: seconds that a row hears.
    """

    stage: str
    chips: str
    told: str
    slices: int = 1
    sound: float = 30.0

    @property
    def command(self) -> str:
        over = f" --slices {self.slices} --mesh.dcn-data-parallelism {self.slices}"
        return f"--stage {self.stage} --topology {self.chips} {self.told}" + over * (
            self.slices > 1
        )

    @property
    def count(self) -> int:
        """Of all chips."""
        return self.slices * math.prod(map(int, self.chips.partition(":")[2].split("x")))


TABLE = (
    Step("sft", "v5e:4x4", "--batch 64"),
    Step("sft", "v5p:2x2x2", "--batch 64"),
    Step("sft", "v6e:4x4", "--batch 64"),
    Step("pretrain", "v5e:4x4", "--batch 64"),
    Step("dpo", "v5e:4x8", "--batch 32"),
    Step("dpo-precomputed", "v5e:4x8", "--batch 32"),
    Step("lora-sft", "v5e:2x4", "--batch 16"),
    Step("prefill", "v5e:1x2", "--batch 1 --mesh.ici-tensor-parallelism 2"),
    Step("decode", "v5e:1x2", "--batch 4 --tokens 2048 --mesh.ici-tensor-parallelism 2"),
    Step("prefill", "v5p:1x1x1", "--batch 8"),
    Step("decode", "v5p:1x1x1", "--batch 32 --tokens 2048"),
)
TWO = "--mesh.ici-data-parallelism 2"
CHIPS_GROW = (
    Step("sft", "v5e:4x4", "--batch 64"),
    Step("sft", "v5e:8x8", "--batch 256"),
    Step("sft", "v5e:16x16", f"--batch 1024 {TWO}"),
    Step("sft", "v5e:16x16", f"--batch 4096 {TWO}", slices=4),
    Step("sft", "v5p:2x2x4", "--batch 128"),
    Step("sft", "v5p:4x4x4", "--batch 512"),
    Step("sft", "v5p:4x8x8", f"--batch 2048 {TWO}"),
    Step("sft", "v5p:8x8x16", f"--batch 8192 {TWO.replace('2', '8')}"),
    Step("sft", "v6e:4x4", "--batch 64"),
    Step("sft", "v6e:8x8", "--batch 256"),
    Step("sft", "v6e:16x16", f"--batch 1024 {TWO}"),
    Step("sft", "v6e:16x16", f"--batch 4096 {TWO}", slices=4),
)
SPREAD = "--mesh.ici-context-parallelism"  # a row over several chips
SOUND_GROWS = (
    Step("sft", "v5e:4x4", "--batch 256 --tokens 256 --frames 500", sound=5),
    Step("sft", "v5e:4x4", "--batch 64"),
    Step("sft", "v5e:4x4", "--batch 32 --tokens 2048 --clips 2", sound=60),
    Step("sft", "v5e:4x4", "--batch 16 --tokens 4096 --clips 4", sound=120),
    Step("sft", "v5e:4x4", f"--batch 8 --tokens 8192 --clips 10 {SPREAD} 2", sound=300),
    Step("sft", "v5e:4x4", f"--batch 8 --tokens 16384 --clips 20 {SPREAD} 2", sound=600),
)
HEAD = (
    "| stage | chips | | memory | operations / model's | bound by | MFU at most | compiled in |",
    "|---|---|---|---|---|---|---|---|",
)
MARKS = {"compute": "o", "memory": "s", "links": "^"}  # by what takes longest


@dataclasses.dataclass(frozen=True)
class Options:
    """What is compiled anew, and where the table goes."""

    out: tyro.conf.Positional[pathlib.Path]
    """The table, in Markdown."""
    only: str = ""
    """Steps with this in their command, known or not."""


def main(options: Options) -> None:
    """Compiles what is not yet known."""
    out, only = options.out, options.only
    store = out.with_suffix(".json")
    known = json.loads(store.read_text("utf-8")) if store.exists() else {}
    out.parent.mkdir(parents=True, exist_ok=True)
    steps = list(dict.fromkeys((*TABLE, *CHIPS_GROW, *SOUND_GROWS)))
    for number, step in enumerate(steps, 1):
        if only not in step.command or (step.command in known and not only):
            continue
        print(f"{number} of {len(steps)}: {step.command}", file=sys.stderr, flush=True)
        known[step.command] = compiled(step)
        store.write_text(json.dumps(known, indent=1) + "\n", "utf-8")
    done = [step for step in steps if step.command in known]
    lines = [line(step, known[step.command]) for step in done]
    out.write_text("\n".join([*HEAD, *lines, ""]), "utf-8")
    draw(known, out.with_suffix(".png"))


def compiled(step: Step) -> dict[str, Any]:
    """A process of its own for each: what one has held is not the next one's."""
    command = [sys.executable, "-m", "train.compile", "--json", *step.command.split()]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"train.pods: error: {step.command} ended with {done.returncode}")
    return json.loads(done.stdout)


def line(step: Step, found: dict[str, Any]) -> str:
    """A row of the table."""
    chips = f"{step.slices} x {step.chips}" if step.slices > 1 else step.chips
    memory = f"{found['hbm_peak_bytes'] / GIB:.2f} of {found['hbm_chip_bytes'] / GIB:.2f} GiB"
    if not found["fits"]:
        return f"| {step.stage} | {chips} | `{step.told}` | **{memory}** | | does not fit | | |"
    return (
        f"| {step.stage} | {chips} | `{step.told}` | {memory} | {found['flops_ratio']:.3f} | "
        f"{found['limit']}, {found['step_s'] * 1e3:.0f} ms | {found['mfu_bound']:.0%} | "
        f"{found['compile_cpu_s']:.0f} s of processors |"
    )


def draw(known: dict[str, dict[str, Any]], path: pathlib.Path) -> None:
    """Time and memory against chips and against sound, of what is known."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    have = lambda steps: [step for step in steps if step.command in known]
    for color, kind in enumerate(CHIPS):
        steps = [step for step in have(CHIPS_GROW) if step.chips.startswith(f"{kind}:")]
        grow(axes[:, 0], [step.count for step in steps], pick(known, steps), f"C{color}", kind)
    steps = have(SOUND_GROWS)
    grow(axes[:, 1], [step.sound for step in steps], pick(known, steps), "C1", "v5e, 16 chips")
    axes[0, 0].set(ylabel="s, of a step at least", ylim=(0, None))
    axes[1, 0].set(ylabel="of a chip's memory, %", ylim=(0, None))
    for column, label, ladder in (
        (0, "chips", sorted({step.count for step in CHIPS_GROW})),
        (1, "s of sound in a row", [step.sound for step in SOUND_GROWS]),
    ):
        axes[1, column].set(xlabel=label, xscale="log")
        axes[1, column].set_xticks(ladder, [f"{x:g}" for x in ladder], minor=False)
        axes[1, column].minorticks_off()
        axes[1, column].axhline(100, color="gray", linestyle=":")
        axes[0, column].legend(fontsize="small")
    marks = [Line2D([], [], marker=m, color="gray", ls="", label=n) for n, m in MARKS.items()]
    full = Line2D([], [], marker="x", color="gray", ls="", label="does not fit")
    axes[1, 0].legend(handles=[*marks, full], title="what limits", fontsize="small")
    figure.savefig(path, dpi=110)


def pick(known: dict[str, dict[str, Any]], steps: Iterable[Step]) -> list[dict[str, Any]]:
    return [known[step.command] for step in steps]


def grow(
    axes: Sequence[Any], at: list[float], found: list[dict[str, Any]], color: str, name: str
) -> None:
    """One line of times and one of memory; each point says what limits it."""
    if not at:
        return
    memory = [100 * each["hbm_peak_bytes"] / each["hbm_chip_bytes"] for each in found]
    fitting = [(x, each["step_s"]) for x, each in zip(at, found, strict=True) if each["fits"]]
    for panel, points in zip(axes, (fitting, [*zip(at, memory, strict=True)]), strict=True):
        if points:
            panel.plot(*zip(*points, strict=True), color=color, label=name)
    for x, each, part in zip(at, found, memory, strict=True):
        mark = MARKS[each["limit"]] if each["fits"] else "x"
        axes[1].plot(x, part, mark, color=color)
        if each["fits"]:
            axes[0].plot(x, each["step_s"], mark, color=color)


if __name__ == "__main__":
    command.run(main, Options, "train.pods", __doc__)
