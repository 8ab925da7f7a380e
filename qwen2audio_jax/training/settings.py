"""What a run is told: typed, saved beside it, and every field a flag of the programs."""

import dataclasses
import math
import os
import pathlib
import re
from collections.abc import Sequence
from dataclasses import field
from typing import Annotated, Literal

import jax
import tyro
from jax.sharding import Mesh

from qwen2audio_jax import sharding
from qwen2audio_jax.data.instruction import STYLES
from qwen2audio_jax.data.pack import Bucket
from qwen2audio_jax.data.sources import SUFFIX, shards
from qwen2audio_jax.flash import Attention
from qwen2audio_jax.remat import Policy
from qwen2audio_jax.training.lora import LoraConfig
from qwen2audio_jax.training.optimizer import ADJUSTABLE, OptimizerConfig
from qwen2audio_jax.training.preference import PreferenceConfig
from qwen2audio_jax.training.run import MAY_CHANGE

# Begin the names of sources that are made, and of those that tfds prepared.
WORLD, TFDS = "world:", "tfds:"
# Ends of the names of figures of what is held out, and which of them are better low.
LOW = ("loss", "wer", "nll", "ctc", "rejected_match")
HIGH = ("accuracy", "exact_match", "margins")
# A bucket as one word of the command line.
BUCKET = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="ROWSxTOKENS,CLIPSxFRAMES",
    instance_from_str=lambda words: Bucket.parse(words[0]),
    is_instance=lambda value: isinstance(value, Bucket),
    str_from_instance=lambda bucket: [str(bucket)],
)


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
        marks = {getattr(device, "slice_index", 0) for device in devices}
        dcn = self._filled("dcn", len(marks))
        slices = math.prod(dcn.values())
        return sharding.mesh(
            devices=devices, dcn=dcn, **self._filled("ici", len(devices) // slices)
        )

    def _filled(self, kind: str, devices: int) -> dict[str, int]:
        """Sizes by axis; the -1 among them is what the others leave of so many devices."""
        sizes = {axis: getattr(self, f"{kind}_{axis}_parallelism") for axis in sharding.AXES}
        free = [name for name, size in sizes.items() if size == -1]
        if len(free) > 1 or any(size < 1 for size in sizes.values() if size != -1):
            raise ValueError(f"wanted {kind} mesh sizes from 1, or a single -1, got {sizes}")
        if free:
            sizes[free[0]] = max(devices // -math.prod(sizes.values()), 1)
        return sizes


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

    def __post_init__(self):
        told = (self.coordinator, self.count, self.number)
        if any(x is None for x in told) and any(x is not None for x in told):
            raise ValueError(f"wanted hosts.coordinator, count and number, or none, got {told}")
        if self.count is not None and not 0 <= self.number < self.count:
            raise ValueError(f"wanted a hosts.number within 0..{self.count - 1}, got {self.number}")
        if self.timeout < 1:
            raise ValueError(f"wanted a hosts.timeout of at least 1 s, got {self.timeout}")


def _share_rows(one: str, other: str) -> bool:
    """Whether two sources are of the same file, and one of them is all of it or both one split."""
    if one.startswith(WORLD) or other.startswith(WORLD):
        return one == other
    (file, split), (other_file, other_split) = map(_file_and_split, (one, other))
    if _files(file).isdisjoint(_files(other_file)):
        return False
    (name, part, _), (other_name, other_part, _) = (s.partition("[") for s in (split, other_split))
    overlap = name == other_name and not (part and other_part)  # parts are the user's business
    return split == other_split or overlap or not split or not other_split


def _files(source: str) -> set[str]:
    """What a source is of, however it is written; of shards on this disk each."""
    of_shards = SUFFIX in source or os.path.isdir(source)
    found = shards(source) if of_shards and "://" not in source else []
    return {os.path.abspath(path) for path in found or [source]}


def _file_and_split(source: str) -> tuple[str, str]:
    found = re.fullmatch(r"(.+\.jsonl?)(?::([^:/]+))?", source)
    if found is None and source.startswith(TFDS):
        found = re.fullmatch(r"(tfds:[^:]+)(?::(.+))?", source)
    return (found[1], found[2] or "") if found else (source, "")


def each_of(sources: Sequence[str], words: Sequence[str], name: str = "words") -> tuple[str, ...]:
    """Lines or tags of sources: each has its own, all have one, or there are none.

    Raises:
      ValueError: there are more or fewer; the message says of what, by `name`.
    """
    if sources and len(words) not in (0, 1, len(sources)):
        raise ValueError(f"wanted {name} for {len(sources)} sources, got {len(words)}")
    return tuple(words) if len(words) == len(sources) else (*words, "")[:1] * len(sources)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is learned, and what is kept to measure it."""

    train: tuple[str, ...] = ()
    """Sources: rows.jsonl, rows.jsonl:SPLIT, ArrayRecord shards, tfds:name/config:split; or made
    sound, world:NAME/KIND, of which KIND may be `tasks`, all of them."""
    tasks: tuple[str, ...] = ()
    """A line for each source, or one for all: `[AUDIO:audio] What is said? -> [TEXT:text]`. With
    an empty one, or without any, rows are conversations, or pairs of answers to one."""
    style: Literal[STYLES] = "prompt"
    """How tasks are hinted at: in words, in tags (--data.tags), or not at all."""
    tags: tuple[str, ...] = ()
    """What says each line's task in --data.style tags, or one for all."""
    rate: int | None = None
    """Sampling rate of tfds: sources that state none; whatever states one keeps its own."""
    weights: tuple[float, ...] = ()
    """How often samples come from each source, relative to the others; without, all alike."""
    held_out: tuple[str, ...] = field(default=(), metadata=MAY_CHANGE)
    """Sources that are measured and never learned. A run may go on with others; its best checkpoint
    is then still the best of all, whatever each was measured with."""
    held_out_tasks: tuple[str, ...] = field(default=(), metadata=MAY_CHANGE)
    """Their lines; without, each has the line of --data.tasks with which another split of its file
    is learned, or the one that all have; what is made has its own."""
    held_out_tags: tuple[str, ...] = field(default=(), metadata=MAY_CHANGE)
    """Their tags; without, those of --data.tags, likewise."""
    buckets: tuple[Annotated[Bucket, BUCKET], ...] = (
        Bucket(rows=4, tokens=360, clips=8, frames=1000),
    )
    """The shapes of each feed's batches: rows of tokens, clips of mel frames (10 ms each). A sample
    goes to the first that it fits."""
    feeds: int = 0
    """Of which a global batch is made, each with samples of its own; a host has one or several, and
    a run can go on with as many hosts as divide them. 0: one for each host that it begins with."""
    pack: bool = True
    """Whether a row holds as many samples as fit."""
    augmented: float = 0.0
    """The part of the clips that is moved to other rooms, microphones, noises, speeds, levels."""
    masked: float = 0.0
    """The part of the clips that loses bands and spans (SpecAugment)."""
    workers: int = field(default=1, metadata=MAY_CHANGE)
    """Processes of each host that read, decode and draw: its feeds share them, and have at least
    one each; 0: a thread for each feed."""
    fatal: bool = field(default=False, metadata=MAY_CHANGE)
    """Whether a bad sample ends the run; else it is counted."""

    def __post_init__(self):
        if self.feeds < 0:
            raise ValueError(f"wanted feeds from 0, got {self.feeds}")
        if self.rate is not None and self.rate < 1:
            raise ValueError(f"wanted a sampling rate of at least 1, got {self.rate}")
        each_of(self.train, self.tasks, "tasks")
        each_of(self.train, self.tags, "tags")
        self._each_held_out("held_out_tasks", self.tasks)
        self._each_held_out("held_out_tags", self.tags)
        if self.train and len(self.weights) not in (0, len(self.train)):
            raise ValueError(
                f"wanted weights for {len(self.train)} sources, got {len(self.weights)}"
            )
        for source in self.held_out:
            for learned in self.train:
                if _share_rows(source, learned):
                    raise ValueError(
                        f"held_out {source} is learned, too: train has {learned}; name splits"
                    )
        for name in ("augmented", "masked"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"wanted {name} from 0 to 1, got {getattr(self, name)}")
        if self.workers < 0:
            raise ValueError(f"wanted workers from 0, got {self.workers}")

    @property
    def lines_held_out(self) -> tuple[str, ...]:
        """Of each source that is held out."""
        return self._each_held_out("held_out_tasks", self.tasks)

    @property
    def tags_held_out(self) -> tuple[str, ...]:
        """Likewise."""
        return self._each_held_out("held_out_tags", self.tags)

    def _each_held_out(self, name: str, learned: Sequence[str]) -> tuple[str, ...]:
        """Their own, or those of what is learned, of which what is made takes none."""
        if own := getattr(self, name):
            return each_of(self.held_out, own, name)
        if len(learned) > 1:
            both = zip(self.train, learned, strict=False)
            known = [(source, words) for source, words in both if not source.startswith(WORLD)]
        else:
            known = [("", words) for words in learned]
        return tuple(_words_of(source, known, name) for source in self.held_out)


def _words_of(source: str, known: Sequence[tuple[str, str]], name: str) -> str:
    """The words with which a source's file is learned, or those of all that is.

    Raises:
      ValueError: they differ, and none or several are of its file.
    """
    if source.startswith(WORLD):
        return ""
    words = {each for _, each in known}
    if len(words) > 1:  # a wrong prompt would be measured in silence
        files = _files(_file_and_split(source)[0])
        of_file = lambda other: not files.isdisjoint(_files(_file_and_split(other)[0]))
        words = {each for other, each in known if of_file(other)}
    if len(words) > 1 or (known and not words):
        kind, which = name.removeprefix("held_out_"), "several are" if words else "none is"
        raise ValueError(
            f"held_out {source}: wanted --data.held-out-{kind}, one for each that is held out: "
            f"those of --data.{kind} differ, and {which} of its file"
        )
    return next(iter(words), "")


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
    """The first and the last step to trace, for TensorBoard or xprof."""
    peak_tflops: float | None = None
    """What all devices could do, for MFU; None: what is known of them, in bfloat16."""

    def __post_init__(self):
        for name in ("save_every", "keep", "evaluate_every", "bad_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"wanted {name} of at least 1, got {getattr(self, name)}")
        if self.profile is not None and not 1 <= self.profile[0] <= self.profile[1]:
            raise ValueError(f"wanted a first and a last step to profile, got {self.profile}")
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
    """Ends of transformers' module names, or a regex for whole names, or "all-linear"; without,
    those of --lora.start, or all linear layers of the decoder."""
    start: str | None = field(default=None, metadata=MAY_CHANGE)
    """An adapter in PEFT's format to begin with, a folder or a hub id; what else is said of r,
    lora_alpha and target_modules has to agree."""

    def __post_init__(self):
        if self.start is None:
            for name in ("lora_alpha", "target_modules"):
                usual = getattr(LoraConfig, name)
                if getattr(self, name) is None:
                    object.__setattr__(self, name, usual)
                elif not self.r and getattr(self, name) != usual:
                    raise ValueError(f"lora.{name} is of no adapters: wanted lora.r too, got 0")
        if self.r:
            super().__post_init__()

    def like(self, theirs: LoraConfig) -> "Lora":
        """The same; what is not said is as in the adapters that are begun with."""
        nothing = {"r": 0, "lora_alpha": None, "target_modules": None}
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
    """Where it begins: tiny, a folder, or a hub id."""
    from_scratch: bool = False
    """Take the sizes and the words of --model, and random parameters."""
    ctc: float = 0.0
    """The weight of CTC, in which audio states alone spell the words of [AUDIO:clip,words=FIELD]:
    a model that starts from nothing learns to listen several times sooner."""
    seed: int = 0
    """Of parameters, order, augmentation and dropout."""
    data: DataConfig = DataConfig()
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
    """Of the parameters while they are trained."""
    remat_policy: Policy = field(default="none", metadata=MAY_CHANGE)
    """What blocks keep for the backward pass: all (none), nothing but their input (full), what
    matrices make (minimal) or some of it; offloaded ones keep it in the host's memory."""
    attention: Attention = field(default="autoselected", metadata=MAY_CHANGE)
    """flash never holds its scores, and is what autoselected takes on TPUs from 256 tokens on; on
    GPUs it is cuDNN's, in bfloat16, where it is asked for."""
    scan_layers: bool = True
    """Blocks as one stack, which compiles soon; as a list they run faster on a CPU."""
    distributed: bool = field(default=False, metadata=MAY_CHANGE)
    """Join the other hosts first; Cloud TPUs, GKE, SLURM and Open MPI say where they are."""
    hosts: HostsConfig = field(default=HostsConfig(), metadata=MAY_CHANGE)
    tensorboard: bool = field(default=True, metadata=MAY_CHANGE)
    """Whether to write events for TensorBoard too."""
    wandb: str | None = field(default=None, metadata=MAY_CHANGE)
    """A project at Weights & Biases to log to as well (extra: wandb)."""
    changing: tuple[str, ...] = field(default=(), metadata=MAY_CHANGE)
    """Settings that this run is to go on with otherwise, as optimizer.learning_rate after NaN,
    optimizer.steps for more of them, or data.train for the same rows in another place."""

    def __post_init__(self):
        known = [*(f"optimizer.{name}" for name in ADJUSTABLE), "data.train"]
        if wrong := [name for name in self.changing if name not in known]:
            raise ValueError(f"wanted changing of {', '.join(known)}, got {', '.join(wrong)}")
        if self.gradient_accumulation_steps < 1:
            steps = self.gradient_accumulation_steps
            raise ValueError(f"wanted gradient_accumulation_steps of at least 1, got {steps}")
        if self.ctc < 0:
            raise ValueError(f"wanted a weight of ctc from 0, got {self.ctc}")


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

    @property
    def keeps_reference(self) -> bool:
        """Whether the reference reads every batch of the training."""
        return self.preference.wants_reference and not self.precompute_ref_log_probs
