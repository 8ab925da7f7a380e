"""What a run is told: typed, saved beside it, and every field a flag of the programs."""

import dataclasses
import math
import pathlib
import re
from collections.abc import Sequence
from dataclasses import field
from typing import Literal

import jax
from jax.sharding import Mesh

from qwen2audio_jax import sharding
from qwen2audio_jax.flash import Attention
from qwen2audio_jax.remat import Policy
from qwen2audio_jax.training.data_config import DataConfig
from qwen2audio_jax.training.lora import LoraConfig
from qwen2audio_jax.training.optimizer import ADJUSTABLE, OptimizerConfig
from qwen2audio_jax.training.preference import PreferenceConfig
from qwen2audio_jax.training.run import MAY_CHANGE

# Ends of the names of figures of what is held out, and which of them are better low.
LOW = ("loss", "wer", "nll", "ctc", "rejected_match")
HIGH = ("accuracy", "exact_match", "margins")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How devices share the work; one of the sizes may be -1, which is what the others leave."""

    ici_data_parallelism: int = 1
    """Copies of the model, each with its own rows of the batch."""
    ici_fsdp_parallelism: int = -1
    """Devices over which each copy is spread, which have rows of their own too."""
    ici_tensor_parallelism: int = 1
    """Devices that share each row by heads and hidden units."""
    ici_context_parallelism: int = 1
    """Devices that share each row by its tokens, for long ones."""
    dcn_data_parallelism: int = 1
    """Slices, joined by a network rather than by their chips' own links, with rows of their own;
    -1: as many as there are."""
    dcn_fsdp_parallelism: int = 1
    """Slices over which each copy is spread too."""
    dcn_tensor_parallelism: int = 1
    """Slices that share heads and hidden units: slow."""
    dcn_context_parallelism: int = 1
    """Slices that share each row by its tokens: slow."""
    show: bool = False
    """Print what each device holds, before the first step."""

    def make(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """The mesh over all devices there are, or over these.

        Raises:
          ValueError: the sizes do not multiply to their number.
        """
        devices = jax.devices() if devices is None else devices
        ici, dcn = self._sizes(devices)
        return sharding.mesh(devices=devices, dcn=dcn, **ici)

    def settled(self, devices: Sequence[jax.Device]) -> "MeshConfig":
        """The same for these devices, with numbers in the place of -1; fsdp may stay so."""
        ici, dcn = self._sizes(devices)
        if self.ici_fsdp_parallelism == -1:
            ici["fsdp"] = -1
        sizes = {
            f"{kind}_{axis}_parallelism": n
            for kind, each in (("dcn", dcn), ("ici", ici))
            for axis, n in each.items()
        }
        return dataclasses.replace(self, **sizes)

    def _sizes(self, devices: Sequence[jax.Device]) -> tuple[dict[str, int], dict[str, int]]:
        """Of the axes within slices, and over them."""
        slices = {getattr(device, "slice_index", 0) for device in devices}
        dcn = self._filled("dcn", len(slices))
        return self._filled("ici", len(devices) // math.prod(dcn.values())), dcn

    def _filled(self, kind: str, devices: int) -> dict[str, int]:
        """Sizes by axis; the -1 among them is what the others leave of so many devices."""
        sizes = {axis: getattr(self, f"{kind}_{axis}_parallelism") for axis in sharding.AXES}
        free = [name for name, size in sizes.items() if size == -1]
        if len(free) > 1 or any(size < 1 for size in sizes.values() if size != -1):
            raise ValueError(f"wanted {kind} mesh sizes from 1, or a single -1, got {sizes}")
        if free:
            sizes[free[0]] = max(devices // -math.prod(sizes.values()), 1)
        return sizes


SHORTEST_TIMEOUT = 10  # some signs of life, which come every other second


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostsConfig:
    """Where no cluster says it: how this process finds the others, which run the same command."""

    coordinator: str | None = None
    """Where the process of number 0 is, host:port."""
    count: int | None = None
    """How many processes there are."""
    number: int | None = None
    """Which of them this is, from 0."""
    timeout: int = 60
    """Seconds without a sign of life after which a process counts as dead, and all end."""
    meeting: int = 300
    """Seconds that the first process waits for the last to come."""

    def __post_init__(self):
        told = (self.coordinator, self.count, self.number)
        if any(x is None for x in told) and any(x is not None for x in told):
            raise ValueError(f"wanted hosts.coordinator, count and number, or none, got {told}")
        if self.count is not None and not 0 <= self.number < self.count:
            raise ValueError(f"wanted a hosts.number within 0..{self.count - 1}, got {self.number}")
        if self.timeout < SHORTEST_TIMEOUT:
            raise ValueError(
                f"wanted a hosts.timeout of at least {SHORTEST_TIMEOUT} s, got {self.timeout}"
            )
        if self.meeting < 1:
            raise ValueError(f"wanted a hosts.meeting of at least 1 s, got {self.meeting}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How what is held out is measured."""

    samples: int = field(default=200, metadata=MAY_CHANGE)
    """At most so many of each source, drawn once."""
    rows: int = field(default=20, metadata=MAY_CHANGE)
    """Prompts that are answered at the same time."""
    max_new_tokens: int = field(default=64, metadata=MAY_CHANGE)
    """The longest answer."""

    def __post_init__(self):
        for name in ("samples", "rows", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"wanted {name} of at least 1, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What happens beside the steps."""

    save_every: int = 1000
    """Steps between checkpoints; there is one at the end, too."""
    keep: int = 3
    """How many of the latest checkpoints stay, beside the best one."""
    evaluate_every: int = 1000
    """Steps between evaluations, each with a checkpoint; there is one at the end, too."""
    evaluate_first: bool = False
    """Whether to measure what is held out before the first step, too."""
    best: str = "wer"
    """The figure whose best checkpoint stays: loss, wer, nll, ctc, rejected_match (best low),
    accuracy, exact_match, rewards/margins; or one source's, as SOURCE/exact_match."""
    bad_steps: int = 10
    """Steps in a row without a finite gradient, after which the run stops."""
    profile: tuple[int, int] | None = None
    """The first and the last step to trace, for TensorBoard or xprof; of a run that goes on behind
    the first of them, those that are left."""
    peak_tflops: float | None = None
    """What all devices could do, for MFU; None: what is known of them, in bfloat16."""

    def __post_init__(self):
        for name in ("save_every", "keep", "evaluate_every", "bad_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"wanted {name} of at least 1, got {getattr(self, name)}")
        if self.profile is not None and not 1 <= self.profile[0] <= self.profile[1]:
            raise ValueError(f"wanted a first and a last step to profile, got {self.profile}")
        if self.peak_tflops is not None and not 0 < self.peak_tflops < math.inf:
            raise ValueError(f"wanted peak_tflops above 0, got {self.peak_tflops}")
        if not self.best.endswith((*LOW, *HIGH)):
            raise ValueError(
                f"wanted a best of {', '.join((*LOW, *HIGH))}, of all that is held out or of "
                f"SOURCE/, got {self.best!r}"
            )

    @property
    def mode(self) -> str:
        return "min" if self.best.endswith(LOW) else "max"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora(LoraConfig):
    """Narrow matrices that are learned beside the parameters, or nothing."""

    r: int = 0
    """Width of the narrow matrices; 0: that of --lora.start or, without it, the parameters
    themselves are trained."""
    lora_alpha: int | None = None
    """What the adapters add is scaled by lora_alpha / r; without, that of --lora.start, or 32."""
    target_modules: str | tuple[str, ...] | None = None
    """Ends of transformers' module names, as q_proj, or a regex for whole names, or "all-linear";
    without, those of --lora.start, or all linear layers of the decoder."""
    modules_to_save: tuple[str, ...] | None = None
    """Ends of transformers' names of modules that train whole beside the adapters, outside of the
    blocks: multi_modal_projector; without, those of --lora.start, or none."""
    start: str | None = field(default=None, metadata=MAY_CHANGE)
    """An adapter in PEFT's format to begin with, a folder or a hub id; what else is said of r,
    lora_alpha, target_modules and modules_to_save has to agree."""

    def __post_init__(self):
        word = self.target_modules
        if isinstance(word, str) and re.fullmatch(r"\w+", word):  # to PEFT a regex of no module
            object.__setattr__(self, "target_modules", (word,))
        if not self.r and self.start is None and self.lora_dropout:
            raise ValueError("lora.lora_dropout is of no adapters: wanted lora.r too, got 0")
        if self.start is None:
            for name in ("lora_alpha", "target_modules", "modules_to_save"):
                usual = getattr(LoraConfig, name)
                if getattr(self, name) is None:
                    object.__setattr__(self, name, usual)
                elif not self.r and getattr(self, name) != usual:
                    raise ValueError(f"lora.{name} is of no adapters: wanted lora.r too, got 0")
        if self.r:
            super().__post_init__()

    def like(self, theirs: LoraConfig) -> "Lora":
        """The same; what is not said is as in the adapters that are begun with."""
        nothing = {"r": 0, "lora_alpha": None, "target_modules": None, "modules_to_save": None}
        left = {n: getattr(theirs, n) for n, none in nothing.items() if getattr(self, n) == none}
        return dataclasses.replace(self, **left)

    @property
    def config(self) -> LoraConfig | None:
        """What PEFT knows of it; None: nothing is adapted.

        Raises:
          ValueError: there is a start, and nobody has said yet what it is `like`.
        """
        if not self.r and self.start is not None:
            raise ValueError(f"wanted lora.r beside lora.start {self.start}, got 0")
        said = {each.name: getattr(self, each.name) for each in dataclasses.fields(LoraConfig)}
        said = {name: value for name, value in said.items() if value is not None}
        return LoraConfig(**said) if self.r else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """A run of pretraining or SFT."""

    out: pathlib.Path = field(default=pathlib.Path("runs/train"), metadata=MAY_CHANGE)
    """The run's folder, on a disk that all hosts see; one that holds a run goes on with it."""
    model: str = field(default="tiny", metadata=MAY_CHANGE)
    """Where it begins: tiny, a folder, or a hub id; a run that goes on wants the same model, which
    may lie elsewhere."""
    from_scratch: bool = False
    """Take the sizes and the words of --model, and random parameters."""
    ctc: float = 0.0
    """The weight of CTC, in which audio states alone spell the words of [AUDIO:clip,words=FIELD]:
    a model that starts from nothing learns to listen several times sooner."""
    seed: int = 0
    """Of parameters, order, augmentation and dropout."""
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: Lora = Lora()
    loop: LoopConfig = field(default=LoopConfig(), metadata=MAY_CHANGE)
    evaluation: EvaluationConfig = EvaluationConfig()
    mesh: MeshConfig = field(default=MeshConfig(), metadata=MAY_CHANGE)
    gradient_accumulation_steps: int = 1
    """Batches that make up a step."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the arithmetic, and of the model that comes out."""
    weight_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the parameters while they are trained. Those of bfloat16 are rounded up or down by chance:
    most steps are less than half of their last bit."""
    remat_policy: Policy = field(default="none", metadata=MAY_CHANGE)
    """What blocks keep for the backward pass: all (none), nothing but their input (full), what
    matrices make (minimal) or some of it; offloaded ones keep it in the host's memory."""
    attention: Attention = field(default="autoselected", metadata=MAY_CHANGE)
    """flash never holds its scores, and is what autoselected takes from 256 tokens on: on TPUs, and
    in bfloat16 on GPUs, where it is cuDNN's, which holds a mask of a decoder's rows, [B L L]."""
    scan_layers: bool = True
    """Blocks as one stack, which compiles soon; as a list they run faster on a CPU."""
    distributed: bool = field(default=False, metadata=MAY_CHANGE)
    """Join the other hosts first; Cloud TPUs, GKE, SLURM and Open MPI 4 say where they are."""
    hosts: HostsConfig = field(default=HostsConfig(), metadata=MAY_CHANGE)
    tensorboard: bool = field(default=True, metadata=MAY_CHANGE)
    """Whether to write events for TensorBoard too."""
    wandb: str | None = field(default=None, metadata=MAY_CHANGE)
    """A project at Weights & Biases to log to as well (extra: wandb)."""
    changing: tuple[str, ...] = field(default=(), metadata=MAY_CHANGE)
    """Settings that this run is to go on with otherwise, as optimizer.learning_rate after NaN,
    optimizer.steps for more of them, or data.train for the same rows in another place."""

    def __post_init__(self):
        if wrong := [name for name in self.changing if name not in self.changeable]:
            known = ", ".join(self.changeable)
            raise ValueError(f"wanted changing of {known}, got {', '.join(wrong)}")
        if self.gradient_accumulation_steps < 1:
            steps = self.gradient_accumulation_steps
            raise ValueError(f"wanted gradient_accumulation_steps of at least 1, got {steps}")
        if not 0 <= self.ctc < math.inf:
            raise ValueError(f"wanted a weight of ctc from 0, got {self.ctc}")
        if self.loop.profile is not None and self.loop.profile[1] > self.optimizer.steps:
            raise ValueError(
                f"wanted loop.profile within the {self.optimizer.steps} steps, "
                f"got {self.loop.profile}"
            )

    @property
    def changeable(self) -> tuple[str, ...]:
        """What `changing` may name."""
        return (*(f"optimizer.{name}" for name in ADJUSTABLE), "data.train")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceSettings(Settings):
    """A run of DPO or its kin."""

    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    precompute_ref_log_probs: bool = False
    """Let the reference answer once, before the training, rather than keep it in memory; rows that
    have ref_chosen_logps and ref_rejected_logps already are taken as they are."""

    def __post_init__(self):
        super().__post_init__()
        if self.ctc:
            raise ValueError("ctc is for pretraining and SFT; pairs of answers are learned without")
        if self.precompute_ref_log_probs and not self.preference.wants_reference:
            raise ValueError("without a reference there is no precompute_ref_log_probs")

    @property
    def keeps_reference(self) -> bool:
        """Whether the reference reads every batch of the training."""
        return self.preference.wants_reference and not self.precompute_ref_log_probs
