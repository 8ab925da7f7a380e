"""How long a full-size checkpoint takes from Hugging Face's format to ours and back.

Example:

    python -m benchmarks.checkpoint --shards 16 --folder /scratch
    python -m benchmarks.checkpoint --preset tiny

Writes a checkpoint of random bfloat16 values, runs convert.from_hf and convert.to_hf, each in a
process of its own whose peak resident memory is measured, and compares the result bit by bit.
With --shards what lies between is stored in the parts of so many devices. The full size needs three
times 16.8 GB of disk; everything is deleted at the end.
"""

import argparse
import multiprocessing
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from importlib.metadata import version

import ml_dtypes
import numpy as np

from qwen2audio_jax import config
from qwen2audio_jax.weights import bar, huggingface, settings, table

ROOT = pathlib.Path(__file__).resolve().parent.parent
PERIOD = 2**26 + 1  # random values repeat after so many, from another place in each tensor


def write_random(folder: pathlib.Path, preset: str) -> None:
    """A checkpoint of the preset's sizes: the published model's names, shapes and shards."""
    sizes = config.preset(preset)
    values = np.random.default_rng(0).integers(0, 2**16, PERIOD, dtype=np.uint16)
    rows = {row.name: row for row in table.entries(sizes)}

    def read(name: str) -> np.ndarray:
        start = zlib.crc32(name.encode()) % PERIOD
        content = np.resize(values, rows[name].count + start)[start:]
        return content.reshape(rows[name].their_shape).view(ml_dtypes.bfloat16)

    dtype = np.dtype(ml_dtypes.bfloat16)
    layout = huggingface.plan((name, dtype, row.their_shape) for name, row in rows.items())
    folder.mkdir()
    settings.write(sizes, folder, "bfloat16")
    total = sum(row.count for row in rows.values()) * dtype.itemsize
    with bar("writing", total, sys.stderr.isatty()) as shown:
        huggingface.write(folder, layout, read, shown.update)


def run(program: str, source: pathlib.Path, target: pathlib.Path, *more: str) -> dict[str, float]:
    """Seconds and peak resident GiB of one conversion."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", program, str(source), str(target), "--quiet", *more], cwd=ROOT
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{program} ended with exit status {process.returncode}")
    kib = usage.ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return {"seconds": round(seconds, 1), "peak_gib": round(kib / 2**20, 3)}


def compare(before: pathlib.Path, after: pathlib.Path, preset: str) -> dict[str, object]:
    """Counts the tensors whose bits differ, and whether the files are laid out alike."""
    sizes = config.preset(preset)
    a, b = (huggingface.find(folder, sizes) for folder in (before, after))
    bits = lambda tensor: tensor.read().view(np.uint16)
    different = [n for n in a if a[n][2:] != b[n][2:] or not np.array_equal(bits(a[n]), bits(b[n]))]
    return {
        "tensors": len(a),
        "parameters": sum(int(np.prod(tensor.shape)) for tensor in a.values()),
        "files": len(huggingface.shards(before)),
        "gigabytes": round(sum(tensor.nbytes for tensor in a.values()) / 1e9, 3),
        "different_tensors": different,
        "same_layout": huggingface.layout(before) == huggingface.layout(after),
    }


def measure(preset: str, shards: int, folder: str | None) -> dict[str, object]:
    """Figures of the way there and back; what was written is gone afterwards."""
    work = pathlib.Path(tempfile.mkdtemp(prefix="checkpoint-", dir=folder))
    first, ours, back = (work / name for name in ("first", "ours", "back"))
    try:
        # in a process of its own: a child's peak counts from its parent's
        writer = multiprocessing.get_context("spawn").Process(
            target=write_random, args=(first, preset)
        )
        writer.start()
        writer.join()
        if writer.exitcode:
            raise SystemExit("the checkpoint could not be written")
        return {
            "preset": preset,
            "shards": shards,
            "from_hf": run("convert.from_hf", first, ours, "--shards", str(shards)),
            "to_hf": run("convert.to_hf", ours, back),
            **compare(first, back, preset),
        }
    finally:
        shutil.rmtree(work)


def markdown(figures: dict) -> str:
    lines = ["| | seconds | peak resident memory, GiB |", "|---|---|---|"]
    for program, name in (
        ("from_hf", f"`convert.from_hf --shards {figures['shards']}`"),
        ("to_hf", "`convert.to_hf`"),
    ):
        seconds, peak = (figures[program][key] for key in ("seconds", "peak_gib"))
        lines.append(f"| {name} | {seconds:.0f} | {peak:.2f} |")
    return "\n".join(lines)


def main() -> int:
    first, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="qwen2-audio-7b", choices=sorted(config.PRESETS))
    parser.add_argument("--shards", type=int, default=1, help="as convert.from_hf's (default: 1)")
    parser.add_argument("--folder", help="where to write (default: the system's temporary one)")
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures to this file")
    options = parser.parse_args()
    figures = measure(options.preset, options.shards, options.folder)
    good = not figures["different_tensors"] and figures["same_layout"]
    about = (
        f"{options.preset}, {figures['tensors']} tensors, {figures['parameters']} parameters, "
        f"{figures['gigabytes']} GB bfloat16 in {figures['files']} files, there and back: "
        f"{'identical bits' if good else 'not the same'}"
    )
    print(f"{about}\n\n{markdown(figures)}")
    if not good:
        print("different:", ", ".join(figures["different_tensors"]) or "the order in the files")
    if options.json:
        from benchmarks import sides  # only now: what it imports would count in the peaks

        versions = {name: version(name) for name in ("orbax-checkpoint", "tensorstore", "numpy")}
        where = sides.machine()
        where["versions"] |= versions
        sides.save(options.json, where | figures, about, [markdown(figures)])
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
