"""How long the full-size step is compiled at a first start, and how long at the second.

    python -m benchmarks.restart --out benchmarks/results/restart.json

A process compiles a preset's step, of shapes alone, for so many devices of a CPU, and keeps it in a
folder; another finds it there, as a run of training does that is started again. TPUs' own compiler
keeps programs in the same way, but finds them only where there are TPUs.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from train import command

ROOT = pathlib.Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restart:
    """What is compiled twice."""

    model: str = "qwen2-audio-7b"
    """A preset's name."""
    devices: int = 16
    """Of a CPU, over which all is spread."""
    tokens: int = 1024
    """Of each of as many rows."""
    out: pathlib.Path | None = None
    """Where the figures go, as JSON."""


def start(given: Restart) -> dict[str, float]:
    """Lowers and compiles the step, as the first thing of this process."""
    import jax

    jax.config.update("jax_num_cpu_devices", given.devices)
    from qwen2audio_jax import compilation_cache, config, sharding
    from qwen2audio_jax.training import topology

    compilation_cache.keep()
    mesh = sharding.mesh(fsdp=given.devices)
    settings = topology.settings_of("sft", dtype="bfloat16", remat_policy="full")
    work = topology.Work(batch=given.devices, tokens=given.tokens)
    began = time.perf_counter()
    lowered = topology.lower("sft", config.preset(given.model), work, settings, mesh)
    known = time.perf_counter()
    lowered.program.compile()
    return {"lower_s": known - began, "compile_s": time.perf_counter() - known}


def main(given: Restart) -> None:
    """Starts twice with one folder for programs."""
    from benchmarks import sides  # with torch and transformers, which a start does without

    with tempfile.TemporaryDirectory() as folder:
        told = [json.dumps(dataclasses.asdict(dataclasses.replace(given, out=None)))]
        env = {**os.environ, "QWEN2AUDIO_CACHE": folder, "JAX_PLATFORMS": "cpu"}
        child = [sys.executable, "-m", "benchmarks.restart", "--child", *told]
        run = lambda: subprocess.run(child, cwd=ROOT, env=env, stdout=subprocess.PIPE, check=True)
        first, second = (json.loads(run().stdout) for _ in range(2))
    known = {"model": given.model, "devices": given.devices, "first": first, "second": second}
    known["times_faster"] = first["compile_s"] / second["compile_s"]
    print(json.dumps(known, indent=1))
    if given.out:
        about = f"The step of {given.model} for {given.devices} devices of a CPU, compiled"
        rows = [
            f"| {name} | {each['lower_s']:.1f} | {each['compile_s']:.1f} |"
            for name, each in (("first", first), ("second", second))
        ]
        table = ["| start | lowered in, s | compiled in, s |", "|---|---|---|", *rows]
        table += ["", f"The second is {known['times_faster']:.0f} times faster (aim: 5)."]
        sides.save(given.out, {**sides.machine(), **known}, about, ["\n".join(table)])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(start(Restart(**json.loads(sys.argv[2])))))
    else:
        command.run(main, Restart, "benchmarks.restart", __doc__)
