"""A step is compiled from shapes alone, the same that training runs, and wastes nothing."""

import dataclasses
import importlib.util
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from qwen2audio_jax import Qwen2Audio, sharding
from qwen2audio_jax.data.pack import Bucket, Group, Sample, Text
from qwen2audio_jax.mel import audio_tokens
from qwen2audio_jax.training import arrays, collectives, compiled, hlo, loss, placement, topology
from qwen2audio_jax.training.chips import CHIPS
from qwen2audio_jax.training.objective import learner_of
from qwen2audio_jax.training.topology import Work

WORK = Work(batch=8, tokens=32, frames=40)
LONG = Work(batch=8, tokens=160, frames=40)  # whose scores would be the largest array
WORDS = dataclasses.replace(  # many of them, and as many layers as no other size
    small.EVEN,
    encoder=dataclasses.replace(small.EVEN.encoder, layers=7),
    decoder=dataclasses.replace(small.EVEN.decoder, vocabulary=4096, layers=7),
)


@pytest.fixture(scope="module")
def mesh():
    return sharding.mesh(fsdp=4, tensor=2)


def settings(stage="sft", **how):
    return topology.settings_of(stage, dtype="bfloat16", remat_policy="full", **how)


@pytest.mark.parametrize("stage", ["sft", "dpo", "dpo-precomputed"])
def test_the_program_of_shapes_is_the_one_that_trains(mesh, stage):
    """A learner of arrays and one of shapes lower to the same text: of a batch as data come in."""
    abstract = topology.lower(stage, small.EVEN, WORK, settings(stage), mesh)
    model = Qwen2Audio(small.EVEN, rngs=nnx.Rngs(0))
    text = Text(ids=np.arange(5, 9, dtype=np.int32), learned=np.arange(4) > 1)
    pair = stage != "sft"
    known = (-1.0, -2.0) if stage == "dpo-precomputed" else ()
    sample = Sample(texts=(text,) * (1 + pair), pictures=(), valid=(), reference=known)
    bucket = Bucket(rows=WORK.batch, tokens=WORK.tokens, clips=WORK.batch, frames=WORK.frames)
    group = Group(bucket, packed=not pair)
    assert group.take(sample, 0)
    batch = group.arrays(sample.kind, mels=small.EVEN.encoder.mels, pad=small.EVEN.pad_token)
    real = learner_of(settings(stage), model, mesh).lower(batch)
    assert abstract.program.as_text() == real.as_text()


@pytest.mark.parametrize("stage", topology.STAGES)
def test_every_stage_has_a_program(mesh, stage):
    """Made without an array, and with operations that the model needs."""
    lowered = topology.lower(stage, small.EVEN, WORK, settings(stage), mesh)
    assert lowered.flops > 0
    assert placement.is_abstract(lowered.held)
    assert "bytes a device" in placement.table(lowered.held)


def test_each_loop_of_the_loss_has_its_own_rounds(mesh):
    """60 learned tokens by 20; all 100 states of a clip, which CTC reads, by 13: both ways."""
    lowered = topology.lower(
        "sft", small.EVEN, Work(batch=8, tokens=160, frames=400), settings(ctc=0.3), mesh
    )
    assert (lowered.loops, lowered.scopes) == (3, {loss.SPELT: 8})
    text = lowered.program.compile().as_text()
    program = hlo.Program(text, devices=8, unknown=1003, scopes={loss.SPELT: 1008})
    rounds = [
        program._trips(each, body)
        for body in program.computations.values()
        for each in body.values()
        if each.op == "while"
    ]
    assert sorted(n for n in rounds if n > 1000) == [1003, 1003, 1008, 1008]


def chips(slices, each):
    """A line of chips on each slice."""
    return [
        types.SimpleNamespace(coords=(i, 0, 0), slice_index=number)
        for number in range(slices)
        for i in range(each)
    ]


def exchange(found, devices, shape):
    """Seconds of it on slices of this shape, which nobody has."""
    there = mock.Mock(spec=topology.Topology, chip=CHIPS["v5e"], shape=shape)
    mesh = types.SimpleNamespace(devices=np.array(devices))
    return compiled._exchange([found], mock.Mock(spec=topology.Lowered, mesh=mesh), there)


@pytest.mark.parametrize(
    ("kind", "crossing", "near"),
    [
        ("all-gather", 1e9, 7e9),  # of the other slice's four parts each chip fetches one
        ("all-reduce", 1e9, 7e9),
        # of the seven others' parts, four are of the other slice; two chips send one to each of two
        # over the middle of their own line
        ("all-to-all", 4e9, 4e9),
    ],
)
def test_what_crosses_the_network_depends_on_the_kind(kind, crossing, near):
    """Two slices of a line of four; each chip takes in 7 GB."""
    devices = chips(2, 4)
    found = collectives.Collective(
        kind, 7e9, "", tuple(range(8)), (), times=1.0, where="", channel=None, exposed=True
    )
    seconds = crossing / 3.125e9 + near / 45e9
    assert exchange(found, devices, (4, 1)) == pytest.approx(seconds)


def test_what_hosts_carry_takes_as_long_as_their_network():
    found = collectives.Collective(
        kind="all-reduce between slices",
        bytes=1e9,
        shape="",
        group=(),
        pairs=(),
        times=3.0,
        where="",
        channel=None,
        exposed=True,
        network=True,
    )
    assert exchange(found, chips(2, 4), (4, 1)) == pytest.approx(3e9 / 3.125e9)


def test_of_three_slices_more_crosses():
    """Twelve chips, four on each slice: of the eleven others' parts, eight are of other slices; and
    four cross the middle of a line."""
    devices = chips(3, 4)
    found = collectives.Collective(
        "all-to-all",
        11e9,
        "",
        tuple(range(12)),
        (),
        times=2.0,
        where="",
        channel=None,
        exposed=True,
    )
    seconds = 2 * (8e9 / 3.125e9 + 4e9 / 45e9)
    assert exchange(found, devices, (4, 1)) == pytest.approx(seconds)


def stacks_gathered(trained, text, devices=8):
    """All-gathers, or sums, of which a result has as many values as a stack, `tensor` being split
    or not: of some sizes on the compiler for TPUs fetches by adding up zeros and a part. (Gradients
    of what is whole everywhere, as small biases are, are added up at once.)"""
    stacks = {
        (x.shape[0], x.size // parts): name
        for name, x in placement.by_name(trained).items()
        for parts in (1, 2)
        if ".blocks." in name and x.ndim > 2 and not x.sharding.is_fully_replicated
    }
    gathers = [
        each
        for each in hlo.Program(text, devices=devices).costs().collectives
        if each.kind in ("all-gather", "all-reduce")
    ]
    assert gathers and stacks
    results = [arrays.shape(x) for each in gathers for x in arrays.each(each.shape)]
    return [stacks[key] for x in results for n in x if (key := (n, np.prod(x))) in stacks]


def largest(text, devices=8):
    """Values of the largest array that a device has."""
    return max(np.prod(shape) for shape in hlo.Program(text, devices=devices).shapes())


def test_a_step_gathers_no_stack_and_holds_no_scores(mesh):
    """Parameters come a layer at a time; nowhere is there an array of [B L V]."""
    lowered = topology.lower("sft", WORDS, LONG, settings(), mesh)
    text = lowered.program.compile().as_text()
    assert largest(text) < LONG.batch * LONG.tokens * WORDS.decoder.vocabulary // 8
    assert not stacks_gathered(lowered.held["trained"], text)


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 4}, {"fsdp": 8}])
def test_no_device_has_what_all_clips_say(sizes):
    """Of a pod's clips it has their own, or some columns of all: nowhere [C A E] or [C A D]."""
    work = Work(batch=16, tokens=160, clips=3, frames=140)
    clips, states = work.batch * work.clips, audio_tokens(work.frames)
    lowered = topology.lower("sft", small.EVEN, work, settings(), sharding.mesh(**sizes))
    text = lowered.program.compile().as_text()
    found = [shape for shape in hlo.Program(text, devices=8).shapes() if states in shape]
    assert found and max(map(np.prod, found)) < clips * states * small.EVEN.encoder.width


@pytest.mark.parametrize("over", [(None, None, "tensor"), ()])
def test_a_stack_that_is_gathered_is_noticed(mesh, over):
    """Over `fsdp` alone, or all of it."""
    place = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))

    def loss(kernel):
        kernel = jax.lax.with_sharding_constraint(kernel, place(*over))
        x, _ = jax.lax.scan(lambda x, up: (jnp.tanh(x @ up), None), jnp.ones((8, 16)), kernel)
        return x.sum()

    kernel = jax.ShapeDtypeStruct((3, 16, 16), np.float32, sharding=place(None, "fsdp", "tensor"))
    text = jax.jit(jax.grad(loss)).lower(kernel).compile().as_text()
    trained = {"decoder": {"blocks": {"up": kernel}}}
    assert "decoder.blocks.up" in stacks_gathered(trained, text)


def test_mistakes_are_lines(mesh, monkeypatch):
    """Numbers that do not divide, chips that are none, a compiler that is not there."""
    lower = lambda **how: topology.lower(
        "sft", small.EVEN, Work(**{**vars(WORK), **how}), settings(), mesh
    )
    with pytest.raises(ValueError, match=r"6 rows do not split over the 4 devices of .* fsdp"):
        lower(batch=6)
    with pytest.raises(ValueError, match="wanted batch of at least 1, got 0"):
        lower(batch=0)
    with pytest.raises(ValueError, match="more than the 10 tokens of their clips, got 8"):
        lower(tokens=8)
    with pytest.raises(ValueError, match=r"wanted a topology as v5e:4x4, of v4, .* 'v9:2'"):
        topology.describe("v9:2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'qwen2audio_jax\[tpu\]'"):
        topology.describe("v5e:4x4")


def test_a_refusal_says_what_is_needed_and_by_what():
    """As the compiler for TPUs words it."""
    said = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.50G of 15.75G hbm. "
        "Exceeded hbm capacity by 1.75G.\n\nLargest program allocations in hbm:\n\n"
        '  1. Size: 2.00G\n     Operator: op_name="jit(step)/dot"\n'
        "     Shape: f32[4,8]{1,0:T(8,128)}\n     Unpadded size: 2.00G\n"
    )
    used, there, largest = compiled._refusal(said)
    assert (used, there) == (int(17.5 * 2**30), int(15.75 * 2**30))
    assert largest == ("2.00G: f32[4,8]{1,0:T(8,128)} jit(step)/dot",)
    short = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (3.00T) exceeds available HBM (15.75G)."
    )
    assert compiled._refusal(short) == (3 * 2**40, int(15.75 * 2**30), ())
    assert compiled._refusal("INTERNAL: " + said.partition(": ")[2]) is None
    assert compiled._refusal("RESOURCE_EXHAUSTED: of something else") is None


@pytest.mark.slow
@pytest.mark.parametrize("work", [WORK, Work(batch=4, tokens=256, frames=40)])
def test_the_real_compiler_takes_a_step(work):
    """For chips that are not here, of several rows a chip, and of one long enough for flash
    attention: a layer's parameters are fetched at a time, and no scores of a row's tokens are held;
    skipped where the extra is not installed."""
    pytest.importorskip("libtpu")
    there = topology.describe("v5e:2x2")
    lowered = topology.lower(
        "sft", WORDS, work, settings(), sharding.mesh(devices=there.devices, fsdp=4)
    )
    report, program = compiled.compile(lowered, there)
    assert report.fits and report.argument_bytes < report.hbm_peak_bytes < report.hbm_chip_bytes
    assert report.flops > report.model_flops and 0 < report.mfu_bound <= 1
    # Every parameter of the blocks is fetched for both directions, and each gradient is summed.
    trained = placement.by_name(lowered.held["trained"])
    held = sum(x.size for name, x in trained.items() if ".blocks." in name)
    assert report.collectives["all-gather"]["bytes"] > 2 * held
    assert {"reduce-scatter", "all-reduce"} & report.collectives.keys()
    text = program.as_text()
    assert not stacks_gathered(lowered.held["trained"], text, devices=4)
    assert largest(text, devices=4) < work.batch * work.tokens * WORDS.decoder.vocabulary // 4
    flash = work.tokens >= 256
    assert ("tpu_custom_call" in text) == flash
