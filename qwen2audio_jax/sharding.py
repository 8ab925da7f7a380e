"""parameter path -> letters -> mesh axes.

The layers know nothing of meshes. What may be split is read off a parameter's letters in the
conversion table.
"""

import math
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qwen2audio_jax.config import Config
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


def check(config: Config, mesh: Mesh) -> None:
    """Refuses a mesh that a model of these sizes cannot be spread over.

    Raises:
      ValueError: its axes are explicit or unknown, or do not divide a parameter.
    """
    if unknown := [name for name in mesh.axis_names if name not in AXES]:
        raise ValueError(
            f"no mesh axis {', '.join(map(str, unknown))}; there are {', '.join(AXES)}"
        )
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(
            f"wanted a mesh of AxisType.Auto axes, as sharding.mesh makes, got {mesh.axis_types}"
        )
    for row in table.entries(config):
        spec(row.path, row.our_shape, mesh)


def spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """How a parameter is split.

    Key/value heads that are too few to split are on every device, as is usual for them.

    Args:
      path: ours, without the layer's number.
      shape: with a leading layer axis where it is stacked.

    Raises:
      ValueError: a dimension does not divide by its mesh axis; the message gives both numbers.
    """
    letters = table.LETTERS[path]
    sizes = dict(zip(letters, shape[len(shape) - len(letters) :], strict=True))
    axes: list[str | None] = [None] * len(letters)
    for letter, axis in RULES:
        if letter in letters and axis not in axes and mesh.shape.get(axis, 1) > 1:
            if letter == "K" and sizes["K"] % mesh.shape[axis]:
                continue
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
