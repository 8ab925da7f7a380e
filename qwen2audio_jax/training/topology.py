"""A pod that is not here: the programs of training and generation, compiled for it ahead of time.

`jax.experimental.topologies` describes TPUs to the compiler of the `libtpu` wheel, which runs on
any Linux machine. Nothing is allocated: models, states and batches are shapes with places.
"""

import dataclasses
import importlib.util
import math
import os
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from qwen2audio_jax import cache as caches
from qwen2audio_jax import config, flash, processor, programs, sharding
from qwen2audio_jax.data.pack import most_words
from qwen2audio_jax.generate import GREEDY, SHORTEST_CACHE, bucket
from qwen2audio_jax.mel import audio_tokens
from qwen2audio_jax.model import Qwen2Audio
from qwen2audio_jax.sampling import rules_for
from qwen2audio_jax.training import flops, placement
from qwen2audio_jax.training.chips import CHIPS, Chip
from qwen2audio_jax.training.lora import LoraConfig
from qwen2audio_jax.training.loss import SPELT, chunk_size
from qwen2audio_jax.training.objective import learner_of
from qwen2audio_jax.training.settings import Lora, PreferenceSettings, Settings

GENERATION = ("prefill", "decode")
ADAPTED = ("lora-sft", "dpo", "dpo-precomputed")  # stages that may have adapters
STAGES = ("pretrain", "sft", "dpo", "lora-sft", "dpo-precomputed", *GENERATION)
Stage = Literal[STAGES]

# What the library asks of a machine with TPUs and of the cloud that it is in; here is neither.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compilers do not contend for a device
}
# As jax drives them: both cores of a v4 chip are one device. Others are so of themselves, or, 7x,
# have two.
CHIP_CONFIGS = {"v4": "megacore"}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips and how they are joined.

    Attributes:
      shape: chips along each axis.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    devices: list[jax.Device]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What a program is compiled for: rows in all, and what each holds."""

    batch: int = 32
    """Rows, of all devices and of all parts of a step; pairs, in DPO."""
    tokens: int = 1024
    """Of a row, what is heard included; in decoding, slots of the cache."""
    clips: int = 1
    """Of a row."""
    frames: int = 3000
    """Of a clip, each 10 ms."""

    def __post_init__(self):
        for name in ("batch", "tokens", "clips", "frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"wanted {name} of at least 1, got {getattr(self, name)}")

    def arrays(
        self, c: config.Config, stage: str, parts: int = 1, *, words: bool = False
    ) -> dict[str, np.ndarray]:
        """A batch in which every row is full, and all is learned that is not heard.

        Args:
          words: whether it has what is said in each clip, for CTC, as many words as there may be.

        Raises:
          ValueError: rows are too short for their clips, or do not make up the parts.
        """
        heard = self.clips * audio_tokens(self.frames)
        if heard >= self.tokens:
            raise ValueError(
                f"wanted rows of more than the {heard} tokens of their clips, got {self.tokens}"
            )
        if self.batch % parts:
            raise ValueError(f"{self.batch} rows do not make up {parts} parts of a step")
        ids = np.full((self.batch, self.tokens), c.pad_token, np.int32)
        ids[:, :heard] = c.audio_token
        labels = np.where(ids == c.audio_token, processor.IGNORED, ids).astype(np.int32)
        clips = self.batch * self.clips
        sound = {
            "input_features": np.broadcast_to(np.float32(0), (clips, c.encoder.mels, self.frames)),
            "feature_attention_mask": np.broadcast_to(np.int32(1), (clips, self.frames)),
        }
        text = {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": labels}
        if stage.startswith("dpo"):
            text = {f"{side}_{k}": x for side in ("chosen", "rejected") for k, x in text.items()}
        else:
            text["segment_ids"] = np.ones_like(ids)
        if words:
            sound["words"] = np.zeros((clips, most_words(self.frames)), np.int32)
        if stage == "dpo-precomputed":
            known = np.zeros(self.batch, np.float32)
            text |= {"ref_chosen_logps": known, "ref_rejected_logps": known}
        if parts == 1:
            return text | sound
        return {k: x.reshape(parts, -1, *x.shape[1:]) for k, x in (text | sound).items()}


def describe(name: str, *, slices: int = 1) -> Topology:
    """Chips by a name as `v5e:4x4` or `v5p:2x2x2`.

    Args:
      slices: how many of these, joined by a network.

    Raises:
      ValueError: there are no such chips, or the compiler for them is not installed.
    """
    generation, _, layout = name.partition(":")
    try:
        chip, shape = CHIPS[generation], tuple(int(n) for n in layout.split("x"))
    except (KeyError, ValueError):
        raise ValueError(
            f"wanted a topology as v5e:4x4, of {', '.join(CHIPS)}, got {name!r}"
        ) from None
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("no compiler for TPUs here; pip install 'qwen2audio_jax[tpu]'")
    from jax.experimental import topologies

    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")
    flat = (*shape, 1, 1)[:3]
    host = tuple(math.gcd(n, 2) for n in flat[:2])
    kind = {"7x": "tpu7x"}.get(generation, generation)
    try:
        found = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{kind}:{'x'.join(map(str, shape))}",
            chips_per_host_bounds=(*host, 1),
            num_slices=slices,
            **(
                {"chip_config_name": CHIP_CONFIGS[generation]} if generation in CHIP_CONFIGS else {}
            ),
        ).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"no topology {name}: {str(error).splitlines()[0]}") from None
    if len(found) != (wanted := slices * math.prod(shape) * chip.cores):
        raise ValueError(f"{name}: wanted {wanted} devices, the compiler has {len(found)}")
    return Topology(name, chip, shape, list(found))


def settings_of(stage: Stage, **given: Any) -> Settings:
    """A run's settings with what a stage is about: lora-sft has adapters, of PEFT's usual width if
    nothing is said; a preference may have some.

    Raises:
      ValueError: there are to be adapters in a stage that has none.
    """
    lora = given.get("lora", Lora())
    if stage == "lora-sft" and not lora.r and lora.start is None:
        lora = given["lora"] = dataclasses.replace(lora, r=LoraConfig.r)
    if lora != Lora() and stage not in ADAPTED:
        raise ValueError(f"{stage} has no adapters: wanted lora with {', '.join(ADAPTED)}")
    if lora.r:
        given.setdefault("weight_dtype", "bfloat16")
    if stage.startswith("dpo"):
        return PreferenceSettings(precompute_ref_log_probs=stage == "dpo-precomputed", **given)
    return Settings(**given)


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A program that is ready to be compiled.

    Attributes:
      flops: that the model itself needs, of all devices.
      held: what devices hold, by what it is.
      loops: how often a loop goes round whose rounds depend on data.
      mesh: what it is for; its devices are the program's, in its order.
      scopes: how often it does within a `jax.named_scope`, by its name.
      ahead: what is put on devices while the program runs: the next step's batch.
      steps: that the program takes at a call; a report is of one of them.
      unseen: operations of a step, of all devices, that are no product in the compiled program.
    """

    program: jax.stages.Lowered
    flops: float
    held: dict[str, Any]
    loops: int
    mesh: Mesh
    scopes: dict[str, int] = dataclasses.field(default_factory=dict)
    ahead: Any = None
    steps: int = 1
    unseen: float = 0.0


def lower(
    stage: Stage, sizes: config.Config, work: Work, settings: Settings, mesh: Mesh
) -> Lowered:
    """The program of a stage, for the devices of a mesh.

    Raises:
      ValueError: the mesh does not divide the model or the batch.
    """
    sharding.check(sizes, mesh)
    placement.check([work.tokens], mesh)
    rows, shards = work.batch // settings.gradient_accumulation_steps, mesh.shape
    if rows % (devices := shards["data"] * shards["fsdp"]):
        # training would add empty ones, whose cost nobody asks for
        raise ValueError(
            f"{rows} rows do not split over the {devices} devices of the mesh axes data and fsdp"
        )
    if stage in GENERATION:
        with flash.using(settings.attention):
            return (_reading if stage == "prefill" else _saying)(sizes, work, settings, mesh)
    parts = settings.gradient_accumulation_steps
    batch = work.arrays(sizes, stage, parts, words=settings.ctc > 0)
    model = _shapes(sizes, settings.weight_dtype, mesh, scan_layers=settings.scan_layers)
    learner = learner_of(settings, model, mesh)
    shapes = {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in batch.items()}
    learned = work.tokens - work.clips * audio_tokens(work.frames)
    sides = 2 if stage.startswith("dpo") else 1
    states, clips = audio_tokens(work.frames), rows * work.clips
    placed = dict(placement.place(shapes, mesh, parts=parts))
    return Lowered(
        program=learner.lower(shapes),
        flops=learner.flops(batch),
        held=learner.held() | {"batch": placed},
        ahead=placed,
        loops=-(-learned // chunk_size(sides * rows, work.tokens, mesh.size)),
        mesh=mesh,
        scopes={SPELT: -(-states // chunk_size(clips, states, mesh.size))},
    )


def _shapes(sizes: config.Config, dtype: str, mesh: Mesh, *, scan_layers: bool) -> Qwen2Audio:
    """A model of shapes, each where it belongs."""
    make = lambda: Qwen2Audio(sizes, scan_layers=scan_layers, dtype=dtype, rngs=nnx.Rngs(0))
    graph, state = nnx.split(nnx.eval_shape(make))
    return nnx.merge(graph, placement.put(state, sharding.shardings(state, mesh)))


def _reading(sizes, work, settings, mesh) -> Lowered:
    """Hears and reads prompts, into a cache with room for as many tokens again."""
    model = _shapes(sizes, settings.dtype, mesh, scan_layers=False)
    batch = work.arrays(sizes, "prefill")
    shapes = placement.place(
        {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in batch.items()}, mesh
    )
    slots = bucket(2 * work.tokens, SHORTEST_CACHE, per_octave=2)

    @jax.jit
    def read(model, ids, mask, features, feature_mask):
        heard = programs.listen(model, features, feature_mask)
        x = programs.embed(model, ids, heard)
        return programs.prefill(model, x, mask, None, slots, work.tokens)

    names = ("input_ids", "attention_mask", "input_features", "feature_attention_mask")
    with jax.set_mesh(mesh):
        program = read.lower(model, *(shapes[name] for name in names))
    last = {**batch, "labels": np.where(np.arange(work.tokens) == 0, 0, processor.IGNORED)}
    last["labels"] = np.broadcast_to(last["labels"], batch["labels"].shape)
    (heard, projected), reading, head = flops.forward(sizes, last)
    held = {"model": nnx.state(model), "batch": dict(shapes)}
    return Lowered(program, heard + projected + reading + head, held, 1, mesh)


def _saying(sizes, work, settings, mesh) -> Lowered:
    """One more token for every row, its past filling the cache; of a call that makes as many as one
    makes, as what begins and ends it is theirs together."""
    model = _shapes(sizes, settings.dtype, mesh, scan_layers=False)
    d, rows = sizes.decoder, work.batch
    rules = rules_for(sizes, GREEDY, min_new_tokens=0, end_tokens=None)
    logits = jax.ShapeDtypeStruct((rows, d.vocabulary), jnp.float32)
    draws, ended = np.zeros(rows, np.uint32), np.zeros(rows, bool)
    make = lambda: caches.empty(d, rows, work.tokens, scan=False, dtype=settings.dtype)
    cache = jax.eval_shape(make)
    cache = placement.put(cache, sharding.of_cache(cache, mesh))
    begin = lambda logits, cache: programs.begin(logits, cache, None, draws, None, ended, rules)[0]
    state = jax.eval_shape(begin, logits, cache).replace(cache=cache)
    with jax.set_mesh(mesh):
        program = programs.decode.lower(model, state, draws, rules, programs.CHUNK)
    return Lowered(
        program=program,
        flops=rows * flops.of_token(d, work.tokens),
        held={"model": nnx.state(model), "cache": cache},
        loops=programs.CHUNK,
        mesh=mesh,
        steps=programs.CHUNK,
        # one query's attention becomes multiplications and sums
        unseen=rows * flops.of_past(d, work.tokens),
    )
