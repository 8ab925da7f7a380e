"""parameter path -> letters -> mesh axes.

The layers know nothing of meshes. What may be split is read off a parameter's letters in the
conversion table.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qwen2audio_jax import spread
from qwen2audio_jax.cache import Cache
from qwen2audio_jax.config import Config
from qwen2audio_jax.spread import AXES, ROWS
from qwen2audio_jax.weights import table

# Which mesh axes split a letter, the most important letters first: each axis is spent once. Those
# that share a row's tokens share the parameters too.
RULES = (
    ("V", ("tensor",)),
    ("F", ("tensor",)),
    ("N", ("tensor",)),
    ("K", ("tensor",)),
    ("D", ("fsdp", "context")),
    ("E", ("fsdp", "context")),
)


def mesh(
    *,
    devices: Sequence[jax.Device] | None = None,
    dcn: Mapping[str, int] | None = None,
    **sizes: int,
) -> Mesh:
    """A mesh over all devices, `mesh(fsdp=4, tensor=2)`; axes that are not named have size 1.

    Args:
      devices: in place of all there are, such as those of a topology that is not here.
      dcn: sizes of axes over several slices, joined by a network; `sizes` are within each.

    Raises:
      ValueError: an axis is unknown, the sizes do not multiply to the number of devices, or they
        would have hosts bring rows that do not follow each other.
    """
    devices, dcn = jax.devices() if devices is None else list(devices), dcn or {}
    if unknown := [name for name in (*sizes, *dcn) if name not in AXES]:
        raise ValueError(f"no mesh axis {', '.join(unknown)}; there are {', '.join(AXES)}")
    shape, over = (tuple(each.get(name, 1) for name in AXES) for each in (sizes, dcn))
    if (needed := math.prod(shape) * math.prod(over)) != len(devices):
        slices = f" on each of {math.prod(over)} slices" if math.prod(over) > 1 else ""
        raise ValueError(
            f"a mesh of {dict(zip(AXES, shape, strict=True))}{slices} needs {needed} devices, "
            f"there are {len(devices)}"
        )
    try:
        laid_out = _by_host(_laid_out(shape, over, devices), over)
    except NotImplementedError as error:
        raise ValueError(f"no mesh of {shape} for these devices: {error}") from error
    return Mesh(laid_out, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _laid_out(shape, over, devices) -> np.ndarray:
    """Devices in the order of the axes, those of a slice next to each other."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1 and math.prod(over) != slices:
        raise ValueError(
            f"the devices are of {slices} slices: wanted dcn mesh sizes that multiply to it, as "
            f"--mesh.dcn-data-parallelism {slices}, got {math.prod(over)}"
        )
    if math.prod(over) == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    marks = ("slice_index", "process_index")
    for mark in marks:
        known = {getattr(device, mark, None) for device in devices}
        if len(known) == math.prod(over) and None not in known:
            return mesh_utils.create_hybrid_device_mesh(
                shape,
                over,
                devices,
                process_is_granule=mark == marks[1],
                allow_split_physical_axes=True,  # as 128 of a 16 x 16
            )
    if devices[0].platform != "cpu":
        raise ValueError(f"wanted {math.prod(over)} slices, the devices are of {slices}")
    # to rehearse with the devices of one machine: neighbours are a slice
    parts = np.array(devices).reshape(*over, *shape)
    order = [axis for i in range(len(shape)) for axis in (i, i + len(shape))]
    return parts.transpose(order).reshape([a * b for a, b in zip(over, shape, strict=True)])


def _by_host(devices: np.ndarray, over: Sequence[int] = (1, 1, 1, 1)) -> np.ndarray:
    """The places of rows such that those of a host are next to each other, in an order as before.

    A host brings rows, and their clips, which are cut into as many parts: only where its parts
    follow each other do the clips of the first rows come before those of the next. Hosts that share
    rows are as one.

    Args:
      over: sizes of the axes over several slices. Rows stay within their slice: were they sorted
        beyond it, an axis that is to cross the network would not, and another one would.

    Raises:
      ValueError: a host has rows of a slice that cannot be next to each other.
    """
    rows = devices.reshape(-1, *devices.shape[2:])
    number = {host: i for i, group in enumerate(groups(devices)) for host in group}
    host = lambda i: number[rows[i].flat[0].process_index]
    (data, fsdp), order = devices.shape[:2], np.arange(len(rows))
    # [slices of data, data in each, slices of fsdp, fsdp in each] -> a line for each slice
    places = order.reshape(over[0], data // over[0], over[1], fsdp // over[1]).swapaxes(1, 2)
    for those in places.reshape(over[0] * over[1], -1):
        order[those] = sorted(those.tolist(), key=host)
    runs = sum(1 for _ in itertools.groupby(order.tolist(), key=host))
    if runs > len(set(number.values())):
        raise ValueError(
            f"dcn fsdp of {over[1]} parts the rows of hosts: wanted ici data of 1, or hosts of "
            f"each slice that divide by it, got ici data of {data // over[0]}"
        )
    return rows[order].reshape(devices.shape)


def groups(devices: np.ndarray) -> list[list[int]]:
    """The hosts of a mesh, those together that share rows: where tensor or context reaches over.

    All of a group bring the same rows. Groups have as many rows as each other; hosts that share
    rows otherwise are all of one group.

    Args:
      devices: the mesh's, along `AXES`.

    Returns:
      The hosts of each group, in the order of the groups' first rows.
    """
    rows = [
        {device.process_index for device in row}
        for row in devices.reshape(-1, devices.shape[2] * devices.shape[3])
    ]
    found: list[set[int]] = []
    for hosts in dict.fromkeys(map(frozenset, rows)):
        met = [group for group in found if group & hosts]
        found = [group for group in found if group not in met] + [hosts.union(*met)]
    found.sort(key=lambda group: next(i for i, hosts in enumerate(rows) if hosts & group))
    if len({sum(hosts <= group for hosts in rows) for group in found}) > 1:
        found = [set().union(*found)]
    return [sorted(group) for group in found]


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
      ValueError: a dimension does not divide by its mesh axes; the message gives both numbers.
    """
    letters = table.LETTERS[path]
    lead = len(shape) - len(letters)  # a layer axis is never split
    sizes = dict(zip(letters, shape[lead:], strict=True))
    axes: list[tuple[str, ...]] = [()] * len(letters)
    for letter, wanted in RULES:
        spent = {axis for each in axes for axis in each}
        free = tuple(a for a in wanted if mesh.shape.get(a, 1) > 1 and a not in spent)
        if letter not in letters or not free:
            continue
        parts = math.prod(mesh.shape[axis] for axis in free)
        if sizes[letter] % parts:
            if letter == "K":
                continue
            named = " and ".join(map(repr, free))
            raise ValueError(
                f"{path}: a dimension of {sizes[letter]} does not divide by the {parts} "
                f"devices of mesh {'axes' if len(free) > 1 else 'axis'} {named}"
            )
        axes[letters.index(letter)] = free
    return PartitionSpec(*[None] * lead, *map(spread.plain, axes))


def shardings(tree: Any, mesh: Mesh) -> Any:
    """The sharding of every parameter of a model, or of its state, abstract or not."""
    place = lambda path, leaf: NamedSharding(mesh, spec(table.split(path)[0], leaf.shape, mesh))
    return jax.tree_util.tree_map_with_path(place, tree)


def of_batch(shape: tuple[int, ...], mesh: Mesh, *, tokens: bool, lead: int = 0) -> NamedSharding:
    """Where an array of a batch belongs: rows over the devices, tokens over `context`.

    Args:
      tokens: whether it is [B L], rather than about clips or pairs.
      lead: axes in front, as of parts to accumulate.
    """
    context = "context" if tokens and len(shape) == lead + 2 else None
    return NamedSharding(mesh, PartitionSpec(*[None] * lead, ROWS, *[context] * bool(context)))


def of_cache(cache: Cache, mesh: Mesh) -> Cache:
    """Where keys and values belong: rows over data and fsdp, heads over tensor."""

    def place(x):
        letters = {0: "", 2: "B slots", 4: "B slots K H", 5: "layer B slots K H"}[x.ndim]
        return NamedSharding(mesh, spread.spec(letters, x.shape, mesh.shape))

    return jax.tree.map(place, cache)
