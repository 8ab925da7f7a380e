"""How long a step of training takes transformers and us, in one process, on the same batch.

Examples:

    python -m benchmarks.training --json benchmarks/results/training-cpu.json
    python -m benchmarks.training --presets 7b --how lora --seconds 30 --clips 16

Two models, each for clips of 5 s and of 30 s: the preset `tiny` (2 M parameters), and `100m`, of
106 M: an encoder of 8 layers, 512 wide, and a decoder of 12, 640 wide, with 32 000 words. The first
example takes 5 GiB and, on two quiet cores, some fifteen minutes; the second wants a large GPU.

Weights are random, from the same seeds; all of them train, with AdamW: ours as `train.pretrain`
runs it, transformers' with torch's fused one; both clip gradients. With `--how lora` adapters of
the decoder's linear layers train alone, with the same start: PEFT's, if it is installed, or as it
computes them. Our clips are padded as little as gives the result, transformers' to 30 s: its
encoder accepts nothing shorter. The allocator is asked for what `train.pretrain` asks it for, which
both profit from. Nothing is reported unless the losses are equal: on the first step to 1e-4 of
themselves, on the later ones, which the updates lead to, to 1e-3; in bfloat16 to 1e-2 and 3e-2.

In float32 neither side recomputes activations, and they take turns of two steps, of which the
second is timed, after two that warm each up. In bfloat16, as GPUs do by default, both recompute
blocks in the backward pass, keep both of AdamW's moments in the dtype of what trains, and run one
after the other, because a GPU holds the full-size model's moments once. Transformers recomputes all
of a block, we what --remat-policy leaves: all (`full`) or, with adapters, which leave the memory,
all but products of matrices (`minimal`). Figures are medians;
the ratio is that of each pair of timed steps. Memory is what a side holds, and the rise of the
process's resident memory during a step; on a GPU each framework's own account, ours since the
process began, so that one length at a time is to be asked for. FLOP/s, and MFU where the device's
peak is known, count the model's own operations on what is valid.
"""

import argparse
import dataclasses
import gc
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import torch
import transformers

from benchmarks import sides, steps
from benchmarks.sides import GIB, Peak
from benchmarks.steps import Batch, How, Step
from qwen2audio_jax import Processor, remat
from qwen2audio_jax.config import Config
from qwen2audio_jax.data.world import World
from qwen2audio_jax.processor import needed_frames
from qwen2audio_jax.training import memory, xla_flags
from qwen2audio_jax.training.flops import peak

# Both sides share a GPU, and ours begins when the other has given its memory back: it may have all
# but what torch's libraries keep, where jax would stop at three quarters.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")

ANSWERS = ("a bell", "two clicks", "a dog and a bird", "three beeps")
FULL = 3000  # mel frames that transformers' encoder wants
WARM = 2  # the first step compiles, or makes the moments
BOUNDS = {"float32": (1e-4, 1e-3), "bfloat16": (1e-2, 3e-2)}  # of losses: the first, later ones


def batch_of(processor: Processor, seconds: float, clips: int, frames: int) -> Batch:
    """Questions about clips of one length, with short answers to learn."""
    waves = [np.roll(sides.make_clip(seconds), i * sides.RATE // 7) for i in range(clips)]
    rows = [
        [*sides.conversation((wave, sides.RATE)), {"role": "assistant", "content": answer}]
        for wave, answer in zip(waves, ANSWERS * clips, strict=False)
    ]
    return processor(rows, labels=True, padding_side="right", frames=frames)


def compare(sizes: Config, seconds: float, how: How, **options: Any) -> dict[str, Any]:
    """Figures of both sides, for clips of one length.

    Args:
      options: `clips` in a batch, `repeats` of what is timed, `peak`: operations per second.
    """
    with tempfile.TemporaryDirectory() as folder:
        World.named("small").write_tokenizer(pathlib.Path(folder), vocabulary=512)
        processor = Processor.from_pretrained(folder)
    clips, repeats, peak = (options[name] for name in ("clips", "repeats", "peak"))
    frames = {"theirs": FULL, "ours": needed_frames(round(100 * seconds))}
    batches = {name: batch_of(processor, seconds, clips, each) for name, each in frames.items()}
    told = (apart if how.spares else by_turns)(sizes, batches, how, repeats)
    check(told.losses, how.dtype)
    medians = {name: statistics.median(times) for name, times in told.times.items()}
    figures = {
        name: {
            "step_s": medians[name],
            "every_step_s": told.times[name],
            "peak_gib": told.peaks[name][0] / GIB,
            "rise_gib": told.peaks[name][1] / GIB,
            "gflops_per_s": told.flops / medians[name] / 1e9,
            "losses": told.losses[name],
        }
        | ({"mfu": told.flops / medians[name] / peak} if peak else {})
        for name in frames
    }
    return {
        "seconds": seconds,
        "clips": clips,
        "tokens": int(batches["ours"]["attention_mask"].sum()),
        "trained_parameters": told.trained,
        "model_gflops": told.flops / 1e9,
        "ratios": [a / b for a, b in zip(*(told.times[n] for n in frames), strict=True)],
        **figures,
    }


@dataclasses.dataclass
class Told:
    """What was measured: bytes that a side holds, and each's rise over them, seconds, losses."""

    held: int = 0
    trained: int = 0
    flops: float = 0.0
    peaks: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    times: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    losses: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def begin_theirs(self, model: Any, sizes: Config, batch: Batch, how: How) -> Step:
        model = steps.adapt(model, sizes) if how.lora else model
        trained = steps.trained_of(model)
        self.trained = sum(p.numel() for p in trained)
        # parameters, and two moments of those that train
        self.held = sum(p.nbytes for p in model.parameters()) + 2 * sum(p.nbytes for p in trained)
        return steps.theirs(model, batch, how)

    def warm(self, name: str, step: Step) -> None:
        self.losses[name], self.times[name] = [step() for _ in range(WARM)], []

    def weigh(self, name: str, step: Step, how: How) -> None:
        if how.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with Peak() as peak:
            self.losses[name].append(step())
        top = self.held + peak.rise
        if how.device == "cuda":
            allocated = jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]
            top = allocated if name == "ours" else torch.cuda.max_memory_allocated()
        self.peaks[name] = top, top - self.held

    def time(self, name: str, step: Step) -> None:
        self.losses[name].append(step())  # takes back the memory that the other side had
        start = time.perf_counter()
        self.losses[name].append(step())
        self.times[name].append(time.perf_counter() - start)


def by_turns(sizes: Config, batches: Mapping[str, Any], how: How, repeats: int) -> Told:
    """Both sides in memory, so that what else the machine does befalls both."""
    told = Told()
    our_model, their_model = sides.build(sizes, how.dtype, how.device)
    their_step = told.begin_theirs(their_model, sizes, batches["theirs"], how)
    our_step, told.flops = steps.ours(our_model, batches["ours"], how)
    each = {"theirs": their_step, "ours": our_step}
    for name, step in each.items():
        told.warm(name, step)
    for name, step in each.items():
        told.weigh(name, step, how)
    for _ in range(repeats):
        for name, step in each.items():
            told.time(name, step)
    return told


def apart(sizes: Config, batches: Mapping[str, Any], how: How, repeats: int) -> Told:
    """One side after the other, transformers first, where memory has no room for both."""
    told = Told()
    for name in ("theirs", "ours"):
        model = sides.build_one(name, sizes, how.dtype, how.device)
        if name == "theirs":
            step = told.begin_theirs(model, sizes, batches[name], how)
        else:
            step, told.flops = steps.ours(model, batches[name], how)
        del model
        told.warm(name, step)
        told.weigh(name, step, how)
        for _ in range(repeats):
            told.time(name, step)
        del step
        gc.collect()
        torch.cuda.empty_cache()
    return told


def check(losses: Mapping[str, list[float]], dtype: str = "float32") -> None:
    """Refuses figures of sides that did not compute the same.

    Raises:
      SystemExit: the losses of a step differ; the message gives both.
    """
    first, later = BOUNDS[dtype]
    for i, (a, b) in enumerate(zip(losses["theirs"], losses["ours"], strict=True)):
        if not abs(a - b) <= (later if i else first) * abs(a):
            raise SystemExit(f"losses differ at step {i + 1}: transformers has {a}, we have {b}")


def markdown(name: str, figures: dict) -> str:
    """One model's figures on clips of one length, as a table."""
    millions = figures["trained_parameters"] / 1e6
    a, b, ratios = figures["theirs"], figures["ours"], figures["ratios"]
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    lines = [
        f"| {name}, {millions:.1f} M, {figures['clips']} clips of {figures['seconds']:g} s "
        "| transformers | ours | ratio |",
        "|---|---|---|---|",
        f"| step, s | {a['step_s']:.3f} | {b['step_s']:.3f} "
        f"| {middle:.2f} ({low:.2f} to {high:.2f}) |",
    ]
    for what, key in (("peak memory, GiB", "peak_gib"), ("of that a step's rise", "rise_gib")):
        ratio = a[key] / max(b[key], 1e-9)
        lines.append(f"| {what} | {a[key]:.2f} | {b[key]:.2f} | {ratio:.2f} |")
    rates = f"{a['gflops_per_s']:.0f} | {b['gflops_per_s']:.0f}"
    lines.append(f"| the model's GFLOP/s | {rates} | |")
    if "mfu" in a:
        lines.append(f"| of the peak (MFU) | {a['mfu']:.1%} | {b['mfu']:.1%} | |")
    for what, at in (("first loss", 0), ("last loss", -1)):
        lines.append(f"| {what} | {a['losses'][at]:.5f} | {b['losses'][at]:.5f} | |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    options = _options(arguments)
    xla_flags.ask()
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    if (device == "cuda") != torch.cuda.is_available():
        has = "a GPU" if torch.cuda.is_available() else "none"
        raise SystemExit(f"wanted one device for both sides, got jax on {device}, torch with {has}")
    dtype = options.dtype or {"cpu": "float32", "cuda": "bfloat16"}[device]
    lora, policy = options.how == "lora", options.remat_policy
    how = How(lora=lora, dtype=dtype, device=device, remat_policy=policy)
    given = options.peak_tflops and options.peak_tflops * 1e12
    sizing = {"clips": options.clips, "repeats": options.repeats, "peak": given or peak(dtype)}
    if device == "cuda" and not sizing["peak"]:  # of a machine that is lent, MFU is the point
        kind = jax.devices()[0].device_kind
        raise SystemExit(f"wanted --peak-tflops: the peak of {kind} in {dtype} is not known")
    memory.keep()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # of adapters, as XLA's default
    transformers.utils.logging.set_verbosity_error()
    results = {}
    for name in options.presets:
        results[name] = []
        for seconds in options.seconds:
            figures = compare(sides.sizes_of(name), seconds, how, **sizing)
            print(markdown(name, figures), end="\n\n", flush=True)
            results[name].append(figures)
    if options.json:
        tables = [markdown(name, figures) for name, each in results.items() for figures in each]
        about = f"{dtype}, AdamW" + (f", LoRA of r {steps.LORA.r}" if how.lora else "")
        about += f", our remat policy {how.remat}"
        told = {**sides.machine(), "remat_policy": how.remat, "presets": results}
        sides.save(options.json, told, about, tables)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    first, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--presets", nargs="+", default=["tiny", "100m"], choices=sorted(sides.SIZES))
    add("--how", choices=("full", "lora"), default="full", help="what trains (default: all)")
    add("--dtype", choices=sorted(BOUNDS), help="default: float32 on CPUs, bfloat16 on GPUs")
    add("--remat-policy", choices=sorted(remat.POLICIES), help="of ours (default: see above)")
    add("--seconds", type=float, nargs="+", default=[5.0, 30.0], help="of the clips")
    add("--clips", type=int, default=4, help="in a batch")
    add("--repeats", type=int, default=5)
    add("--peak-tflops", type=float, help="of the device, dense, in this dtype, where not known")
    add("--json", type=pathlib.Path, help="also write the figures to this file")
    options = parser.parse_args(arguments)
    if options.clips < 1 or options.repeats < 1:
        parser.error("wanted at least 1 clip and 1 repeat")
    return options


if __name__ == "__main__":
    main()
