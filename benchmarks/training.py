"""How long a step of training takes transformers and us, in one process, on the same batch.

Example:

    python -m benchmarks.training --json benchmarks/results/training-cpu.json

Two models, each for clips of 5 s and of 30 s: the preset `tiny` (2 M parameters), and `100m`, of
106 M: an encoder of 8 layers, 512 wide, and a decoder of 12, 640 wide, with 32 000 words. The
example takes 5 GiB and, on two quiet cores, some fifteen minutes.

Weights are random, made once and copied; all of them train, in float32, with AdamW: ours as
`train.pretrain` runs it, transformers' with torch's fused one; both clip gradients, and neither
recomputes activations. Our clips are padded as little as gives the result, transformers' to 30 s:
its encoder accepts nothing shorter. The allocator is asked for what `train.pretrain` asks it for,
which both profit from. Nothing is reported unless the losses are equal: on the first step to 1e-4
of themselves, on the later ones, which the updates lead to, to 1e-3.

Both sides take turns of two steps, of which the second is timed, after two that warm each up.
Figures are medians; the ratio is that of each pair of timed steps. Memory is the parameters and
moments that a side holds, and the rise of the process's resident memory during a step. FLOP/s count
the model's own operations on what is valid.
"""

import argparse
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import torch
import transformers

from benchmarks import sides
from benchmarks.sides import GIB, Peak
from qwen2audio_jax import Processor, Qwen2Audio
from qwen2audio_jax.config import Config
from qwen2audio_jax.data.world import World
from qwen2audio_jax.processor import needed_frames
from qwen2audio_jax.training import memory
from qwen2audio_jax.training.learner import Learner
from qwen2audio_jax.training.loss import next_token
from qwen2audio_jax.training.optimizer import OptimizerConfig

OPTIMIZER = OptimizerConfig(schedule_type="constant", warmup_steps=0)
ANSWERS = ("a bell", "two clicks", "a dog and a bird", "three beeps")
FULL = 3000  # mel frames that transformers' encoder wants
WARM = 2  # the first step compiles, or makes the moments

Batch = Mapping[str, np.ndarray]
Step = Callable[[], float]


def batch_of(processor: Processor, seconds: float, clips: int, frames: int) -> Batch:
    """Questions about clips of one length, with short answers to learn."""
    waves = [np.roll(sides.make_clip(seconds), i * sides.RATE // 7) for i in range(clips)]
    rows = [
        [*sides.conversation((wave, sides.RATE)), {"role": "assistant", "content": answer}]
        for wave, answer in zip(waves, ANSWERS * clips, strict=False)
    ]
    return processor(rows, labels=True, padding_side="right", frames=frames)


def ours(model: Qwen2Audio, batch: Batch) -> tuple[Step, float]:
    """A step of qwen2audio_jax that returns its loss, and its model's FLOPs."""
    learner = Learner(model, OPTIMIZER, next_token)

    def step():
        metrics = learner.step(batch, 0)
        jax.block_until_ready(learner.state)
        return float(metrics["loss"])

    return step, learner.flops(batch)


def theirs(model: Any, batch: Batch) -> Step:
    """A step of transformers, with what OPTIMIZER says in torch's terms."""
    c = OPTIMIZER
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": c.weight_decay},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=c.learning_rate, betas=(c.b1, c.b2), eps=c.eps, fused=True)
    inputs = {name: torch.from_numpy(x) for name, x in batch.items()}
    inputs["input_ids"], inputs["labels"] = inputs["input_ids"].long(), inputs["labels"].long()
    model.train()

    def step():
        adamw.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, c.clip_norm)
        adamw.step()
        return loss.item()

    return step


def compare(sizes: Config, seconds: float, *, clips: int, repeats: int) -> dict[str, Any]:
    """Figures of both sides, for clips of one length."""
    our_model, their_model = sides.build(sizes, "float32", "cpu")
    trained = [p.numel() for p in their_model.parameters() if p.requires_grad]
    with tempfile.TemporaryDirectory() as folder:
        World.named("small").write_tokenizer(pathlib.Path(folder), vocabulary=512)
        processor = Processor.from_pretrained(folder)
    batch = batch_of(processor, seconds, clips, needed_frames(round(100 * seconds)))
    step, flops = ours(our_model, batch)
    steps = {
        "theirs": theirs(their_model, batch_of(processor, seconds, clips, FULL)),
        "ours": step,
    }
    losses = {name: [step() for _ in range(WARM)] for name, step in steps.items()}
    rises, times = {}, {name: [] for name in steps}
    for name, step in steps.items():
        with Peak() as peak:
            losses[name].append(step())
        rises[name] = peak.rise
    for _ in range(repeats):
        for name, step in steps.items():
            losses[name].append(step())  # takes back the memory that the other side had
            start = time.perf_counter()
            losses[name].append(step())
            times[name].append(time.perf_counter() - start)
    check(losses)
    held = 3 * 4 * sum(trained)
    figures = {
        name: {
            "step_s": statistics.median(times[name]),
            "every_step_s": times[name],
            "rise_gib": rises[name] / GIB,
            "peak_gib": (held + rises[name]) / GIB,
            "gflops_per_s": flops / statistics.median(times[name]) / 1e9,
            "losses": losses[name],
        }
        for name in steps
    }
    return {
        "seconds": seconds,
        "clips": clips,
        "tokens": int(batch["attention_mask"].sum()),
        "trained_parameters": sum(trained),
        "model_gflops": flops / 1e9,
        "ratios": [a / b for a, b in zip(*times.values(), strict=True)],
        **figures,
    }


def check(losses: Mapping[str, list[float]]) -> None:
    """Refuses figures of sides that did not compute the same.

    Raises:
      SystemExit: the losses of a step differ; the message gives both.
    """
    for i, (a, b) in enumerate(zip(losses["theirs"], losses["ours"], strict=True)):
        if not abs(a - b) <= (1e-3 if i else 1e-4) * abs(a):
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
    for what, at in (("first loss", 0), ("last loss", -1)):
        lines.append(f"| {what} | {a['losses'][at]:.5f} | {b['losses'][at]:.5f} | |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    first, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--presets", nargs="+", default=["tiny", "100m"], choices=sorted(sides.SIZES)
    )
    parser.add_argument(
        "--seconds", type=float, nargs="+", default=[5.0, 30.0], help="of the clips"
    )
    parser.add_argument("--clips", type=int, default=4, help="in a batch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures to this file")
    options = parser.parse_args(arguments)
    if options.clips < 1 or options.repeats < 1:
        parser.error("wanted at least 1 clip and 1 repeat")
    if jax.default_backend() != "cpu":
        raise SystemExit(f"wanted a CPU for both sides, got jax on {jax.default_backend()}")
    memory.keep()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    transformers.utils.logging.set_verbosity_error()
    results = {}
    for name in options.presets:
        results[name] = []
        for seconds in options.seconds:
            figures = compare(
                sides.sizes_of(name), seconds, clips=options.clips, repeats=options.repeats
            )
            print(markdown(name, figures), end="\n\n", flush=True)
            results[name].append(figures)
    if options.json:
        tables = [markdown(name, figures) for name, each in results.items() for figures in each]
        sides.save(options.json, {**sides.machine(), "presets": results}, "float32, AdamW", tables)


if __name__ == "__main__":
    main()
