"""What a compiled program costs is counted from its text, loops in full."""

import math

import jax
import jax.numpy as jnp
import pytest

from qwen2audio_jax import sharding, spread
from qwen2audio_jax.training import collectives, hlo, operations
from qwen2audio_jax.training.chips import CHIPS, links, route


def costs(f, *shapes, devices=1, unknown=1):
    text = jax.jit(f).lower(*shapes).compile().as_text()
    return hlo.Program(text, devices=devices, unknown=unknown).costs()


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_the_body_of_a_loop_counts_as_often_as_it_runs():
    """Seven products of [64 64]; with a number of rounds that depends on data, as many as said."""
    once = 2 * 64**3
    scanned = lambda x, ws: jax.lax.scan(lambda x, w: (x @ w, None), x, ws)[0]
    assert costs(scanned, shape(64, 64), shape(7, 64, 64)).flops == 7 * once
    open_ended = lambda x, n: jax.lax.fori_loop(0, n, lambda _, x: x @ x, x)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    assert costs(open_ended, shape(64, 64), number, unknown=5).flops == 5 * once


def test_loops_of_a_scope_count_as_often_as_is_said_of_it():
    """Whatever is said of others; of a scope within another, the inner one's."""

    def f(x, n):
        with jax.named_scope("outer"):
            x = jax.lax.fori_loop(0, n, lambda _, x: x @ x, x)
            with jax.named_scope("inner"):
                return jax.lax.fori_loop(0, n, lambda _, x: x @ x, x)

    number = jax.ShapeDtypeStruct((), jnp.int32)
    text = jax.jit(f).lower(shape(64, 64), number).compile().as_text()
    count = lambda **said: (
        hlo.Program(text, devices=1, unknown=5, scopes=said).costs().flops / (2 * 64**3)
    )
    assert (count(), count(inner=7), count(outer=2)) == (5 + 5, 5 + 7, 2 + 2)
    assert count(outer=2, inner=7, scope=9) == 2 + 7


LOOP = """
%cond (p: (u32[], f32[4,4])) -> pred[] {
  %p = (u32[], f32[4,4]) parameter(0)
  %i = u32[] get-tuple-element(%p), index=0
  %n = u32[] constant(8)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}
%body (q: (u32[], f32[4,4])) -> (u32[], f32[4,4]) {
  %q = (u32[], f32[4,4]) parameter(0)
  %j = u32[] get-tuple-element(%q), index=0
  %x = f32[4,4] get-tuple-element(%q), index=1
  %step = u32[] constant(STEP)
  %next = u32[] add(%j, %step)
  %y = f32[4,4] dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (u32[], f32[4,4]) tuple(%next, %y)
}
ENTRY %main (x0: f32[4,4]) -> (u32[], f32[4,4]) {
  %x0 = f32[4,4] parameter(0)
  %start = u32[] constant(START)
  %first = (u32[], f32[4,4]) tuple(%start, %x0)
  ROOT %w = (u32[], f32[4,4]) while(%first), condition=%cond, body=%body
}
"""


@pytest.mark.parametrize(("start", "step", "rounds"), [(0, 1, 8), (0, 2, 4), (3, 2, 3), (8, 1, 0)])
def test_unrolled_loops_count_by_their_steps(start, step, rounds):
    """As the compiler for TPUs leaves products that wait for their parts: by twos."""
    text = LOOP.replace("START", str(start)).replace("STEP", str(step))
    assert hlo.Program(text, devices=1, unknown=99).costs().flops == rounds * 2 * 4**3


def test_a_slice_of_a_stack_costs_its_own_bytes():
    """A scan reads each of its layers once, not the stack as often as there are layers."""
    scanned = lambda x, ws: jax.lax.scan(lambda x, w: (jnp.sin(x * w), None), x, ws)[0]
    one = 512 * 512 * 4
    assert 16 * 3 * one <= costs(scanned, shape(512, 512), shape(16, 512, 512)).bytes < 16 * 8 * one


NESTED = """
%inner (a: f32[32,8,8], i: s32[]) -> f32[8,8] {
  %a = f32[32,8,8] parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %part = f32[1,8,8] dynamic-slice(%a, %i, %zero, %zero), dynamic_slice_sizes={1,8,8}
  ROOT %flat = f32[8,8] bitcast(%part)
}
%outer (b: f32[32,8,8], j: s32[], w: f32[8,8]) -> f32[8,8] {
  %b = f32[32,8,8] parameter(0)
  %j = s32[] parameter(1)
  %w = f32[8,8] parameter(2)
  %x = f32[8,8] fusion(%b, %j), kind=kLoop, calls=%inner
  ROOT %y = f32[8,8] dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
ENTRY %main (c: f32[32,8,8], k: s32[], v: f32[8,8]) -> f32[8,8] {
  %c = f32[32,8,8] parameter(0)
  %k = s32[] parameter(1)
  %v = f32[8,8] parameter(2)
  ROOT %z = f32[8,8] fusion(%c, %k, %v), kind=kOutput, calls=%outer
}
"""


def test_so_does_a_slice_within_a_fusion_of_a_fusion():
    """One layer of 32, a matrix, an index, and the result."""
    found = hlo.Program(NESTED, devices=1).costs()
    assert found.bytes == 3 * 8 * 8 * 4 + 4
    assert found.flops == 2 * 8**3


RESHAPED = """
%inner (a: f32[32,8]) -> f32[8,32] {
  %a = f32[32,8] parameter(0)
  ROOT %flat = f32[8,32] bitcast(%a)
}
%outer (b: f32[32,8], w: f32[8,8]) -> f32[8,32] {
  %b = f32[32,8] parameter(0)
  %w = f32[8,8] parameter(1)
  %x = f32[8,32] fusion(%b), kind=kLoop, calls=%inner
  ROOT %y = f32[8,32] dot(%w, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
ENTRY %main (c: f32[32,8], v: f32[8,8]) -> f32[8,32] {
  %c = f32[32,8] parameter(0)
  %v = f32[8,8] parameter(1)
  ROOT %z = f32[8,32] fusion(%c, %v), kind=kOutput, calls=%outer
}
"""


def test_what_a_fusion_only_shapes_anew_is_read_by_the_one_around_it():
    """As the compiler for TPUs has it of a product's weights: both operands and the result."""
    assert hlo.Program(RESHAPED, devices=1).costs().bytes == (2 * 32 + 8) * 8 * 4


def test_convolutions_count_what_meets_an_input():
    """As XLA's own count has it: padding is no work."""
    conv = lambda x, w: jax.lax.conv_general_dilated(
        x, w, (2,), ((1, 1),), dimension_numbers=("NWC", "WIO", "NWC")
    )
    line = (
        "ENTRY %main (x: f32[2,10,3], w: f32[3,3,5]) -> f32[2,5,5] {\n"
        "  %x = f32[2,10,3]{2,1,0} parameter(0)\n  %w = f32[3,3,5]{2,1,0} parameter(1)\n"
        "  ROOT %c = f32[2,5,5]{2,1,0} convolution(%x, %w), window={size=3 stride=2 pad=1_1}, "
        "dim_labels=b0f_0io->b0f\n}\n"
    )
    wanted = jax.jit(conv).lower(shape(2, 10, 3), shape(3, 3, 5)).cost_analysis()["flops"]
    assert hlo.Program(line, devices=1).costs().flops == wanted == 2 * 2 * 5 * 3 * (3 * 5 - 1)


def test_what_devices_exchange_is_counted_in_bytes_they_take_in():
    """A matrix split over eight devices is gathered; a sum over them goes around twice."""
    mesh = sharding.mesh(fsdp=8)
    split = jax.NamedSharding(mesh, jax.P("fsdp"))
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=split)
    with jax.set_mesh(mesh):
        whole = costs(lambda x: spread.constrain(x * 2, "rows columns"), x, devices=8)
        summed = costs(lambda x: x.sum(axis=0), x, devices=8)
    (gather,) = whole.collectives
    assert gather.kind == "all-gather" and gather.group == tuple(range(8))
    assert gather.bytes == 64 * 64 * 4 * 7 / 8
    assert summed.by_kind() == {"all-reduce": {"count": 1, "bytes": 2 * 64 * 4 * 7 / 8}}


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,2},{1,3}}", (0, 2)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b','a'}", (0, 4, 1, 5, 2, 6, 3, 7)),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", (0, 2)),
        ("replica_groups=mesh['a'=8] {'a':(1)4}", (0, 2, 4, 6)),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", (0, 2, 4, 6)),
        ("replica_groups={}", tuple(range(8))),
        ("source_target_pairs={{3,4},{4,3}}", (3, 4)),
    ],
)
def test_groups_are_read_in_every_form(text, group):
    assert collectives.group(text, 8) == group


def test_a_group_in_another_form_is_not_guessed():
    with pytest.raises(ValueError, match="wanted replica_groups in a known form, got all"):
        collectives.group("replica_groups=all", 8)
    with pytest.raises(ValueError, match="wanted a mesh in a known order, got , device_ids=any"):
        collectives.group("replica_groups=mesh['a'=8], device_ids=any {'a'}", 8)


CHAIN = """
%start (p: f32[8]) -> (f32[8], f32[64]) {
  %p = f32[8]{0} parameter(0)
  %g = f32[64]{0} all-gather(%p), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %t = (f32[8]{0}, f32[64]{0}) tuple(%p, %g)
}
%done (a: f32[8], b: f32[64]) -> f32[64] {
  %a = f32[8]{0} parameter(0)
  %b = f32[64]{0} parameter(1)
  ROOT %h = f32[64]{0} all-gather(%a), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}
}
ENTRY %main (x: f32[8]) -> f32[64] {
  %x = f32[8]{0} parameter(0)
  %s = (f32[8]{0}, f32[64]{0}) fusion(%x), output_to_operand_aliasing={{0}: (0, {})}, calls=%start
  %u = f32[8]{0} get-tuple-element(%s), index=0
  %v = f32[64]{0} get-tuple-element(%s), index=1
  %more = f32[64]{0} all-gather(%u), channel_id=8, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %r = f32[64]{0} fusion(%u, %v), output_to_operand_aliasing={{}: (1, {})}, calls=%done
}
"""


def test_an_exchange_that_goes_on_meanwhile_counts_once():
    """What begins it and what ends it both name it, by its channel; another one is another one."""
    found = hlo.Program(CHAIN, devices=8).costs().collectives
    assert [(each.channel, each.bytes, each.exposed) for each in found] == [
        ("7", 224.0, False),  # it goes on meanwhile
        ("8", 224.0, True),
    ]


AWAY = """
ENTRY %main (x: f32[8,64], w: f32[64,64]) -> f32[8,64] {
  %x = f32[8,64]{1,0} parameter(0)
  %w = f32[64,64]{1,0} parameter(1)
  %kept = f32[4,8,64]{2,1,0:S(5)} custom-call(), custom_call_target="AllocateBuffer"
  %i = s32[] constant(0)
  %b = f32[1,8,64]{2,1,0} bitcast(%x)
  %out = ((f32[4,8,64]{2,1,0:S(5)}, f32[1,8,64]{2,1,0}, s32[], s32[], s32[]), \
f32[4,8,64]{2,1,0:S(5)}, u32[]{:S(2)}) dynamic-update-slice-start(%kept, %b, %i, %i, %i)
  %s = (f32[8,64]{1,0}, f32[8,64]{1,0}) collective-permute-start(%x), channel_id=1, \
source_target_pairs={{0,1},{1,0}}
  WORK
  %r = f32[8,64]{1,0} collective-permute-done(%s)
  %o = f32[4,8,64]{2,1,0:S(5)} dynamic-update-slice-done(%out)
  %in = ((f32[4,8,64]{2,1,0:S(5)}, s32[], s32[], s32[]), f32[1,8,64]{2,1,0}, u32[]{:S(2)}) \
dynamic-slice-start(%o, %i, %i, %i)
  %back = f32[1,8,64]{2,1,0} dynamic-slice-done(%in)
  ROOT %y = f32[8,64]{1,0} bitcast(%back)
}
""".replace("\\\n", "")
WORK = "%d = f32[8,64]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}"


def test_what_goes_to_the_host_and_comes_back_is_counted():
    """The part that is written there and read there, of both memories, and no more."""
    found = hlo.Program(AWAY.replace("WORK", ""), devices=2).costs()
    assert found.host == 2 * 8 * 64 * 4 == found.bytes


@pytest.mark.parametrize(("work", "exposed"), [(WORK, False), ("", True)])
def test_an_exchange_hides_behind_work(work, exposed):
    """One that is awaited as soon as it is begun does not."""
    (exchange,) = hlo.Program(AWAY.replace("WORK", work), devices=2).costs().collectives
    assert exchange.exposed is exposed


def test_links_depend_on_how_a_group_lies():
    """A row of a 4 x 4 has no ring, one of a 16 x 16 has; a whole pod uses both axes."""
    chip, row = CHIPS["v5e"], lambda n: [(i, 0, 0) for i in range(n)]
    assert links(chip, row(4), (4, 4, 1)) == chip.link
    assert links(chip, row(16), (16, 16, 1)) == 2 * chip.link
    pod = [(i, j, 0) for i in range(16) for j in range(16)]
    assert links(chip, pod, (16, 16, 1)) == 4 * chip.link


def test_cubes_are_rings_on_all_axes_or_none():
    """Of chips that optical switches join: a block that is no cube wide is none."""
    chip, line = CHIPS["v5p"], [(0, 0, i) for i in range(4)]
    assert links(chip, line, (2, 2, 4)) == chip.link
    assert links(chip, line, (4, 4, 4)) == 2 * chip.link


def test_what_all_send_to_all_crosses_the_middle():
    """Half of what half of the chips have: over a line's middle, or over a ring's two. Of that each
    keeps a part for itself: two neighbours exchange half of theirs, over one link."""
    chip, row = CHIPS["v5e"], lambda n: [(i, 0, 0) for i in range(n)]
    assert links(chip, row(2), (4, 4, 1), to_all=True) == chip.link
    assert links(chip, row(4), (4, 4, 1), to_all=True) == chip.link * 3 / 4
    assert links(chip, row(16), (16, 16, 1), to_all=True) == chip.link / 2 * 15 / 16


def test_what_is_sent_takes_the_shorter_way():
    """Over the ends of an axis where they are linked, else back along it."""
    chip = CHIPS["v5e"]  # rings from 16 on
    assert len(list(route(chip, (0, 0), (3, 2), (4, 4)))) == 5
    assert list(route(chip, (0, 0), (15, 0), (16, 4))) == [((0, 0), 0, -1)]
    assert [link[2] for link in route(chip, (14, 0), (1, 0), (16, 4))] == [1, 1, 1]


def test_collectives_that_were_combined_count_together():
    """An all-gather of two arrays at once: what comes out, less what was there."""
    line = (
        "ENTRY %main (a: f32[8], b: bf16[4,2]) -> f32[64] {\n"
        "  %a = f32[8]{0} parameter(0)\n  %b = bf16[4,2]{1,0} parameter(1)\n"
        "  %s = ((f32[8]{0}, bf16[4,2]{1,0}), (f32[64]{0}, bf16[32,2]{1,0})) all-gather-start("
        "%a, %b), replica_groups=[1,8]<=[8], dimensions={0}\n"
        "  %d = (f32[64]{0}, bf16[32,2]{1,0}) all-gather-done(%s)\n"
        "  ROOT %r = f32[64]{0} get-tuple-element(%d), index=0\n}\n"
    )
    (gather,) = hlo.Program(line, devices=8).costs().collectives
    assert gather.bytes == (64 * 4 + 64 * 2) * 7 / 8


def carried(kind, target, work=""):
    """A program in which hosts carry a megabyte to other slices, beside other work or not."""
    told = (
        "is_host_transfer=true, frontend_attributes={"
        '_xla_host_transfer_handler_name="xla_megascale_runtime",'
        '_xla_host_transfer_rendezvous="x_0",'
        f'_xla_megascale_target={target},_xla_megascale_transfer_type="{kind}"}}\n'
    )
    many = "bf16[64,8,1024]{2,1,0}"
    return (
        f"ENTRY %main (a: {many}) -> {many} {{\n"
        f"  %a = {many} parameter(0)\n  %t = token[] after-all()\n"
        f"  %s = ({many}, u32[], token[]) send(%a, %t), channel_id=2, {told}"
        f"  %r = ({many}, u32[], token[]) recv(%t), channel_id=1, {told}"
        f"{work}"
        f"  %sd = token[] send-done(%s), channel_id=2, {told}"
        f"  %rd = ({many}, token[]) recv-done(%r), channel_id=1, {told}"
        f"  ROOT %o = {many} get-tuple-element(%rd), index=0\n}}\n"
    )


FOUR_SLICES = '"{1,2,3,4}x{0:255}"'
DEVICES = "{{100000,100001,200000,200001},{100002,100003,200002,200003}}"


@pytest.mark.parametrize(
    ("kind", "target", "name", "moved"),
    [
        ("ALL_REDUCE", FOUR_SLICES, "all-reduce", 1.5),
        ("REDUCE_SCATTER", FOUR_SLICES, "reduce-scatter", 0.75),
        ("ALL_GATHER", DEVICES, "all-gather", 1),
        ("ALL_TO_ALL", DEVICES, "all-to-all", 0.5),
        ("ONE_TO_ONE", "{{100000->200000},{100001->200001}}", "collective-permute", 1),
    ],
)
def test_what_hosts_carry_between_slices_counts(kind, target, name, moved):
    """Once, though sent and received: as the compiler for TPUs leaves what several slices do."""
    (found,) = hlo.Program(carried(kind, target), devices=8).costs().collectives
    assert found.kind == f"{name} between slices" and found.network and found.exposed
    assert found.bytes == moved * 2**20
    beside = "  %w = f32[8,8]{1,0} custom-call(%t)\n"
    (hidden,) = hlo.Program(carried(kind, target, beside), devices=8).costs().collectives
    assert not hidden.exposed


def test_what_hosts_carry_in_a_way_that_is_unknown_is_refused():
    with pytest.raises(ValueError, match=r"wanted an exchange of ALL_REDUCE, .*, got BROADCAST"):
        hlo.Program(carried("BROADCAST", DEVICES), devices=8).costs()


@pytest.mark.parametrize("rows", [(), (1,), (2,)])
def test_flash_attention_costs_queries_times_keys(rows):
    """On a device that has a quarter of a row's queries, and all of its keys."""
    text = 'custom_call_target="tpu_custom_call", metadata={op_name="whole/splash_mha_fwd"}'
    shapes = [(*rows, 4, 256, 64), (*rows, 4, 1024, 64), (*rows, 4, 1024, 64)]
    wanted = 2 * 2 * math.prod(rows) * 4 * 256 * 1024 * 64
    assert operations.kernel("splash_mha_fwd", text, shapes) == wanted


@pytest.mark.parametrize(("shards", "seen"), [(1, 0.5), (2, 0.75), (4, 0.875)])
def test_the_slowest_of_those_who_share_a_row_is_counted(shards, seen):
    """It has the last of the tokens, and sees all of the past but a half of its own part."""
    text = 'custom_call_target="tpu_custom_call", metadata={op_name="causal/splash_mha_fwd"}'
    length = 2**17  # so long that a block more or less is nothing
    shapes = [(4, length // shards, 64), (4, length, 64), (4, length, 64)]
    wanted = 2 * 2 * 4 * (length // shards) * length * 64 * seen
    assert operations.kernel("splash_mha_fwd", text, shapes) == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize(("causal", "seen"), [("whole", 1), ("causal", 1 - 7 / 16)])
def test_flash_attention_reads_keys_for_each_block_of_queries(causal, seen):
    """Eight blocks of 512; two heads share keys. Backward it is the queries' that come again."""
    text = f'custom_call_target="tpu_custom_call", metadata={{op_name="{causal}/splash_mha"}}'
    shapes = [(4, 4096, 64), (2, 4096, 64), (2, 4096, 64)]
    read = lambda name, sizes: operations.read_again(name, text, shapes, sizes)
    assert read("splash_mha_fwd", [8.0, 4.0, 4.0]) == pytest.approx((2 * 8 * seen - 1) * 8)
    assert read("splash_mha_dkv", [8.0, 4.0, 4.0, 1.0, 8.0]) == pytest.approx((8 * seen - 1) * 17)
    short = [(4, 128, 64), (4, 128, 64), (4, 128, 64)]
    assert operations.read_again("splash_mha_fwd", text, short, [1.0, 1.0, 1.0]) == 0
    assert operations.read_again("fwd", text.replace("splash", "other"), shapes, [1.0] * 3) == 0
