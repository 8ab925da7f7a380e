"""letters -> mesh axes, for arrays inside of a program; and what that program is compiled for.

The layers say which letters an array has, and nothing of meshes: outside of `jax.set_mesh` all of
this does nothing.
"""

import contextlib
import math
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor", "context")
ROWS = ("data", "fsdp")  # what splits a batch

# Which mesh axes split a letter, the most important letters first: each axis is spent once. Between
# blocks, where no head or hidden unit claims it, `tensor` splits the sequence (norms, residuals).
RULES = (
    ("B", ROWS),
    ("C", (*ROWS, "context")),
    ("V", ("tensor",)),
    ("F", ("tensor",)),
    ("N", ("tensor",)),
    ("K", ("tensor",)),
    ("L", ("context", "tensor")),
    ("P", ("tensor",)),
)


def spec(
    letters: str, shape: tuple[int, ...], sizes: Mapping[str, int], **first: tuple[str, ...]
) -> PartitionSpec:
    """How an activation is split: a letter takes as many of its axes as divide it.

    Args:
      letters: "B L D"; what no rule names is whole.
      sizes: of the mesh's axes.
      first: letters that take axes of the caller's choice before all others.
    """
    words, taken = letters.split(), {}
    if len(words) != len(shape):
        raise ValueError(f"wanted {len(shape)} letters for the shape {shape}, got {letters!r}")
    spent: set[str] = set()
    for letter, wanted in (*first.items(), *RULES):
        if letter not in words or letter in taken:
            continue
        size, axes = shape[words.index(letter)], []
        for axis in wanted:
            if axis in spent or sizes.get(axis, 1) == 1:
                continue
            if size % math.prod(sizes[a] for a in (*axes, axis)):
                break
            axes.append(axis)
        spent.update(axes)
        taken[letter] = tuple(axes)
    return PartitionSpec(*(plain(taken.get(word, ())) for word in words))


def constrain(x: jax.Array, letters: str, **first: tuple[str, ...]) -> jax.Array:
    """Says how an array is to be split over the mesh that is set; `x` itself where none is."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(letters, x.shape, mesh.shape, **first))


def platform() -> str:
    """What is compiled for: the mesh's devices, which may not be here, or else jax's own."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def devices() -> int:
    """How many devices share a program: those of the mesh that is set."""
    return max(1, jax.sharding.get_abstract_mesh().size)


def parts(letters: str, shape: tuple[int, ...]) -> int:
    """Into how many parts the mesh that is set splits an activation of these letters."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[axis] for axis in jax.tree.leaves(tuple(spec(letters, shape, sizes))))


def filled(rows: int) -> int:
    """So many rows, and as many more as have them split evenly over the mesh that is set.

    One row stays alone: it cannot be split, and others beside it would help nobody.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    devices = math.prod(sizes.get(axis, 1) for axis in ROWS)
    return rows if rows == 1 else -(-rows // devices) * devices


def on(parameter: jax.Array) -> contextlib.AbstractContextManager:
    """A context in which the compiler knows of the mesh that a model's parameter is spread over."""
    place = None if isinstance(parameter, jax.core.Tracer) else parameter.sharding
    if isinstance(place, NamedSharding) and isinstance(place.mesh, Mesh) and place.mesh.size > 1:
        return jax.set_mesh(place.mesh)
    return contextlib.nullcontext()


def whole(x: jax.Array) -> np.ndarray:
    """All of an array, also where a part of it is on other hosts, which all have to ask for it."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def plain(axes: tuple[str, ...]) -> tuple[str, ...] | str | None:
    """As a PartitionSpec has it: one axis by its name, none as None."""
    return axes if len(axes) > 1 else axes[0] if axes else None
