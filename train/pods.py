"""What the 7b preset needs of pods, as a table and a picture: every program is compiled, here.

    python -m train.pods docs/pods.md                 # what is not there yet
    python -m train.pods docs/pods.md --only v5e      # those again; the others stay
    python -m train.pods docs/pods.md --only=--stage  # all: an hour and a half of two cores

The picture, docs/pods.png, shows how time and memory grow with the chips, 16 to 1024 of them, each
of which has as much to do, and with the sound in a row. What was compiled goes to docs/pods.json as
it comes, so that what was interrupted goes on. A figure that misses its aim is in bold. A step that
cannot be compiled has a row that says why and is tried again the next time; the exit status is 1.
"""

import dataclasses
import datetime
import json
import math
import pathlib
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from typing import Any

import tyro

from qwen2audio_jax.training.chips import CHIPS, GIB
from train import command

COMMIT = ("git", "rev-parse", "--short", "HEAD")
MOST_AGAIN = 1.35  # operations over the model's own, with full remat
LONGEST, LARGEST = 120, 6  # to compile: seconds on two cores, GiB of the process


@dataclasses.dataclass(frozen=True)
class Step:
    """What is compiled.

    Attributes:
      told: what else `train.compile` is told.
      slices: how many of these chips, joined by a network.
      sound: seconds that a row hears.
      mfu: the least bound on MFU that is aimed at; 0: none is.
      name: of the stage in the table, where the same program is that of others too.
    """

    stage: str
    chips: str
    told: str
    slices: int = 1
    sound: float = 30.0
    mfu: float = 0.0
    name: str = ""

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

    @property
    def trains(self) -> bool:
        return self.stage not in ("prefill", "decode")


def _sft(chips: str, rows: int, more: str = "", *, mfu: float = 0.0, **how: Any) -> Step:
    """All parameters trained, on rows of 4096 tokens with five clips of 30 s, as packing fills
    them: 3750 tokens of sound and 346 of text. Pretraining and SFT differ in their data alone."""
    told = f"--batch {rows} --tokens 4096 --clips 5{more}"
    return Step("sft", chips, told, sound=150.0, mfu=mfu, name="pretrain, sft", **how)


# Products wait for whole parameters rather than sum up parts in float32: where a chip computes so
# much faster than it reads and writes, links cost less than those sums.
WHOLE = " --compiler-options xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000"
# As docs/hosts.md has it: the preset's optimizer, and two batches a step.
ROWS = "--batch 32 --tokens 4096"
GUIDE = (
    " --gradient-accumulation-steps 2 --optimizer.encoder-learning-rate 0.0 --optimizer.b2 0.95"
    " --optimizer.weight-decay 0.0"
)
TWO, EIGHT = (f" --mesh.ici-data-parallelism {n}" for n in (2, 8))
TABLE = (
    _sft("v5e:4x4", 16, mfu=0.6),
    _sft("v5p:2x2x2", 32),
    _sft("v6e:4x4", 32, WHOLE, mfu=0.6),
    _sft("v5e:4x4", 32, GUIDE),
    Step("sft", "v5e:4x4", f"{ROWS} --clips 15 --frames 1004{GUIDE}", sound=150.6),
    Step("sft", "v5e:4x4", f"{ROWS} --clips 30 --frames 504{GUIDE}", sound=151.2),
    _sft("v4:2x2x4", 32),
    _sft("7x:2x2x2", 64, WHOLE),
    Step("dpo", "v5e:4x8", f"--batch 128{WHOLE}"),
    Step("dpo-precomputed", "v5e:4x8", f"--batch 128{WHOLE}"),
    Step("lora-sft", "v5e:2x4", "--batch 32 --tokens 4096 --clips 5", sound=150.0),
    Step("prefill", "v5e:1x2", "--batch 1 --mesh.ici-tensor-parallelism 2"),
    Step("decode", "v5e:1x2", "--batch 4 --tokens 2048 --mesh.ici-tensor-parallelism 2"),
    Step("prefill", "v5p:1x1x1", "--batch 8"),
    Step("decode", "v5p:1x1x1", "--batch 32 --tokens 2048"),
)
CHIPS_GROW = (
    _sft("v5e:4x4", 16, mfu=0.6),
    _sft("v5e:8x8", 64),
    _sft("v5e:16x16", 256, TWO, mfu=0.6),
    _sft("v5e:16x16", 1024, TWO, slices=4),
    _sft("v5p:2x2x4", 64, mfu=0.6),
    _sft("v5p:4x4x4", 256),
    _sft("v5p:4x8x8", 1024, TWO, mfu=0.6),
    _sft("v5p:8x8x16", 4096, EIGHT),
    _sft("v6e:4x4", 32, WHOLE, mfu=0.6),
    _sft("v6e:8x8", 128, WHOLE),
    _sft("v6e:16x16", 512, TWO + WHOLE, mfu=0.6),
    _sft("v6e:16x16", 2048, TWO + WHOLE, slices=4),
)
SPREAD = "--mesh.ici-context-parallelism"  # a row over several chips
SOUND_GROWS = (
    Step("sft", "v5e:4x4", "--batch 256 --tokens 256 --frames 500", sound=5),
    Step("sft", "v5e:4x4", "--batch 64", sound=30),
    Step("sft", "v5e:4x4", "--batch 32 --tokens 2048 --clips 2", sound=60),
    _sft("v5e:4x4", 16, mfu=0.6),
    Step("sft", "v5e:4x4", f"--batch 8 --tokens 8192 --clips 10 {SPREAD} 2", sound=300),
    Step("sft", "v5e:4x4", f"--batch 4 --tokens 16384 --clips 20 {SPREAD} 4{WHOLE}", sound=600),
)
HEAD = (
    "| stage | chips | | memory | operations / model's | bound by | MFU at most | one by one | "
    "compiled in | with | at |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
)
MARKS = {"compute": "o", "memory": "s", "links": "^", "host": "v"}  # by what takes longest


@dataclasses.dataclass(frozen=True)
class Options:
    """What is compiled anew, and where the table goes."""

    out: tyro.conf.Positional[pathlib.Path]
    """The table, in Markdown."""
    only: str = ""
    """Steps with this in their command, known or not."""


def main(options: Options) -> int:
    """Compiles what is not yet known; the exit status."""
    out, only = options.out, options.only
    store = out.with_suffix(".json")
    known = json.loads(store.read_text("utf-8")) if store.exists() else {}
    out.parent.mkdir(parents=True, exist_ok=True)
    steps = list({step.command: step for step in (*TABLE, *CHIPS_GROW, *SOUND_GROWS)}.values())
    for number, step in enumerate(steps, 1):
        there = "error" not in known.get(step.command, {"error": "not yet compiled"})
        if only not in step.command or (there and not only):
            continue
        print(f"{number} of {len(steps)}: {step.command}", file=sys.stderr, flush=True)
        known[step.command] = compiled(step)
        store.write_text(json.dumps(known, indent=1) + "\n", "utf-8")
    done = [step for step in steps if step.command in known]
    lines = [line(step, known[step.command]) for step in done]
    by = sorted({known[step.command].get("by", "") for step in done} - {""})
    told = [f"Compiled by {each}." for each in by]
    out.write_text("\n".join([*HEAD, *lines, "", *told, ""]), "utf-8")
    draw(known, out.with_suffix(".png"))
    return int(any("error" in known[step.command] for step in done))


def compiled(step: Step) -> dict[str, Any]:
    """A process of its own for each: what one has held is not the next one's. Of one that ends
    badly, the line that says why."""
    command = [sys.executable, "-m", "train.compile", "--json", *step.command.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        print(said[-1], file=sys.stderr, flush=True)
        return {"error": said[-1].removeprefix("train.compile: error: ")}
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "libtpu"))
    commit = subprocess.run(COMMIT, capture_output=True, text=True).stdout.strip()
    return json.loads(done.stdout) | {"by": versions, "at": f"{datetime.date.today()} {commit}"}


def line(step: Step, found: dict[str, Any]) -> str:
    """A row of the table."""
    chips = f"{step.slices} x {step.chips}" if step.slices > 1 else step.chips
    figures = [*_figures(step, found), found.get("at", "")]
    cells = [step.name or step.stage, chips, f"`{step.told}`", *figures]
    return f"| {' | '.join(cells)} |"


def _figures(step: Step, found: dict[str, Any]) -> list[str]:
    """What was found; in bold what is not as it is aimed at."""
    if "error" in found:
        return ["", "", f"**{found['error']}**", "", "", "", ""]
    bold = lambda text, met: text if met else f"**{text}**"
    needs, has = found["hbm_peak_bytes"] / GIB, found["hbm_chip_bytes"] / GIB
    memory = bold(f"{needs:.2f} of {has:.2f} GiB", found["fits"])
    seconds, gib = found["compile_s"], found["process_peak_bytes"] / GIB
    took = [
        bold(f"{seconds:.0f} s", not step.trains or seconds <= LONGEST),
        bold(f"{gib:.1f} GiB", not step.trains or gib <= LARGEST),
    ]
    if not found["fits"]:
        return [memory, "", f"**lacks {needs - has:.2f} GiB**", "", "", *took]
    again, mfu = found["flops_ratio"], found["mfu_bound"]
    return [
        memory,
        bold(f"{again:.3f}", not step.trains or again <= MOST_AGAIN),
        f"{found['limit']}, {found['step_s'] * 1e3:.0f} ms",
        bold(f"{mfu:.0%}", mfu >= step.mfu),
        f"{found['serial_s'] * 1e3:.0f} ms, {found['serial_mfu']:.0%}",
        *took,
    ]


def draw(known: dict[str, dict[str, Any]], path: pathlib.Path) -> None:
    """Time and memory against chips and against sound, of what is known."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    have = lambda steps: [step for step in steps if "fits" in known.get(step.command, {})]
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
