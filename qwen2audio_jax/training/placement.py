"""Which device has what: a batch's rows, moments beside their parameters, and how much that is."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen2audio_jax import sharding
from qwen2audio_jax.data.pack import Bucket
from qwen2audio_jax.processor import IGNORED
from qwen2audio_jax.spread import ROWS, RULES
from qwen2audio_jax.training.optimizer import name_of

TOKENS = {  # of each row, where other arrays are of its clips or of pairs
    side + name
    for side in ("", "chosen_", "rejected_")
    for name in ("input_ids", "attention_mask", "segment_ids", "labels")
}


def groups(mesh: Mesh | None) -> list[list[int]]:
    """The processes, those together that hold parts of the same rows.

    All of a group bring the same rows to every batch, and each group brings others.
    """
    if mesh is None or jax.process_count() == 1:
        return [[process] for process in range(jax.process_count())]
    return _groups(mesh)


_groups = functools.cache(lambda mesh: sharding.groups(mesh.devices))  # asked at every step


def share(mesh: Mesh | None) -> tuple[int, int]:
    """The group of this process, and how many there are."""
    every, process = groups(mesh), jax.process_index()
    return next(i for i, group in enumerate(every) if process in group), len(every)


def place(
    batch: Mapping[str, Any], mesh: Mesh | None, *, parts: int = 1, shared: bool = False
) -> Mapping[str, Any]:
    """A batch on its devices, split over rows and `context`; each of the `groups` brings its rows.

    Where rows or clips do not divide by the devices, empty ones that teach nothing are added.

    Args:
      batch: arrays, or their shapes where nothing is to be allocated.
      parts: if more than 1, arrays lead with an axis of so many batches.
      shared: every host has the same batch, rather than rows of its own.
    """
    if mesh is None:
        return batch
    group, count = (0, 1) if shared else share(mesh)
    devices, axis = _places(mesh) // count, int(parts > 1)

    def put(name, x):
        x = _filled(name, x, devices, axis=axis)
        where = sharding.of_batch(x.shape, mesh, tokens=name in TOKENS, lead=axis)
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
        if jax.process_count() == 1:
            return jax.device_put(x, where)
        shape = (*x.shape[:axis], count * x.shape[axis], *x.shape[axis + 1 :])
        return jax.make_array_from_callback(shape, where, _part(x, shape, group, axis=axis))

    return {name: put(name, x) for name, x in batch.items()}


def widened(buckets: Iterable[Bucket], mesh: Mesh | None) -> tuple[Bucket, ...]:
    """Shapes of batches that all hosts share, with rows for all devices, as those of all feeds."""
    places = _places(mesh)

    def wide(bucket: Bucket) -> Bucket:
        times = max(1, places // bucket.rows)
        return dataclasses.replace(bucket, rows=times * bucket.rows, clips=times * bucket.clips)

    return tuple(map(wide, buckets))


def empty_rows(bucket: Bucket, feeds: int, mesh: Mesh) -> int:
    """How many of a batch's rows are there only to make them divide by the devices."""
    parts = len(groups(mesh))
    return parts * (-(bucket.rows * feeds // parts) % (_places(mesh) // parts))


def _places(mesh: Mesh | None) -> int:
    """Devices that have rows of their own."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in ROWS)


def _part(
    x: np.ndarray, shape: tuple[int, ...], group: int, *, axis: int
) -> Callable[[tuple[slice, ...]], np.ndarray]:
    """What a device has, by its place among all groups' rows; `x` has those of one group."""
    before = group * x.shape[axis]

    def part(index):
        first, end, _ = index[axis].indices(shape[axis])
        return x[(*index[:axis], slice(first - before, end - before), *index[axis + 1 :])]

    return part


def _filled(name: str, x: Any, devices: int, *, axis: int) -> Any:
    """An array with as many rows more as make them divide by so many devices."""
    missing = -x.shape[axis] % devices
    if not missing:
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        shape = [size + missing * (i == axis) for i, size in enumerate(x.shape)]
        return jax.ShapeDtypeStruct(shape, x.dtype)
    empty = IGNORED if name.endswith(("labels", "words")) else -1 if name == "rows" else 0
    return np.pad(x, [(0, missing * (i == axis)) for i in range(x.ndim)], constant_values=empty)


def check(lengths: Iterable[int], mesh: Mesh) -> None:
    """Refuses rows whose tokens do not split over a mesh.

    Args:
      lengths: tokens of a row, in any of the batches' shapes.

    Raises:
      ValueError: the message gives both numbers.
    """
    for tokens in lengths:
        if tokens % mesh.shape["context"]:
            raise ValueError(
                f"{tokens} tokens of a row do not split over the {mesh.shape['context']} devices "
                "of the mesh axis context"
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


def is_abstract(tree: Any) -> bool:
    """Whether these are shapes alone."""
    return any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree))


def put(tree: Any, places: Any) -> Any:
    """Arrays on their devices; shapes with the places that they would have."""
    if places is None:
        return tree
    if is_abstract(tree):
        at = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
        return jax.tree.map(at, tree, places)
    return jax.tree.map(_put, tree, places)


def _put(x: Any, place: NamedSharding) -> jax.Array:
    """Each device takes its part of what every host has; `jax.device_put` would first gather that
    from all hosts, to see that it is the same."""
    if jax.process_count() == 1 or not getattr(x, "is_fully_addressable", True):
        return jax.device_put(x, place)
    whole = np.asarray(x)
    return jax.make_array_from_callback(whole.shape, place, whole.__getitem__)


def copied(tree: Any) -> Any:
    return tree if is_abstract(tree) else jax.tree.map(jnp.copy, tree)


def table(held: Mapping[str, Any]) -> str:
    """What is split how, and the bytes of it on each device: a line a parameter, and totals.

    Args:
      held: trees of arrays, or of shapes with their places, by what they are.
    """
    lines, totals = [], []
    for what, tree in held.items():
        whole = each = 0
        for name, x in by_name(tree).items():
            part = math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            whole, each = whole + x.size * x.dtype.itemsize, each + part
            spec = getattr(x.sharding, "spec", PartitionSpec())
            axes = [*spec, *[None] * (x.ndim - len(spec))]
            split = [
                f"{size}/{'+'.join((axis,) if isinstance(axis, str) else axis)}"
                if axis
                else f"{size}"
                for size, axis in zip(x.shape, axes, strict=True)
            ]
            lines.append((what, name, " x ".join(split), str(x.dtype), f"{part:,}"))
        totals.append((what, "all", f"{whole:,} bytes in all", "", f"{each:,}"))
    rows = [("", "", "split over", "dtype", "bytes a device"), *lines, *totals]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    show = lambda row: "  ".join(
        cell.rjust(width) if i == 4 else cell.ljust(width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    return "\n".join(show(row).rstrip() for row in rows)


LETTERS = {
    "B": "rows",
    "C": "clips",
    "V": "vocabulary",
    "F": "hidden units",
    "N": "heads",
    "K": "heads of keys and values",
    "L": "tokens of a row",
    "P": "positions of a clip",
}


def activations(mesh: Mesh) -> str:
    """How a mesh splits what is computed, a line a letter: by axes that divide it, each once."""
    split = {
        letter: "+".join(axis for axis in axes if mesh.shape[axis] > 1) for letter, axes in RULES
    }
    lines = [f"  {LETTERS[letter]:26}{axes}" for letter, axes in split.items() if axes]
    head = "activations, over what divides them, no axis twice:" if lines else "activations whole"
    return "\n".join([head, *lines])
