"""The table of what the 7b preset needs of pods: every row is compiled for its chips, here.

    python -m train.pods docs/pods.md                 # an hour of processors
    python -m train.pods docs/pods.md --only v5e      # those rows again; the others stay

Rows go to docs/pods.json as they come, so that a table that was interrupted goes on.
"""

import json
import pathlib
import subprocess
import sys

import tyro

from qwen2audio_jax.training.chips import GIB

# stage, topology, and what else train.compile is told
ROWS = (
    ("sft", "v5e:4x4", "--batch 32"),
    ("sft", "v5p:2x2x2", "--batch 64"),
    ("sft", "v6e:4x4", "--batch 64"),
    ("sft", "v5p:2x2x4", "--batch 128"),
    ("sft", "v5e:16x16", "--batch 512 --mesh.ici-data-parallelism 2"),
    ("sft", "v5p:4x8x8", "--batch 2048 --mesh.ici-data-parallelism 2"),
    ("sft", "v6e:16x16", "--batch 1024 --mesh.ici-data-parallelism 2"),
    ("pretrain", "v5e:4x4", "--batch 32"),
    ("dpo", "v5e:4x8", "--batch 32"),
    ("dpo-precomputed", "v5e:4x8", "--batch 32"),
    ("lora-sft", "v5e:2x4", "--batch 16"),
    ("prefill", "v5e:1x2", "--batch 1 --mesh.ici-tensor-parallelism 2"),
    ("decode", "v5e:1x2", "--batch 4 --tokens 2048 --mesh.ici-tensor-parallelism 2"),
    ("prefill", "v5p:1x1x1", "--batch 8"),
    ("decode", "v5p:1x1x1", "--batch 32 --tokens 2048"),
)
HEAD = (
    "| stage | chips | | memory | operations / model's | bound by | MFU at most | compiled in |",
    "|---|---|---|---|---|---|---|---|",
)


def main(out: pathlib.Path, only: str = "") -> None:
    """Compiles what is not yet known.

    Args:
      out: the table, in Markdown.
      only: rows with this in their stage or chips, known or not.
    """
    store = out.with_suffix(".json")
    known = json.loads(store.read_text()) if store.exists() else {}
    out.parent.mkdir(parents=True, exist_ok=True)
    for stage, chips, told in ROWS:
        name = f"{stage} {chips} {told}"
        if only not in name or (name in known and not only):
            continue
        print(name, file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "train.compile", "--json", "--stage", stage]
        done = subprocess.run(
            [*command, "--topology", chips, *told.split()], stdout=subprocess.PIPE, text=True
        )
        if done.returncode:
            raise SystemExit(f"train.pods: error: {name} ended with {done.returncode}")
        known[name] = json.loads(done.stdout)
        store.write_text(json.dumps(known, indent=1) + "\n")
    lines = [line(*row, known[" ".join(row)]) for row in ROWS if " ".join(row) in known]
    out.write_text("\n".join([*HEAD, *lines, ""]))


def line(stage: str, chips: str, told: str, found: dict) -> str:
    """A row of the table."""
    memory = f"{found['hbm_peak_bytes'] / GIB:.2f} of {found['hbm_chip_bytes'] / GIB:.2f} GiB"
    if not found["fits"]:
        return f"| {stage} | {chips} | `{told}` | **{memory}** | | does not fit | | |"
    return (
        f"| {stage} | {chips} | `{told}` | {memory} | {found['flops_ratio']:.3f} | "
        f"{found['limit']}, {found['step_s'] * 1e3:.0f} ms | {found['mfu_bound']:.0%} | "
        f"{found['compile_cpu_s']:.0f} s of processors |"
    )


if __name__ == "__main__":
    tyro.cli(main, prog="python -m train.pods", description=__doc__)
