"""How long a full-size checkpoint takes from Hugging Face's format to ours and back.

Example:

    python benchmarks/checkpoint.py --folder /scratch
    python benchmarks/checkpoint.py --preset tiny

Writes a checkpoint of random bfloat16 values, runs convert.from_hf and convert.to_hf, each in a
process of its own whose peak resident memory is measured, and compares the result bit by bit.
The full size needs three times 16.8 GB of disk; everything is deleted at the end.
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import platform
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


def run(program: str, source: pathlib.Path, target: pathlib.Path) -> dict[str, float]:
    """Seconds and peak resident GiB of one conversion."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", program, str(source), str(target), "--quiet"], cwd=ROOT
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
        "shards": len(huggingface.shards(before)),
        "gigabytes": round(sum(tensor.nbytes for tensor in a.values()) / 1e9, 3),
        "different_tensors": different,
        "same_layout": huggingface.layout(before) == huggingface.layout(after),
    }


def main() -> int:
    first, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="qwen2-audio-7b", choices=sorted(config.PRESETS))
    parser.add_argument("--folder", help="where to write (default: the system's temporary one)")
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures to this file")
    options = parser.parse_args()
    work = pathlib.Path(tempfile.mkdtemp(prefix="checkpoint-", dir=options.folder))
    first, ours, back = (work / name for name in ("first", "ours", "back"))
    try:
        # in a process of its own: a child's peak counts from its parent's
        writer = multiprocessing.get_context("spawn").Process(
            target=write_random, args=(first, options.preset)
        )
        writer.start()
        writer.join()
        if writer.exitcode:
            raise SystemExit("the checkpoint could not be written")
        figures = {
            "preset": options.preset,
            "from_hf": run("convert.from_hf", first, ours),
            "to_hf": run("convert.to_hf", ours, back),
            **compare(first, back, options.preset),
            "cores": os.cpu_count(),
            "machine": platform.machine(),
            "date": time.strftime("%Y-%m-%d"),
            "versions": {name: version(name) for name in ("jax", "orbax-checkpoint", "numpy")},
        }
    finally:
        shutil.rmtree(work)
    print(f"{options.preset}: {figures['tensors']} tensors, {figures['parameters']} parameters,")
    print(f"{figures['gigabytes']} GB bfloat16 in {figures['shards']} files\n")
    print(f"{'':<10} {'seconds':>8} {'peak GiB':>9}")
    for program in ("from_hf", "to_hf"):
        print(f"{program:<10} {figures[program]['seconds']:8} {figures[program]['peak_gib']:9}")
    good = not figures["different_tensors"] and figures["same_layout"]
    print(f"\nround trip: {'identical bits' if good else figures['different_tensors']}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
