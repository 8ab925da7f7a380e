"""Compiles a step for TPUs that are not here, and says what it needs of each.

    python -m train.compile --stage sft --model qwen2-audio-7b --topology v5e:4x4 --batch 32
    python -m train.compile --stage lora-sft --topology v5e:2x4 --batch 16 --json
    python -m train.compile --stage decode --topology v5p:1x1x1 --batch 8 --tokens 2048
    python -m train.compile --stage sft --topology v5e:4x4 --search

It is the very step of training, or of generation, for the real compiler, of shapes alone: memory
against the chip's, operations against the model's own, bytes moved, and the time that the chip's
peak rates leave. A step that does not fit is told with its largest arrays and with what to change.
The compiler is an extra: pip install 'qwen2audio_jax[tpu]'.
"""

import contextlib
import dataclasses
import json
import pathlib
import sys
from dataclasses import field

import jax
from jax.sharding import Mesh

from qwen2audio_jax import compilation_cache, config, flash, remat
from qwen2audio_jax.training import compiled, saved, topology
from qwen2audio_jax.training.advice import advice, given_of
from qwen2audio_jax.training.chips import GIB
from qwen2audio_jax.training.optimizer import OptimizerConfig
from qwen2audio_jax.training.placement import activations, table
from qwen2audio_jax.training.search import Trial, search
from qwen2audio_jax.training.settings import Lora, MeshConfig
from train import command

# What a stage of generation would ignore.
OF_TRAINING = ("gradient_accumulation_steps", "remat_policy", "optimizer", "ctc", "weight_dtype")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compile(topology.Work):
    """What is compiled, and for what."""

    stage: topology.Stage = "sft"
    """Of training or of generation; dpo-precomputed has the reference's answers in its data."""
    model: str = "qwen2-audio-7b"
    """A preset's name."""
    topology: str = "v5e:4x4"
    """Chips: v4, v5e, v5p, v6e or 7x, and how many along each axis."""
    slices: int = 1
    """How many of these, joined by a network; --mesh.dcn-data-parallelism says what they share."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    remat_policy: remat.Policy = "full"
    """As in training."""
    attention: flash.Attention = "autoselected"
    """As in training."""
    gradient_accumulation_steps: int = 1
    """As in training."""
    scan_layers: bool = True
    """As in training; generation has a list of blocks."""
    weight_dtype: str | None = None
    """As in training; without, bfloat16 for LoRA, else float32."""
    ctc: float = 0.0
    """As in training: of a model that begins from nothing."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    compiler_options: tuple[str, ...] = ()
    """For XLA, each NAME=VALUE; a run has them by LIBTPU_INIT_ARGS=--NAME=VALUE."""
    lora: Lora = field(default_factory=Lora)
    """As in training, of a stage that has adapters; lora-sft has some of r 8 without."""
    search: bool = False
    """Look for the batch, the remat policy and the mesh that are fastest, from those given on; each
    program that is tried is compiled, and told."""
    json: bool = False
    """Print one JSON object."""
    hlo: pathlib.Path | None = None
    """Write the compiled program's text there, to be read by hand."""
    save: pathlib.Path | None = None
    """Write the compiled program there, for qwen2audio_jax.training.saved.load on such chips."""

    def __post_init__(self):
        super().__post_init__()
        if self.search and (self.save or self.hlo):
            raise ValueError("--save and --hlo are of one program: wanted them without --search")
        if self.stage in topology.GENERATION:
            usual = Compile()
            said = [name for name in OF_TRAINING if getattr(self, name) != getattr(usual, name)]
            if said:
                flags = ", ".join(f"--{name.replace('_', '-')}" for name in said)
                raise ValueError(f"wanted a stage of training with {flags}, got {self.stage}")


def main(given: Compile) -> None:
    where = topology.describe(given.topology, slices=given.slices)
    if given.search:
        given, trials = dataclasses.replace(given, mesh=given.mesh.settled(where.devices)), []
        measure = lambda one: compiled.compile(lower(one, where), where, one.compiler_options)[0]
        for trial in search(given, measure, len(where.devices)):
            print(line(trial), file=sys.stderr, flush=True)
            trials.append(trial)
        best = max(trials, key=lambda trial: trial.rank)
        given, report = best.given, best.report
        if report is None:
            raise ValueError(f"{given.stage} on {given.topology}: nothing divides; {best.why}")
        mesh = given.mesh.make(where.devices)
    else:
        lowered = lower(given, where)
        if given.mesh.show:
            print(table(lowered.held), activations(lowered.mesh), sep="\n", file=sys.stderr)
        with compilation_cache.anew() if given.save else contextlib.nullcontext():
            report, program = compiled.compile(lowered, where, given.compiler_options)
        mesh = lowered.mesh
        if program is not None:
            write(given, program)
    if given.json:
        print(json.dumps(as_json(given, report, mesh)))
    else:
        print("\n".join(told(given, report, mesh)))


def write(given: Compile, program: jax.stages.Compiled) -> None:
    """What is to be kept of a program."""
    if given.hlo:
        given.hlo.write_text(program.as_text())
    if given.save:
        size = saved.save(program, given.save)
        print(f"{given.save}: {size / 2**20:.0f} MiB", file=sys.stderr)


def lower(given: Compile, where: topology.Topology) -> topology.Lowered:
    """The program that is asked for."""
    mesh = given.mesh.make(where.devices)
    how = {} if given.weight_dtype is None else {"weight_dtype": given.weight_dtype}
    settings = topology.settings_of(
        given.stage,
        dtype="bfloat16",
        remat_policy=given.remat_policy,
        attention=given.attention,
        optimizer=given.optimizer,
        gradient_accumulation_steps=given.gradient_accumulation_steps,
        scan_layers=given.scan_layers,
        ctc=given.ctc,
        lora=given.lora,
        **how,
    )
    return topology.lower(given.stage, config.preset(given.model), given, settings, mesh)


def as_json(given: Compile, report: compiled.Report, mesh: Mesh) -> dict:
    """A report, what it is of, and where it does not fit, what to change."""
    return report.as_json() | {
        "given": given_of(given, mesh),
        "advice": advice(given, report, mesh),
    }


def line(trial: Trial) -> str:
    """One program of a search."""
    given, report, usual = trial.given, trial.report, MeshConfig()
    sizes = {k: v for k, v in vars(given.mesh).items() if v != getattr(usual, k)}
    mesh = " ".join(f"{k.removesuffix('_parallelism')} {v}" for k, v in sizes.items())
    name = f"batch {given.batch:5}  {given.remat_policy:20} {mesh or 'fsdp':24}"
    if report is None:
        return f"{name} {trial.why}"
    memory = f"{report.hbm_peak_bytes / GIB:7.2f} GiB"
    if not report.fits:
        return f"{name} {memory}, does not fit"
    speed = f"{trial.rate:8.2f} rows/s, MFU {report.mfu_bound:.1%} by {report.limit}"
    return f"{name} {memory} {speed}"


def told(given: Compile, report: compiled.Report, mesh: Mesh) -> list[str]:
    """A report in words."""
    gib, ms = (lambda x: f"{x / GIB:.2f} GiB"), (lambda s: f"{s * 1e3:.1f} ms")
    lines = [
        f"{given.stage} of {given.model} on {given.topology}, {given.batch} rows of "
        f"{given.tokens} tokens; of each of {report.devices} devices:",
        f"  memory       {gib(report.hbm_peak_bytes)} of {gib(report.hbm_chip_bytes)}",
    ]
    if not report.fits:
        return [
            *(line.replace("memory ", "needs  ") for line in lines),
            f"  lacks        {gib(report.hbm_peak_bytes - report.hbm_chip_bytes)}",
            *(f"  largest      {each}" for each in report.largest),
            *(f"  held         {gib(size)}: {what}" for what, size in report.held.items()),
            f"  ahead        {gib(report.ahead_bytes)}: the next step's batch",
            *(f"  try          {each}" for each in advice(given, report, mesh)),
        ]
    lines += [
        f"  held         {gib(report.argument_bytes)} between steps",
        f"  operations   {report.flops:.4g}, {report.flops_ratio:.3f} times the model's own",
        f"  moved        {gib(report.hbm_bytes)} from and to memory",
        *(
            f"  {kind:<12} {each['count']:.0f} times, {gib(each['bytes'])}"
            for kind, each in report.collectives.items()
        ),
        *(f"  {name:<12} {ms(s)} at the peak" for name, s in report.seconds.items() if s),
        f"  bound        {ms(report.step_s)} by {report.limit}, if it hides all else: MFU "
        f"{report.mfu_bound:.1%} at most",
        f"  one by one   {ms(report.serial_s)}, if nothing is hidden: MFU {report.serial_mfu:.1%}; "
        f"the program waits for {ms(report.links_exposed)} of links",
        f"  compiled     in {report.compile_s} s ({report.compile_cpu_s} s of processors), with "
        f"{gib(report.process_peak_bytes)}",
    ]
    return lines


if __name__ == "__main__":
    command.run(main, Compile, "train.compile", __doc__)
