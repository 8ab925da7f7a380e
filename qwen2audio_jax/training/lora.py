"""LoRA in PEFT's terms: what is learned are pairs of narrow matrices beside frozen linear layers.

Adapters are a tree apart from the model's parameters, keyed by the linear layer's path: it is what
trains, what is saved, and what is left out to have the base model again. `flax.nnx.LoRA` and
`qwix` put theirs into the model as it is built or traced, which a scanned stack of blocks does not
let them do, and neither reads or writes PEFT's files.

    adapters = lora.init(config, model, key=key)
    adapted = lora.apply(model, adapters, config, key=key_of_this_step)   # inside the loss
    peft.save(folder, adapters, config, model, base="Qwen/Qwen2-Audio-7B-Instruct")
    lora.merge(model, adapters, config).save_pretrained(folder)

Source: LoRA (arXiv:2106.09685), section 4.1; https://github.com/huggingface/peft.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from qwen2audio_jax import layers, sharding
from qwen2audio_jax.model import Qwen2Audio
from qwen2audio_jax.training import whole
from qwen2audio_jax.weights import table

# Every linear layer of the decoder, by its name in transformers 4 and 5: what the ecosystem adapts.
DECODER = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
ALL_LINEAR = "all-linear"

A, B = "lora_A", "lora_B"

# {"decoder.blocks.mlp.up": {"lora_A": [layers, D, r], "lora_B": [layers, r, F]}}, and `whole` ones
Adapters = dict[str, dict[str, Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which layers are adapted, and how; names and meanings are PEFT's."""

    r: int = 8
    """Width of the narrow matrices."""
    lora_alpha: int = 32
    """What the adapters add is scaled by lora_alpha / r."""
    target_modules: str | tuple[str, ...] = DECODER
    """Ends of transformers' module names, or a regex for whole names, or "all-linear"."""
    lora_dropout: float = 0.0
    """The part of an adapter's input that is left out in training."""
    modules_to_save: tuple[str, ...] = ()
    """Ends of transformers' names of modules that train whole beside the adapters, outside of the
    blocks: multi_modal_projector."""

    def __post_init__(self):
        if self.r < 1:
            raise ValueError(f"wanted r of at least 1, got {self.r}")
        if self.lora_alpha is not None and not 0 < self.lora_alpha < math.inf:
            raise ValueError(f"wanted lora_alpha above 0, got {self.lora_alpha}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"wanted lora_dropout from 0 to below 1, got {self.lora_dropout}")

    @property
    def scale(self) -> float:
        return self.lora_alpha / self.r


class Adapted(nnx.Module):
    """A linear layer with what its adapter adds."""

    def __init__(
        self, base: nnx.Module, adapter: dict[str, Array], config: LoraConfig, key: Array | None
    ):
        self.base = base
        # nnx would take a tracer for a constant
        self.lora_A = nnx.data(adapter[A])
        self.lora_B = nnx.data(adapter[B])
        self.key = nnx.data(key)
        self.config = config

    @property
    def kernel(self) -> nnx.Param:
        return self.base.kernel

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*out"]:
        y = self.base(x)
        inputs = self.lora_A.ndim - 1
        batch = x.shape[: x.ndim - inputs]
        if layers.one_cpu():
            x = x.reshape(-1, *x.shape[x.ndim - inputs :])
        x = x.astype(self.lora_A.dtype)  # wider than the base, as PEFT computes
        if self.key is not None:
            kept = jax.random.bernoulli(self.key, 1 - self.config.lora_dropout, x.shape)
            x = jnp.where(kept, x / (1 - self.config.lora_dropout), 0)
        low = jnp.tensordot(x, self.lora_A, inputs) * self.config.scale
        added = jnp.tensordot(low, self.lora_B, 1)
        return (y + added.reshape(*batch, *self.lora_B.shape[1:])).astype(y.dtype)


def init(config: LoraConfig, model: Qwen2Audio, *, key: Array) -> Adapters:
    """Fresh adapters, which change nothing yet: `lora_A` is random, `lora_B` zero, both float32.

    Raises:
      ValueError: `target_modules` matches nothing, or something that is no linear layer; or
        `modules_to_save` what is adapted, or as in `whole.entries`.
    """

    def pair(number: int, entry: table.Entry) -> dict[str, Array]:
        a, b = (row.our_shape for row in matrices(entry, config.r).values())
        bound = math.prod(a[:-1]) ** -0.5
        random = jax.random.fold_in(key, number)
        return {A: jax.random.uniform(random, a, minval=-bound, maxval=bound), B: jnp.zeros(b)}

    entries = targets(config, model)
    adapters = stacked(((e, pair(i, e)) for i, e in enumerate(entries)), model)
    return adapters | whole.init(saved(config, model), model)


def apply(
    model: Qwen2Audio, adapters: Adapters, config: LoraConfig, *, key: Array | None = None
) -> Qwen2Audio:
    """The model with its adapters: nothing is copied, and `model` itself stays the base.

    Args:
      key: of this step's dropout; None: there is none.
    """
    model = nnx.merge(*nnx.split(model))
    for number, (path, adapter) in enumerate(sorted(adapters.items())):
        if A not in adapter:
            whole.put(model, path, adapter)
            continue
        parent, name = _parent(model, path)
        base = getattr(parent, name)
        dropout = None
        if key is not None and config.lora_dropout:
            dropout = jax.random.fold_in(key, number)
            if _is_stacked(base, adapter):
                dropout = jax.random.split(dropout, len(adapter[A]))
        setattr(parent, name, Adapted(base, adapter, config, dropout))
    return model


def merge(model: Qwen2Audio, adapters: Adapters, config: LoraConfig) -> Qwen2Audio:
    """A plain model whose weights have the adapters in them; `model` itself stays the base."""
    model = nnx.merge(*nnx.split(model))
    for path, adapter in adapters.items():
        if A not in adapter:
            whole.put(model, path, adapter)
            continue
        parent, name = _parent(model, path)
        base = getattr(parent, name)
        kernel = base.kernel.get_value()
        merged = _merge(kernel, adapter[A], adapter[B], config.scale, _is_stacked(base, adapter))
        # a new parameter: the old one is the base model's too
        base.kernel = nnx.Param(jax.device_put(merged, kernel.sharding))
    return model


@functools.partial(jax.jit, static_argnames="stacked")
def _merge(kernel, a, b, scale, stacked):
    product = functools.partial(jnp.tensordot, axes=1)
    added = (jax.vmap(product) if stacked else product)(a, b)
    return (kernel + scale * added).astype(kernel.dtype)


def shardings(adapters: Mapping[str, Any], mesh: Mesh) -> dict[str, dict[str, NamedSharding]]:
    """Where adapters, or their shapes, belong: split as their layer's kernel is, never over r."""

    def places(path: str, adapter: dict[str, Any]) -> dict[str, NamedSharding]:
        if A not in adapter:
            return whole.shardings(path, adapter, mesh)
        a, b = adapter[A], adapter[B]
        words = [word for word in path.split(".") if not word.isdigit()]
        letters = table.LETTERS[path := ".".join([*words, "kernel"])]
        lead = (a.ndim + b.ndim - 2 - len(letters)) // 2  # 1 in a stack of layers
        shape = (*a.shape[:-1], *b.shape[lead + 1 :])
        axes = tuple(sharding.spec(path, shape, mesh))
        inputs = a.ndim - 1
        specs = {A: (*axes[:inputs], None), B: (*axes[:lead], None, *axes[inputs:])}
        return {name: NamedSharding(mesh, PartitionSpec(*axes)) for name, axes in specs.items()}

    return {path: places(path, adapter) for path, adapter in adapters.items()}


def targets(config: LoraConfig, model: Qwen2Audio) -> list[table.Entry]:
    """The weights that `target_modules` names, by PEFT's rule.

    Raises:
      ValueError: a name matches nothing, or something that is no linear layer.
    """
    modules = {
        e.name.removesuffix(".weight"): e
        for e in table.entries(model.config)
        if e.name.endswith(".weight")
    }
    linear = {name: entry for name, entry in modules.items() if _is_linear(entry)}
    wanted = config.target_modules
    if isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
        return list(linear.values())
    found: set[str] = set()
    for pattern in (wanted,) if isinstance(wanted, str) else wanted:
        matching = {name for name in modules if _matches(pattern, name, isinstance(wanted, str))}
        if not matching:
            ends = sorted({name.rpartition(".")[2] for name in linear})
            how = ", a regex for whole names," if isinstance(wanted, str) else ""
            raise ValueError(
                f"target_modules: {pattern!r}{how} matches no module; there are {', '.join(ends)}"
            )
        if others := matching - linear.keys():
            raise ValueError(
                f"target_modules: {pattern!r} matches {', '.join(sorted(others))}: "
                "only linear layers within the towers and the projector have adapters"
            )
        found |= matching
    return [entry for name, entry in linear.items() if name in found]


def saved(config: LoraConfig, model: Qwen2Audio) -> list[table.Entry]:
    """The parameters of what `modules_to_save` names.

    Raises:
      ValueError: as in `whole.entries`, or they are adapted.
    """
    entries = whole.entries(config.modules_to_save, model)
    adapted = {entry.path for entry in targets(config, model)}
    if both := [entry.name for entry in entries if entry.path in adapted]:
        raise ValueError(f"modules_to_save and target_modules both name {both[0]}: wanted one")
    return entries


def _matches(pattern: str, module: str, whole: bool) -> bool:
    """Whether PEFT would find this module, by its name in transformers 4 or 5."""
    names = (module, table.in_memory(module))
    if not whole:
        return any(name == pattern or name.endswith(f".{pattern}") for name in names)
    try:
        return any(re.fullmatch(pattern, name) for name in names)
    except re.error as error:
        raise ValueError(f"target_modules: {pattern!r} is no regex: {error}") from error


def stacked(pairs: Iterable[tuple[table.Entry, Mapping[str, Any]]], model) -> Adapters:
    """Adapters in the form of the model's blocks; layers of a stack that have none get zeros.

    Zeros stay zeros: each of the two matrices is the other's gradient's factor.
    """
    pairs = list(pairs)
    if not model.scan_layers:
        return {_path(entry.key): dict(pair) for entry, pair in pairs}
    rows: dict[str, dict[int | None, Mapping[str, Any]]] = {}
    for entry, pair in pairs:
        rows.setdefault(_path(entry.path), {})[entry.layer] = pair
    adapters = {}
    for path, by_layer in rows.items():
        tower = model.config.encoder if path.startswith("encoder.") else model.config.decoder
        some = next(iter(by_layer.values()))
        nothing = jax.tree.map(jnp.zeros_like, dict(some))
        if None in by_layer:
            adapters[path] = dict(some)
        else:
            every = [dict(by_layer.get(i, nothing)) for i in range(tower.layers)]
            adapters[path] = jax.tree.map(lambda *x: jnp.stack(x), *every)
    return adapters


def of_layer(adapters: Adapters, entry: table.Entry) -> dict[str, Array]:
    if (path := _path(entry.key)) in adapters:
        return adapters[path]
    return jax.tree.map(lambda x: x[entry.layer], adapters[_path(entry.path)])


def _parent(model: Qwen2Audio, path: str) -> tuple[Any, str]:
    """The module that holds the linear layer at `path`, and the layer's name in it."""
    *words, name = path.split(".")
    step = lambda module, word: module[int(word)] if word.isdigit() else getattr(module, word)
    return functools.reduce(step, words, model), name


def _is_stacked(base: Any, adapter: dict[str, Array]) -> bool:
    return adapter[A].ndim + adapter[B].ndim == base.kernel.get_value().ndim + 3


def _path(kernel: str) -> str:
    return kernel.removesuffix(".kernel")


def _is_linear(entry: table.Entry) -> bool:
    return entry.path.endswith(".kernel") and len(_groups(entry)) == 2


def _groups(entry: table.Entry) -> list[str]:
    """The words of each of their axes: ["N H", "D"]."""
    left = entry.axes.partition(" -> ")[0]
    return [a or b for a, b in re.findall(r"\(([^)]*)\)|(\S+)", left)]


def matrices(entry: table.Entry, r: int) -> dict[str, table.Entry]:
    """The two matrices that adapt a weight, as rows of the table: PEFT's names and axes, ours."""
    outputs, inputs = _groups(entry)
    axes = {A: f"r ({inputs}) -> {inputs} r", B: f"({outputs}) r -> r {outputs}"}
    sizes = entry.sizes | {"r": r}
    return {
        name: table.Entry(
            name=f"{entry.name.removesuffix('.weight')}.{name}.weight",
            path=f"{_path(entry.path)}.{name}",
            layer=entry.layer,
            axes=words,
            sizes={word: sizes[word] for word in re.findall(r"\w+", words)},
        )
        for name, words in axes.items()
    }
