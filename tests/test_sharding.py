"""A model on a mesh is the same model, with nothing large on every device."""

import dataclasses
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from jax.sharding import PartitionSpec

from qwen2audio_jax import sharding, spread, weights
from qwen2audio_jax.config import PRESETS, Config, DecoderConfig, EncoderConfig, preset
from qwen2audio_jax.data.pack import Bucket
from qwen2audio_jax.model import Qwen2Audio
from qwen2audio_jax.spread import AXES
from qwen2audio_jax.training import placement
from qwen2audio_jax.training.settings import MeshConfig
from qwen2audio_jax.weights import conversion, table

SHAPE = Config(
    encoder=EncoderConfig(layers=2, width=32, heads=4, hidden=64, mels=80),
    decoder=DecoderConfig(
        layers=2, width=64, heads=4, kv_heads=2, head_width=16, hidden=96, vocabulary=256
    ),
    audio_token=3,
    pad_token=0,
    end_tokens=(0, 2),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same model in Hugging Face's format and in ours."""
    theirs, ours = (tmp_path_factory.mktemp(name) for name in ("theirs", "ours"))
    reference.save(reference.build(SHAPE), theirs)
    conversion.from_huggingface(theirs, ours)
    return theirs, ours


@pytest.mark.parametrize("kind", [0, 1], ids=["theirs", "ours"])
@pytest.mark.parametrize("scan_layers", [True, False])
def test_a_mesh_changes_no_logits(folders, kind, scan_layers):
    """Eight devices give what one gives, from either format, in either form."""
    mesh = sharding.mesh(fsdp=4, tensor=2)
    ids = np.random.default_rng(0).integers(4, 256, (4, 12)).astype(np.int32)
    one = weights.load(folders[0])
    many = weights.load(folders[kind], mesh=mesh, scan_layers=scan_layers)
    np.testing.assert_allclose(np.asarray(many(ids)), np.asarray(one(ids)), atol=1e-4)
    places = jax.tree.leaves(sharding.shardings(nnx.state(many), mesh))
    for array, place in zip(jax.tree.leaves(nnx.state(many)), places, strict=True):
        assert array.sharding.is_equivalent_to(place, array.ndim)


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "tiny"])
def test_nothing_large_is_on_every_device(name):
    """Each matrix of every published size is split over all of fsdp and tensor."""
    mesh = sharding.mesh(fsdp=4, tensor=2)
    state = nnx.state(nnx.eval_shape(lambda: Qwen2Audio(preset(name), rngs=nnx.Rngs(0))))
    leaves = zip(
        jax.tree_util.tree_flatten_with_path(state)[0],
        jax.tree.leaves(sharding.shardings(state, mesh)),
        strict=True,
    )
    for (path, leaf), place in leaves:
        per_layer = leaf.size // (leaf.shape[0] if "blocks" in table.split(path)[0] else 1)
        if per_layer > 2**20:
            shard = np.prod(place.shard_shape(leaf.shape))
            assert leaf.size / shard >= 4, (table.split(path), place.spec)


def test_each_axis_is_spent_once():
    """The more important letter has it; a layer axis is never split."""
    mesh = sharding.mesh(fsdp=2, tensor=4)
    spec = lambda path, *shape: sharding.spec(path, shape, mesh)
    assert spec("decoder.blocks.mlp.up.kernel", 64, 96) == PartitionSpec("fsdp", "tensor")
    assert spec("decoder.blocks.mlp.up.kernel", 3, 64, 96) == PartitionSpec(None, "fsdp", "tensor")
    assert spec("projector.kernel", 32, 64) == PartitionSpec(None, "fsdp")
    assert spec("encoder.conv2.kernel", 3, 32, 32) == PartitionSpec(None, "fsdp", None)


def test_what_does_not_divide_is_refused_with_both_numbers(folders):
    """Four heads do not go on eight devices; the parameter is named."""
    mesh = sharding.mesh(tensor=8)
    with pytest.raises(ValueError, match=r"query.kernel: a dimension of 4 .* 8 devices .*'tensor'"):
        weights.load(folders[0], mesh=mesh)


def test_a_mesh_that_is_no_mesh_is_refused():
    with pytest.raises(ValueError, match=r"no mesh axis model; there are data, fsdp"):
        sharding.mesh(model=8)
    with pytest.raises(ValueError, match=r"needs 3 devices, there are 8"):
        sharding.mesh(fsdp=3)


def test_an_activation_takes_the_axes_that_divide_it():
    """Rows, heads, tokens: each axis once, the more important letter first; the rest is whole."""
    sizes = {"data": 2, "fsdp": 1, "tensor": 2, "context": 2}
    split = lambda letters, *shape, **first: spread.spec(letters, shape, sizes, **first)
    assert split("B L D", 4, 8, 6) == PartitionSpec("data", ("context", "tensor"), None)
    assert split("B L N H", 4, 8, 4, 6) == PartitionSpec("data", "context", "tensor", None)
    assert split("B L D", 3, 2, 6) == PartitionSpec(None, "context", None)
    assert split("B L V", 4, 8, 6, V=("data",)) == PartitionSpec(
        None, ("context", "tensor"), "data"
    )
    x = jnp.ones((4, 8, 6))
    assert spread.constrain(x, "B L D") is x  # no mesh is set


def test_who_shares_a_row_shares_its_parameters():
    """`context` splits what `fsdp` splits."""
    mesh = sharding.mesh(fsdp=2, context=4)
    spec = sharding.spec("decoder.blocks.mlp.up.kernel", (2, 64, 96), mesh)
    assert spec == PartitionSpec(None, ("fsdp", "context"), None)
    with pytest.raises(
        ValueError, match=r"of 12 .* the 8 devices of mesh axes 'fsdp' and 'context"
    ):
        sharding.spec("decoder.blocks.mlp.up.kernel", (12, 96), mesh)


def test_a_table_says_what_each_device_holds():
    """Bytes are those of a shard."""
    mesh = sharding.mesh(fsdp=4, tensor=2)
    place = jax.sharding.NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    x = jax.ShapeDtypeStruct((64, 96), np.float32, sharding=place)
    told = placement.table({"trained": {"up": x}}).splitlines()
    assert told[1].split() == ["trained", "up", "64/fsdp", "x", "96/tensor", "float32", "3,072"]
    assert told[2].split() == ["trained", "all", "24,576", "bytes", "in", "all", "3,072"]
    told = placement.activations(mesh).splitlines()
    assert told[1].split() == ["rows", "fsdp"]
    assert ["vocabulary", "tensor"] in [line.split() for line in told]
    assert placement.activations(sharding.mesh(fsdp=8)).endswith("clips                     fsdp")


@dataclasses.dataclass(frozen=True, eq=False)  # itself, as devices are: jax keeps meshes by them
class Chip:
    """What is asked of a device that is not here."""

    process_index: int
    id: int = 0
    slice_index: int = 0
    coords: tuple[int, ...] = (0, 0, 0)
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"


def test_the_rows_of_a_host_are_next_to_each_other():
    """However chips are wired: a ring over 4x4 of them comes back to the first host at its end."""
    ring = np.array([Chip(host) for host in (0, 0, 1, 1, 1, 1, 0, 2, 3, 3, 3, 3, 2, 2, 2, 0)])
    found = sharding._by_host(ring.reshape(1, 16, 1, 1))
    assert found.shape == (1, 16, 1, 1)
    assert [chip.process_index for chip in found.flat] == [h for h in range(4) for _ in range(4)]


@pytest.mark.parametrize(
    ("hosts", "wanted"),
    [
        ((0, 0, 1, 1), [[0], [1]]),
        ((0, 1, 0, 1), [[0, 1]]),
        ((3, 2, 0, 1, 2, 3, 1, 0), [[2, 3], [0, 1]]),
        ((0, 1, 1, 2, 3, 3, 2, 0), [[0, 1, 2, 3]]),  # three and one would have rows of two sizes
    ],
)
def test_hosts_that_share_rows_are_of_one_group(hosts, wanted):
    """Groups are in the order of their rows, which come next to each other."""
    devices = np.array([Chip(host) for host in hosts]).reshape(1, -1, 2, 1)
    assert sharding.groups(devices) == wanted
    ordered = [chip.process_index for chip in sharding._by_host(devices).flat]
    each = len(ordered) // len(wanted)
    assert [sorted({*ordered[i : i + each]}) for i in range(0, len(ordered), each)] == wanted


def test_a_host_gives_its_devices_their_part_of_its_groups_rows():
    """Of rows that are those of the second of two groups, each device gets its own."""
    mesh = sharding.mesh(fsdp=4, context=2)
    where = sharding.of_batch((8, 6), mesh, tokens=True)
    whole = np.arange(48).reshape(8, 6)
    asked = lambda group: placement._part(whole[4 * group :][:4], (8, 6), group, axis=0)
    for device, index in where.devices_indices_map((8, 6)).items():
        group = int(np.argwhere(mesh.devices == device)[0][1] >= 2)
        np.testing.assert_array_equal(asked(group)(index), whole[index])


def test_what_every_host_has_goes_to_devices_without_being_gathered(monkeypatch):
    """As `jax.device_put` would from several hosts, to see that they have the same."""
    mesh = sharding.mesh(fsdp=8)
    place = jax.sharding.NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    there, mine = jax.device_put(jnp.ones((2, 8)), place), jnp.arange(16.0).reshape(2, 8)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "device_put", lambda *_: pytest.fail("gathered"))
    put = placement.put({"mine": mine}, {"mine": place})["mine"]
    assert put.sharding == place and len(put.addressable_shards) == 8
    np.testing.assert_array_equal(put, mine)
    monkeypatch.undo()
    assert placement.put({"there": there}, {"there": place})["there"].sharding == place


@pytest.mark.parametrize(
    ("rows", "feeds", "wide", "empty"),
    [(2, 1, "8x100,40x60", 6), (3, 1, "6x100,30x60", 5), (8, 1, "8x100,40x60", 0), (3, 4, "6x", 4)],
)
def test_shared_batches_have_rows_for_all_devices(rows, feeds, wide, empty):
    """As many times as they go into the devices; how many rows a step would add is known."""
    bucket, mesh = Bucket(rows=rows, tokens=100, clips=5 * rows, frames=60), sharding.mesh(fsdp=8)
    (made,) = placement.widened([bucket], mesh)
    assert str(made).startswith(wide)
    assert placement.widened([bucket], None) == (bucket,)
    assert placement.empty_rows(bucket, feeds, mesh) == empty
    shape = jax.ShapeDtypeStruct((rows * feeds, 100), np.int32)
    assert placement.place({"labels": shape}, mesh)["labels"].shape[0] == rows * feeds + empty


def test_slices_that_nobody_mentions_are_told_of():
    """With the flag that is missing, rather than by an assertion of jax's."""
    devices = [types.SimpleNamespace(platform="tpu", slice_index=i // 4) for i in range(8)]
    message = r"of 2 slices: wanted .*, as --mesh.dcn-data-parallelism 2, got 1$"
    with pytest.raises(ValueError, match=message):
        sharding._laid_out((1, 8, 1, 1), (1, 1, 1, 1), devices)
    with pytest.raises(ValueError, match=r"of 2 slices: wanted .*, got 4$"):
        sharding._laid_out((1, 2, 1, 1), (4, 1, 1, 1), devices)


def pod(*, slices: int, side: int, **kind: str) -> list[Chip]:
    """Chips of slices of side x side, four of them on a host."""
    return [
        Chip(
            (number * side // 2 + y // 2) * side // 2 + x // 2,
            id=number * side**2 + y * side + x,
            slice_index=number,
            coords=(x, y, 0),
            **kind,
        )
        for number in range(slices)
        for y in range(side)
        for x in range(side)
    ]


def test_an_axis_of_several_slices_may_be_a_part_of_a_side():
    """128 of a 16 x 16, on each of two slices, which are the outermost."""
    devices = pod(slices=2, side=16)
    found = sharding._laid_out((2, 128, 1, 1), (2, 1, 1, 1), devices)
    assert found.shape == (4, 128, 1, 1)
    assert [{d.slice_index for d in copy.flat} for copy in found] == [{0}, {0}, {1}, {1}]
    assert len({device.id for device in found.flat}) == len(devices)


class Device(Chip):
    """What passes for a device of jax's."""

    __class__ = jax.Device


def on_hosts(chips: list[Chip], each: int | None = None) -> list[Chip]:
    """The same chips as devices; so many of them on each host, if given."""
    host = lambda chip: chip.process_index if each is None else chip.id // each
    return [Device(**(vars(chip) | {"process_index": host(chip)})) for chip in chips]


def slices_along(mesh, axis: str) -> set[tuple[int, ...]]:
    """The slices that are met on the way along an axis."""
    marks = np.vectorize(lambda device: device.slice_index, otypes=[int])(mesh.devices)
    lines = np.moveaxis(marks, AXES.index(axis), -1).reshape(-1, mesh.shape[axis])
    return {tuple(line.tolist()) for line in lines}


def test_the_axis_that_is_to_cross_slices_does_and_no_other():
    """Two slices of four hosts, four chips each: each host's rows are next to each other too."""
    devices = on_hosts(pod(slices=2, side=4))
    mesh = sharding.mesh(devices=devices, dcn={"fsdp": 2}, data=2, fsdp=8)
    assert slices_along(mesh, "fsdp") == {(0,) * 8 + (1,) * 8}
    assert slices_along(mesh, "data") == {(0, 0), (1, 1)}
    hosts = [device.process_index for device in mesh.devices.flat]
    assert len(list(itertools.groupby(hosts))) == 8 and len(set(hosts)) == 8


@pytest.mark.parametrize(
    ("dcn", "sizes", "crosses"),
    [
        ({"data": 2}, {"data": 2, "fsdp": 2}, "data"),
        ({"fsdp": 2}, {"fsdp": 4}, "fsdp"),
        ({"fsdp": 2}, {"fsdp": 2, "tensor": 2}, "fsdp"),
        ({"tensor": 2}, {"data": 2, "fsdp": 2}, "tensor"),
    ],
)
def test_slices_of_one_host_are_crossed_as_asked(dcn, sizes, crosses):
    """Wherever a host's rows can be next to each other."""
    devices = on_hosts(pod(slices=2, side=2), 4)
    mesh = sharding.mesh(devices=devices, dcn=dcn, **sizes)
    met = {axis for axis in AXES if any(len({*line}) > 1 for line in slices_along(mesh, axis))}
    assert met == {crosses}


def test_rows_are_brought_together_within_their_slice():
    """Of two slices that fsdp crosses, with two hosts each, whose chips are wired in turns."""
    hosts = np.array([[0, 1, 0, 1, 2, 3, 2, 3], [1, 0, 1, 0, 3, 2, 3, 2]])
    chips = [Chip(int(host), slice_index=int(host) // 2) for host in hosts.flat]
    found = sharding._by_host(np.array(chips).reshape(2, 8, 1, 1), over=(1, 2, 1, 1))
    ordered = [chip.process_index for chip in found.flat]
    assert ordered == [host for host in (0, 2, 1, 3) for _ in range(4)]


def test_rows_of_a_host_that_a_mesh_parts_are_refused():
    """Each of two hosts, which are slices, would have a half of both copies: nothing is undone."""
    devices = on_hosts(pod(slices=2, side=2), 4)
    message = r"^dcn fsdp of 2 parts the rows of hosts: wanted ici data of 1, .* ici data of 2$"
    with pytest.raises(ValueError, match=message):
        sharding.mesh(devices=devices, dcn={"fsdp": 2}, data=2, fsdp=2)


def test_gpus_of_each_host_are_a_slice():
    """As XLA numbers them: without a word they are refused, with -1 there are as many as hosts."""
    gpus = pod(slices=2, side=2, platform="gpu", device_kind="NVIDIA H100")
    with pytest.raises(ValueError, match=r"as --mesh.dcn-data-parallelism 2"):
        sharding._laid_out((1, 8, 1, 1), (1, 1, 1, 1), gpus)
    over = MeshConfig(dcn_data_parallelism=-1)._filled("dcn", 2)
    found = sharding._laid_out((1, 4, 1, 1), tuple(over.values()), gpus)
    assert [[d.slice_index for d in copy.flat] for copy in found] == [[0] * 4, [1] * 4]


def test_what_jax_cannot_lay_out_is_a_line(monkeypatch):
    def refuses(*args, **how):
        raise NotImplementedError("Failed to find assignment")

    monkeypatch.setattr(sharding.mesh_utils, "create_device_mesh", refuses)
    with pytest.raises(ValueError, match=r"no mesh of \(1, 8, 1, 1\) for these devices: Failed"):
        sharding.mesh(fsdp=8)
