"""Modules that train whole beside adapters, PEFT's modules_to_save: the projector, most often.

They are part of the tree of adapters, by their path and their parameters' names, and are kept in
float32 however short the base's are; the base has its own still.

    {"projector": {"kernel": [E, D], "bias": [D]}}
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from qwen2audio_jax import sharding
from qwen2audio_jax.model import Qwen2Audio
from qwen2audio_jax.weights import table


def entries(names: tuple[str, ...], model: Qwen2Audio) -> list[table.Entry]:
    """The parameters of the modules whose names in transformers end so, by PEFT's rule.

    Raises:
      ValueError: a name is no module's, or of one within the blocks or tied to another.
    """
    every, found = list(table.entries(model.config)), {}
    for name in names:
        matching = [entry for entry in every if _is_under(entry, name)]
        if not matching:
            raise ValueError(f"modules_to_save: {name!r} matches no module, as lm_head would")
        if inner := [entry.name for entry in matching if entry.layer is not None]:
            raise ValueError(
                f"modules_to_save: {name!r} matches {inner[0].rpartition('.')[0]}: wanted modules "
                "outside of the blocks, as multi_modal_projector"
            )
        if model.config.decoder.tied and any(entry.name == table.EMBEDDING for entry in matching):
            raise ValueError(
                f"modules_to_save: {name!r} is the output head, too: wanted a model whose "
                "embeddings are not tied"
            )
        found |= {entry.name: entry for entry in matching}
    return list(found.values())


def init(saved: Iterable[table.Entry], model: Qwen2Audio) -> dict[str, dict[str, Array]]:
    """Modules of these parameters as they are in the model, copied; of shapes alone zeros."""
    modules: dict[str, dict[str, Array]] = {}
    for entry in saved:
        path, name = split(entry)
        value = getattr(_module(model, path), name).get_value()
        abstract = isinstance(value, jax.ShapeDtypeStruct)
        wide = jnp.zeros(value.shape) if abstract else jnp.array(value, jnp.float32, copy=True)
        modules.setdefault(path, {})[name] = wide
    return modules


def put(model: Qwen2Audio, path: str, module: Mapping[str, Array]) -> None:
    """Gives a model's module these parameters, in the dtypes of its own."""
    ours = _module(model, path)
    for name, value in module.items():
        # a new parameter: the old one is the base model's too
        setattr(ours, name, nnx.Param(value.astype(getattr(ours, name).get_value().dtype)))


def shardings(path: str, module: Mapping[str, Any], mesh: Mesh) -> dict[str, NamedSharding]:
    """Where a module's parameters, or their shapes, belong."""
    place = lambda name, x: NamedSharding(mesh, sharding.spec(f"{path}.{name}", x.shape, mesh))
    return {name: place(name, x) for name, x in module.items()}


def split(entry: table.Entry) -> tuple[str, str]:
    """Of a parameter, its module's path and its name there."""
    path, _, name = entry.path.rpartition(".")
    return path, name


def _module(model: Qwen2Audio, path: str) -> Any:
    for name in path.split("."):
        model = getattr(model, name)
    return model


def _is_under(entry: table.Entry, name: str) -> bool:
    return any(module.endswith(name) for module in _modules(entry))


def _modules(entry: table.Entry) -> Iterator[str]:
    """All that a parameter is within, by their names in transformers 4 and 5."""
    for module in (entry.name, table.in_memory(entry.name)):
        while module := module.rpartition(".")[0]:
            yield module
