"""Which device has what: a batch's rows, and moments beside their parameters."""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen2audio_jax.training.optimizer import name_of
from qwen2audio_jax.training.settings import DataConfig

ROWS = ("data", "fsdp")  # the mesh axes that split a batch


def place(
    batch: Mapping[str, Any], mesh: Mesh | None, *, parts: int = 1, shared: bool = False
) -> Mapping[str, Any]:
    """A batch on its devices, split over rows; each host brings rows of its own.

    Args:
      parts: if more than 1, arrays lead with an axis of so many batches.
      shared: every host has the same batch, and keeps it whole.
    """
    if mesh is None:
        return batch
    if shared and jax.process_count() > 1:
        return jax.device_put(dict(batch), NamedSharding(mesh, PartitionSpec()))
    where = NamedSharding(mesh, PartitionSpec(*[None] * (parts > 1), ROWS))
    return {k: jax.make_array_from_process_local_data(where, x) for k, x in batch.items()}


def check(data: DataConfig, mesh: Mesh) -> None:
    """Refuses batches that do not split over a mesh.

    Raises:
      ValueError: the message gives both numbers.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    for bucket in data.buckets:
        for name in ("rows", "clips"):
            size = getattr(bucket, name) * (data.feeds or jax.process_count())
            if size % shards:
                raise ValueError(
                    f"{size} {name} of a batch do not split over the {shards} devices of the mesh "
                    f"axes {' and '.join(ROWS)}"
                )


def state(tree: Any, params: Any, mesh: Mesh) -> Any:
    """Where a state belongs: moments and averages beside their parameters, the rest everywhere."""
    places = {name: (x.shape, x.sharding) for name, x in by_name(params).items()}
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(path, leaf):
        words = name_of(path).split(".")
        for start in range(len(words)):
            shape, found = places.get(".".join(words[start:]), (None, None))
            if shape == leaf.shape:
                return found
        return everywhere

    return jax.tree_util.tree_map_with_path(place, tree)


def by_name(tree: Any) -> dict[str, Any]:
    """A tree's leaves by their paths, as `encoder.conv1.kernel`."""
    return {name_of(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
