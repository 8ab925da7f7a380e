"""Flash attention is attention."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.interpreters import mlir  # in the place of a kernel that no CPU has

from qwen2audio_jax import flash, layers, sharding, spread

LENGTH = 200  # no multiple of a block


def example():
    """Queries of four heads on two of keys; a row of two samples, and one that is padded."""
    draw = lambda seed, heads: jax.random.normal(jax.random.key(seed), (2, LENGTH, heads, 16))
    two = np.repeat([1, 2], [90, 110])
    padded = np.repeat([1, 0], [150, 50])
    return draw(0, 4), draw(1, 2), draw(2, 2), jnp.array([two, padded])


def gradients(q, k, v, segments, offset):
    how = {"k_segments": segments, "offset": offset}
    how["q_segments"] = segments if offset == 0 else jnp.ones_like(segments)
    weight = jnp.cos(jnp.arange(q.size).reshape(q.shape)) * (how["q_segments"] > 0)[..., None, None]
    total = lambda *qkv: (layers.attend(*qkv, **how) * weight).sum()
    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(q, k, v)


@pytest.mark.parametrize("offset", [0, None], ids=["decoder", "encoder"])
def test_flash_is_dot_product(offset):
    """Samples of a row apart, padding and clips' ends unheard: the value, and all gradients."""
    wanted = gradients(*example(), offset)
    with flash.using("flash"):
        found = gradients(*example(), offset)
    for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize(
    ("offset", "sizes"),
    [(0, {"data": 2, "tensor": 2, "context": 2}), (None, {"data": 2, "tensor": 4})],
    ids=["decoder", "encoder, and more devices than keys have heads"],
)
def test_flash_on_a_mesh_is_flash(offset, sizes):
    """Rows, heads and a decoder's queries on devices of their own, keys whole: the value, and all
    gradients."""
    wanted = gradients(*example(), offset)
    with flash.using("flash"), jax.set_mesh(sharding.mesh(**sizes)):
        found = gradients(*example(), offset)
    for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4)


def cudnn_of(gpu):
    """jax's own module, which would ask a GPU."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    gpu.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    gpu.setattr(cudnn, "check_compute_capability", lambda wanted: True)
    gpu.setattr(cudnn, "is_cuda_compute_capability_equal", lambda wanted: False)
    return cudnn


@pytest.fixture
def gpu(monkeypatch):
    """What a GPU would run, up to cuDNN's own kernel."""
    monkeypatch.setattr(flash.spread, "platform", lambda: "gpu")
    return monkeypatch


@pytest.mark.parametrize("length", [LENGTH, LENGTH - 1], ids=["even", "odd"])
@pytest.mark.parametrize("offset", [0, None], ids=["decoder", "encoder"])
def test_gpus_are_told_the_same_attention(gpu, offset, length):
    """jax's plain form of what cuDNN is asked for: the value, and all gradients."""
    *qkv, segments = (x[:, :length] for x in example())
    half = [x.astype(jnp.bfloat16) for x in qkv]
    wanted = gradients(*(x.astype(jnp.float32) for x in half), segments, offset)
    gpu.setattr(flash, "CUDNN", "xla")
    with flash.using("flash"):
        found = gradients(*half, segments, offset)
    for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        assert np.linalg.norm(a - b) < 0.02 * np.linalg.norm(b)


@pytest.mark.parametrize(
    ("offset", "kernel"),
    [(0, "fmhaScaleBiasSoftmax"), (None, "fmhaSoftmax")],
    ids=["decoder", "encoder"],
)
def test_gpus_run_cudnns_kernel(gpu, offset, kernel):
    """Forward and backward, for a GPU that is not here: what is compiled calls it; an encoder's
    clips are told by their lengths, without any array of queries by keys."""
    cudnn_of(gpu)
    *qkv, segments = example()
    half = [x.astype(jnp.bfloat16) for x in qkv]
    how = {"q_segments": jnp.ones_like(segments), "k_segments": segments, "offset": offset}
    total = lambda *qkv: layers.attend(*qkv, **how).astype(jnp.float32).sum()
    with flash.using("flash"):
        traced = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(*half)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert f"${kernel}(" in text and f"${kernel}Backward(" in text
    assert (f"{LENGTH}x{LENGTH}x" in text) == (offset == 0)


@pytest.mark.parametrize(
    ("sizes", "heads", "offset", "local"),
    [
        ({"fsdp": 8}, (4, 4), 0, (1, 4, 4)),
        ({"fsdp": 8}, (4, 4), None, (1, 4, 4)),
        ({"fsdp": 4, "tensor": 2}, (4, 2), 0, (2, 2, 1)),
        ({"fsdp": 2, "tensor": 4}, (12, 2), 0, (4, 3, 3)),
        ({"fsdp": 2, "tensor": 4}, (12, 2), None, (4, 3, 3)),
    ],
    ids=["rows", "clips", "heads", "more devices than keys have heads", "clips, likewise"],
)
def test_gpus_of_a_mesh_run_it_on_their_own_rows_and_heads(gpu, sizes, heads, offset, local):
    """jax's rule of how cuDNN's kernel is split takes ours; in its place here are plain sums."""
    cudnn, seen = cudnn_of(gpu), []
    for kernel in (cudnn._dot_product_attention_fwd_p, cudnn._dot_product_attention_bwd_p):

        def sums(*arrays, kernel=kernel, **how):
            seen.append([x.shape for x in arrays])
            shapes = [jax.core.ShapedArray(x.shape, x.dtype) for x in arrays]
            out, _ = kernel.abstract_eval(*shapes, **how)
            all_in = sum(x.astype(jnp.float32).sum() for x in arrays)
            return [jnp.full(x.shape, all_in, x.dtype) for x in out]

        mlir.register_lowering(kernel, mlir.lower_fun(sums, multiple_results=True), platform="cpu")
    rows, length, mesh = 8, 256, sharding.mesh(**sizes)
    shapes = [(rows, length, n, 64) for n in (heads[0], heads[1], heads[1])]
    qkv = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    places = sharding.of_batch((rows, length), mesh, tokens=False)
    segments = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=places)
    letters = ("B L N H", "B slots K H") if offset == 0 else ("C positions N H",) * 2

    def total(q, k, v, segments):
        q, k, v = (spread.constrain(x, letters[i > 0]) for i, x in enumerate((q, k, v)))
        own = segments if offset == 0 else jnp.ones_like(segments)
        how = {"q_segments": own, "k_segments": segments, "offset": offset}
        return layers.attend(q, k, v, **how).astype(jnp.float32).sum()

    with flash.using("flash"), jax.set_mesh(mesh):
        jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(*qkv, segments).compile()
    assert len(seen) >= 2
    for q, k, v, _, q_lengths, k_lengths, *_ in seen:
        assert (q[0], q[2], k[2]) == local and k == v
        assert offset == 0 or q_lengths == k_lengths == (local[0],)


def test_gpus_have_it_where_it_pays(gpu):
    """Of long rows, in halves, on what cuDNN's kernel is for: heads of eights, NVIDIA's Ampere."""
    shape = lambda length=256, width=64, dtype=jnp.bfloat16: jnp.zeros((1, length, 2, width), dtype)
    serves = lambda **how: flash.serves(shape(**how), shape(**how), 0)
    here = types.SimpleNamespace(compute_capability="9.0")
    gpu.setattr(jax, "local_devices", lambda: [here])
    assert not serves()  # of several GPUs without a mesh
    with jax.set_mesh(sharding.mesh(data=4, context=2)):
        assert not serves()
    with jax.set_mesh(sharding.mesh(data=8)):
        assert serves()
        for how in ({"length": 255}, {"width": 36}, {"width": 136}, {"dtype": jnp.float32}):
            assert not serves(**how)
        for capability, wanted in (
            ("8.0", True),
            ("10.0", True),
            ("7.5", False),
            ("gfx942", False),
        ):
            here.compute_capability = capability
            assert serves() is wanted


def test_gpus_refuse_what_cudnn_has_not(gpu):
    *qkv, segments = example()
    how = {"q_segments": segments, "k_segments": segments, "offset": 0}
    with flash.using("flash"), pytest.raises(ValueError, match="wants bfloat16, got float32"):
        layers.attend(*qkv, **how)
    half = [x.astype(jnp.bfloat16) for x in qkv]
    for width in (36, 136):
        wide = [jnp.zeros((*x.shape[:-1], width), x.dtype) for x in half]
        with flash.using("flash"), pytest.raises(ValueError, match=f"to 128 wide, got {width}"):
            layers.attend(*wide, **how)
    with (
        flash.using("flash"),
        jax.set_mesh(sharding.mesh(data=4, context=2)),
        pytest.raises(ValueError, match="without context parallelism"),
    ):
        jax.eval_shape(lambda *qkv: layers.attend(*qkv, **how), *half)


def test_who_chooses_for_himself_gets_none_on_a_cpu():
    """It has none; and keys of a cache are read as ever."""
    q, k, *_ = example()
    assert not flash.serves(q, k, 0)
    with flash.using("flash"):
        assert flash.serves(q, k, 0) and not flash.serves(q[:, :1], k, jnp.array(3))
    with flash.using("dot_product"):
        assert not flash.serves(q, k, 0)


def test_blocks_of_queries_are_attention(monkeypatch):
    """Where scores would not fit they are made for some queries at a time."""
    q, k, v, segments = example()
    mask = segments[:, :, None] == segments[:, None]
    grouped = q.reshape(2, LENGTH, 2, 2, 16)
    wanted = layers._attend(grouped, k, v, mask)
    monkeypatch.setattr(flash, "SCORES", q[..., 0].size * LENGTH // 7)
    np.testing.assert_allclose(
        flash.by_queries(layers._attend, grouped, k, v, mask), wanted, rtol=1e-5, atol=1e-6
    )
