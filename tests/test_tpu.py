"""What is said of TPUs is what their compiler says; skipped where that is not installed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen2audio_jax import config, sharding
from qwen2audio_jax.mel import audio_tokens
from qwen2audio_jax.training import compiled, placement, topology
from qwen2audio_jax.training.chips import CHIPS, GIB
from train import pods
from train.compile import Compile

pytest.importorskip("libtpu")
describe = functools.cache(topology.describe)


def test_every_row_of_the_table_has_its_mesh():
    """Chips are described, and the mesh divides the model and the rows: what would otherwise be
    found out after the hour that the rows before it take."""
    steps = {*pods.TABLE, *pods.CHIPS_GROW, *pods.SOUND_GROWS}
    for step in steps:
        given = tyro.cli(Compile, args=step.command.split())
        there = describe(given.topology, slices=given.slices)
        assert len(there.devices) == step.count * there.chip.cores
        mesh = given.mesh.make(there.devices)
        sharding.check(config.preset(given.model), mesh)
        rows = mesh.shape["data"] * mesh.shape["fsdp"]
        assert given.batch % rows == 0 and given.tokens % mesh.shape["context"] == 0
        assert given.clips * audio_tokens(given.frames) < given.tokens
        assert step.sound == given.clips * given.frames / 100


@pytest.mark.parametrize("name", CHIPS)
def test_a_chip_has_as_much_memory_as_the_compiler_allows(name):
    """As it says when it refuses a program; v4's two cores are one device, 7x's are two."""
    there = describe(f"{name}:2x2" if name in ("v5e", "v6e") else f"{name}:2x2x1")
    assert len(there.devices) == 4 * CHIPS[name].cores
    assert {device.device_kind for device in there.devices} == {CHIPS[name].kind}
    place = NamedSharding(Mesh(np.array(there.devices), "a"), PartitionSpec())
    much = jax.ShapeDtypeStruct((2**33, 128), jnp.int8, sharding=place)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED") as refused:
        jax.jit(lambda x: x[::-1] + 1).lower(much).compile()
    _, room, _ = compiled._refusal(str(refused.value))
    assert room == int(CHIPS[name].hbm * GIB)


def test_a_token_reads_weights_and_cache_once():
    """And makes the products of both; what a call of many tokens begins and ends with is shared."""
    whole = config.preset("qwen2-audio-7b")
    sizes = dataclasses.replace(whole, decoder=dataclasses.replace(whole.decoder, layers=2))
    there = describe("v5e:1x2")
    mesh = sharding.mesh(devices=there.devices, tensor=2)
    work = topology.Work(batch=32, tokens=2048)
    lowered = topology.lower("decode", sizes, work, topology.settings_of("decode"), mesh)
    report, _ = compiled.compile(lowered, there)
    decoder = placement.by_name({"decoder": nnx.state(lowered.held["model"]["decoder"])})
    read = [x for name, x in decoder.items() if "embed" not in name]
    each = compiled._bytes(read) + report.held["cache"]
    assert each < report.hbm_bytes < 1.2 * each
    assert report.flops_ratio == pytest.approx(1, abs=0.02)
    assert report.ahead_bytes == 0 and report.limit == "memory"
