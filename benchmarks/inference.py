"""How fast transformers and we answer, in one process, with the same weights and the same clip.

Example:

    python -m benchmarks.inference --json benchmarks/results/inference-cpu.json
    python -m benchmarks.inference --preset qwen2-audio-7b --dtype bfloat16

The preset `mid` has Qwen2-Audio's encoder and a decoder of 12 layers, 1024 wide, with its full
vocabulary. The first example takes 11 GiB and, on two quiet cores, some six minutes; the second a
GPU of 80 GB.

Weights are random, made once and copied. The time to the first token starts with the waveform:
each side's own processor, encoder and prefill. Runs of all sides alternate after one that warms
each up; the figures are medians. On CPUs peak memory is a side's weights and the rise of the
process's resident memory during its first run; on GPUs it is what the side's allocator says.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import statistics
import tempfile
from typing import Any

# jax must leave room on a GPU that torch shares
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from benchmarks import sides as contestants
from benchmarks.sides import GIB, RATE, Ours, Peak, Run, Theirs
from qwen2audio_jax.config import Config
from qwen2audio_jax.data.world import World

# dense bfloat16 TFLOP/s and TB/s of memory, by what the device's name contains
PEAKS = {"H200": (989.0, 4.8), "H100": (989.0, 3.35), "A100": (312.0, 2.04)}
STAGES = ("features", "encoder", "prefill")


def peak_memory(name: str, rise: int, held: int) -> float:
    """GiB that a side took at its most."""
    if jax.default_backend() == "cpu":
        return (held + rise) / GIB
    if name == "ours":
        return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"] / GIB
    return torch.cuda.max_memory_allocated() / GIB


def compare(sides: dict, wave: np.ndarray, *, new: int, repeats: int, held: int) -> dict:
    """Figures of every side, for one clip."""
    for name, side in sides.items():  # warm up
        # ours in full, since the cache's size and so the programs depend on it
        side(wave, new if name == "ours" else 2)
    runs, memory = {name: [] for name in sides}, {}
    for name, side in sides.items():
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        with Peak() as peak:
            runs[name].append(side(wave, new))
        memory[name] = peak_memory(name, peak.rise, held)
    for _ in range(repeats - 1):
        for name, side in sides.items():
            runs[name].append(side(wave, new))
    reference = next(run.tokens for name, (run, *_) in runs.items() if name != "ours")
    figures = {"seconds": len(wave) / RATE, "prompt_tokens": runs["ours"][0].prompt}
    for name, each in runs.items():
        if {run.prompt for run in each} != {figures["prompt_tokens"]}:
            raise ValueError(
                f"prompts differ: {name} reads {each[0].prompt} tokens, we {runs['ours'][0].prompt}"
            )
        same = sum(a == b for a, b in zip(each[0].tokens, reference, strict=True))
        figures[name] = summary(each) | {"peak_gib": memory[name], "tokens_equal": same}
    return figures | {"new_tokens": new}


def summary(runs: list[Run]) -> dict[str, Any]:
    """Medians of what was timed, in seconds, and every run's time to the first token."""
    return {
        "first_token_s": statistics.median([run.first for run in runs]),
        "features_s": statistics.median([run.features for run in runs]),
        "encoder_s": statistics.median([run.encoder - run.features for run in runs]),
        "prefill_s": statistics.median([run.first - run.encoder for run in runs]),
        "tokens_per_s": statistics.median([(len(r.tokens) - 1) / (r.last - r.first) for r in runs]),
        "every_first_token_s": [run.first for run in runs],
    }


def flops_of_prefill(c: Config, prompt: int, frames: int) -> float:
    """Products and sums from log-mel to the first scores, as few as give the result."""
    e, d = c.encoder, c.decoder
    P, A = -(-frames // 2), (frames + 1) // 4
    encoder = 3 * e.width * (frames * e.mels + P * e.width)
    encoder += e.layers * P * e.width * (4 * e.width + 2 * e.hidden + 2 * P)
    wide = d.heads * d.head_width
    block = d.width * (2 * wide + 2 * d.kv_heads * d.head_width + 3 * d.hidden)
    decoder = d.layers * prompt * (block + wide * prompt)  # causal: half of all pairs
    return 2.0 * (encoder + A * e.width * d.width + decoder + d.width * d.vocabulary)


def bytes_of_token(c: Config, context: int, itemsize: int) -> float:
    """What a decoding step must read: the decoder's weights but the embedding, and the cache."""
    d = c.decoder
    wide, narrow = d.heads * d.head_width, d.kv_heads * d.head_width
    block = d.width * (2 * wide + 2 * narrow + 3 * d.hidden) + 2 * narrow * context
    return itemsize * (d.layers * block + d.width * d.vocabulary)


def roofline(c: Config, figures: dict, dtype: str, tflops: float, bandwidth: float) -> None:
    """Adds how near every side comes to what the device could do."""
    prompt, frames = figures["prompt_tokens"], round(100 * figures["seconds"])
    context = prompt + figures["new_tokens"] // 2
    tokens = bandwidth * 1e12 / bytes_of_token(c, context, jnp.dtype(dtype).itemsize)
    seconds = flops_of_prefill(c, prompt, frames) / (tflops * 1e12)
    figures["bound"] = {"tokens_per_s": tokens, "prefill_s": seconds}
    for side in _sides(figures).values():
        side["of_bandwidth"] = side["tokens_per_s"] / tokens
        side["of_matrix_peak"] = seconds / (side["encoder_s"] + side["prefill_s"])


def _sides(figures: dict) -> dict:
    return {name: x for name, x in figures.items() if isinstance(x, dict) and "peak_gib" in x}


def markdown(figures: dict) -> str:
    """One clip's figures as a table; the ratio is to the best of the others."""
    sides = _sides(figures)
    names = [f"transformers, {name}" for name in sides if name != "ours"]
    lines = [
        f"| {figures['seconds']:g} s clip | {' | '.join(names)} | ours | ratio |",
        "|---" * (len(sides) + 2) + "|",
    ]

    def line(what: str, key: str, form: str, better=None):
        values = [side[key] for name, side in sides.items() if name != "ours"]
        mine = sides["ours"][key]
        ratio = {min: lambda: min(values) / mine, max: lambda: mine / max(values)}.get(better)
        cells = [format(value, form) for value in [*values, mine]]
        lines.append(f"| {what} | {' | '.join(cells)} | {f'{ratio():.2f}' if ratio else ''} |")

    line("first token, s", "first_token_s", ".3f", min)
    for stage in STAGES:
        line(f"of that {stage}, s", f"{stage}_s", ".3f", min)
    line("tokens/s", "tokens_per_s", ".1f", max)
    line("peak memory, GiB", "peak_gib", ".2f", min)
    line(f"tokens equal, of {figures['new_tokens']}", "tokens_equal", "d")
    if "bound" in figures:
        line("of the memory's bandwidth", "of_bandwidth", ".0%")
        line("of the matrix peak", "of_matrix_peak", ".0%")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    first, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="mid", choices=sorted(contestants.SIZES))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument(
        "--seconds", type=float, nargs="+", default=[5.0, 30.0], help="of the clips"
    )
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peak-tflops", type=float, help="of the GPU, dense, in this dtype")
    parser.add_argument("--bandwidth", type=float, help="of the GPU's memory, in TB/s")
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures to this file")
    options = parser.parse_args(arguments)
    if options.new_tokens < 2 or options.repeats < 1:
        parser.error("wanted at least 2 new tokens and 1 repeat")

    on_gpu = jax.default_backend() == "gpu"
    if on_gpu != torch.cuda.is_available():
        raise SystemExit(
            f"wanted jax and torch on the same device, got {jax.default_backend()} and "
            f"{'cuda' if torch.cuda.is_available() else 'cpu'}"
        )
    if not on_gpu:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    transformers.utils.logging.set_verbosity_error()
    where = contestants.machine()
    sizes = contestants.sizes_of(options.preset)
    ours, theirs = contestants.build(sizes, options.dtype, "cuda" if on_gpu else "cpu")
    held = sum(p.numel() * p.element_size() for p in theirs.parameters())
    results = []
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        World.named("small").write_tokenizer(folder, vocabulary=512)
        ours = Ours(ours, folder)
        ours.processor.save_pretrained(folder)
        attentions = ["sdpa"]
        if on_gpu and importlib.util.find_spec("flash_attn"):
            attentions.append("flash_attention_2")
        theirs = {name: Theirs(theirs, folder, name) for name in attentions}
        for seconds in options.seconds:
            figures = compare(
                {**theirs, "ours": ours},
                contestants.make_clip(seconds),
                new=options.new_tokens,
                repeats=options.repeats,
                held=held,
            )
            if peaks := peaks_of(where["device"], options):
                roofline(sizes, figures, options.dtype, *peaks)
            print(markdown(figures), end="\n\n", flush=True)
            results.append(figures)
    content = {"preset": options.preset, "dtype": options.dtype, **where, "clips": results}
    print(json.dumps(content, indent=2))
    if options.json:
        tables = [markdown(figures) for figures in results]
        contestants.save(options.json, content, f"{options.preset}, {options.dtype}", tables)


def peaks_of(device: str, options: argparse.Namespace) -> tuple[float, float] | None:
    """TFLOP/s and TB/s: what is given, else what is known of the device in bfloat16."""
    known = next((peaks for name, peaks in PEAKS.items() if name in device), (None, None))
    tflops = options.peak_tflops or (known[0] if options.dtype == "bfloat16" else None)
    bandwidth = options.bandwidth or known[1]
    return (tflops, bandwidth) if tflops and bandwidth else None


if __name__ == "__main__":
    main()
