"""parameter path -> letters -> mesh axes.

The layers know nothing of meshes. What may be split is read off a parameter's letters in the
conversion table; activations are constrained at a block's opening.
"""

import math
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qwen2audio_jax.weights import table

AXES = ("data", "fsdp", "tensor", "context")

# Which mesh axis splits a letter, the most important letters first: each axis is spent once.
RULES = (
    ("V", "tensor"),
    ("F", "tensor"),
    ("N", "tensor"),
    ("K", "tensor"),
    ("D", "fsdp"),
    ("E", "fsdp"),
)


def mesh(**sizes: int) -> Mesh:
    """A mesh over all devices, `mesh(fsdp=4, tensor=2)`; axes that are not named have size 1.

    Raises:
      ValueError: an axis is unknown, or the sizes do not multiply to the number of devices.
    """
    if unknown := [name for name in sizes if name not in AXES]:
        raise ValueError(f"no mesh axis {', '.join(unknown)}; there are {', '.join(AXES)}")
    shape = tuple(sizes.get(name, 1) for name in AXES)
    if math.prod(shape) != jax.device_count():
        raise ValueError(
            f"a mesh of {dict(zip(AXES, shape, strict=True))} needs {math.prod(shape)} devices, "
            f"there are {jax.device_count()}"
        )
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """How a parameter is split.

    Args:
      path: ours, without the layer's number.
      shape: with a leading layer axis where it is stacked.

    Raises:
      ValueError: a dimension does not divide by its mesh axis; the message gives both numbers.
    """
    letters = table.LETTERS[path]
    axes: list[str | None] = [None] * len(letters)
    for letter, axis in RULES:
        if letter in letters and axis not in axes and mesh.shape.get(axis, 1) > 1:
            axes[letters.index(letter)] = axis
    axes = [None] * (len(shape) - len(letters)) + axes  # a layer axis is never split
    for axis, size in zip(axes, shape, strict=True):
        if axis is not None and size % mesh.shape[axis]:
            raise ValueError(
                f"{path}: a dimension of {size} does not divide by the {mesh.shape[axis]} "
                f"devices of mesh axis {axis!r}"
            )
    return PartitionSpec(*axes)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """The sharding of every parameter of a model, or of its state, abstract or not."""
    place = lambda path, leaf: NamedSharding(mesh, spec(table.split(path)[0], leaf.shape, mesh))
    return jax.tree_util.tree_map_with_path(place, tree)
