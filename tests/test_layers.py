"""Norms, rotary positions, attention and stacks do what their formulas say."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qwen2audio_jax import layers


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def wide(*arrays):
    return [np.asarray(a, np.float64) for a in arrays]


def softmax_attention(q, k, v, mask):
    """By the book, in float64: one key and value head for every query head."""
    q, k, v = wide(q, k, v)
    scores = np.einsum("blnh,bsnh->bnls", q, k) / np.sqrt(q.shape[-1])
    scores = np.where(mask[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bnls,bsnh->blnh", weights / weights.sum(-1, keepdims=True), v)


def test_gradients_of_a_table_add_up_in_float32():
    """Of a word that is met thousands of times in bfloat16, too; of others as by itself."""
    table = normal(0, 6, 8)
    ids = jnp.array([[3] * 9999, [1] * 9000 + [5] * 999])
    gradients = 0.3 + normal(1, *ids.shape, 8)

    def slope(look_up, dtype):
        out, back = jax.vjp(lambda table: look_up(table, ids), table.astype(dtype))
        np.testing.assert_array_equal(out, table.astype(dtype)[ids])
        return back(gradients.astype(dtype))[0]

    wanted = slope(lambda table, ids: table[ids], jnp.float32)
    np.testing.assert_allclose(slope(layers.look_up, jnp.float32), wanted, rtol=1e-6)
    short = slope(layers.look_up, jnp.bfloat16)
    assert short.dtype == jnp.bfloat16
    np.testing.assert_allclose(short.astype(jnp.float32), wanted, rtol=1e-2)


def test_rms_norm_is_cast_before_its_weight():
    """In bfloat16 the normed value is rounded, and then the product: as the reference does."""
    norm = layers.RMSNorm(64, 1e-6, dtype=jnp.bfloat16)
    norm.scale.set_value((1 + 0.3 * normal(0, 64)).astype(jnp.bfloat16))
    x = (3 * normal(1, 5, 64)).astype(jnp.bfloat16)
    (y,) = wide(x)
    y = jnp.array(y / np.sqrt((y * y).mean(-1, keepdims=True) + 1e-6)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(norm(x), y * norm.scale[...])


def test_linear_rounds_once():
    """bfloat16 products and bias are added in float32."""
    linear = layers.Linear(48, (4, 8), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    linear.bias.set_value(normal(0, 4, 8).astype(jnp.bfloat16))
    x = normal(1, 3, 48).astype(jnp.bfloat16)
    a, kernel, bias = (y.astype(jnp.float32) for y in (x, linear.kernel[...], linear.bias[...]))
    wanted = (jnp.einsum("ai,ijk->ajk", a, kernel) + bias).astype(jnp.bfloat16)
    np.testing.assert_array_equal(linear(x), wanted)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_linear_multiplies_what_is_short_on_the_way_back_too(platform, monkeypatch):
    """No product is of two float32 factors, which GPUs take twice as long for."""
    monkeypatch.setattr(layers, "one_cpu", lambda: False)
    linear = layers.Linear(16, (4, 8), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    graph, params = nnx.split(linear)
    slopes = jax.grad(lambda params, x: nnx.merge(graph, params)(x).sum(), argnums=(0, 1))
    x = normal(0, 3, 16).astype(jnp.bfloat16)
    program = jax.jit(slopes).trace(params, x).lower(lowering_platforms=(platform,)).as_text()
    factors = re.findall(r"dot_general.*?: \(tensor<([^>]*)>, tensor<([^>]*)>\)", program)
    assert len(factors) == 2
    assert all(each.endswith("bf16") for pair in factors for each in pair)


def test_gradients_of_linear_are_rounded_once():
    """Those of bfloat16 factors, added up in float32."""
    linear = layers.Linear(48, 24, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    graph, params = nnx.split(linear)
    x, slope = normal(1, 30, 48).astype(jnp.bfloat16), normal(2, 30, 24).astype(jnp.bfloat16)
    _, back = jax.vjp(lambda params, x: nnx.merge(graph, params)(x), params, x)
    got, dx = back(slope)
    a, b, kernel = (y.astype(jnp.float32) for y in (x, slope, linear.kernel[...]))
    for mine, wanted in (
        (got["kernel"][...], a.T @ b),
        (got["bias"][...], b.sum(0)),
        (dx, b @ kernel.T),
    ):
        np.testing.assert_allclose(wide(mine)[0], wanted, rtol=2**-8, atol=1e-5)


def test_the_gated_mlp_is_swiglu():
    mlp = layers.GatedMLP(6, 10, rngs=nnx.Rngs(0))
    x = normal(0, 2, 3, 6)
    y, gate, up, down = wide(x, mlp.gate.kernel[...], mlp.up.kernel[...], mlp.down.kernel[...])
    wanted = (y @ gate / (1 + np.exp(-(y @ gate))) * (y @ up)) @ down
    np.testing.assert_allclose(mlp(x), wanted, rtol=1e-5, atol=1e-6)


def test_rotary_scores_depend_on_distance_alone():
    """Moving a query and a key together changes no score; moving one does."""
    q, k = normal(0, 1, 1, 2, 8), normal(1, 1, 1, 2, 8)
    turn = lambda x, at: layers.rotate(x, jnp.full((1, 1), at), 10_000.0)
    score = lambda i, j: jnp.einsum("blnh,blnh->n", turn(q, i), turn(k, j))
    np.testing.assert_allclose(score(7, 3), score(104, 100), rtol=1e-4, atol=1e-5)
    assert np.abs(score(7, 3) - score(8, 3)).min() > 1e-3


def test_rotary_turns_halves_by_their_angles():
    """Component i and i + H/2 turn by position * theta^(-2i/H); position 0 stays."""
    x, positions = normal(0, 1, 3, 1, 6), jnp.array([[0, 1, 50]])
    pairs = np.asarray(x[..., :3]) + 1j * np.asarray(x[..., 3:])
    turned = pairs * np.exp(1j * np.array([0, 1, 50])[:, None, None] * 100.0 ** (-np.arange(3) / 3))
    wanted = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(layers.rotate(x, positions, 100.0), wanted, rtol=1e-5, atol=1e-5)


def example(kv_heads=2):
    """Queries of four heads, keys and values, and the segments of a packed and a padded row."""
    q, k, v = normal(0, 2, 7, 4, 8), normal(1, 2, 7, kv_heads, 8), normal(2, 2, 7, kv_heads, 8)
    return q, k, v, jnp.array([[1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 1, 0, 0]])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("offset", [None, 0])
def test_attention_is_softmax_attention(kv_heads, offset):
    """Within a segment, causal or not; a key head serves as many query heads as share it."""
    q, k, v, segments = example(kv_heads)
    mask = np.array(segments[:, :, None] == segments[:, None])
    if offset is not None:
        mask &= np.tri(7, dtype=bool)
    repeat = functools.partial(jnp.repeat, repeats=4 // kv_heads, axis=2)
    how = {"q_segments": segments, "k_segments": segments, "offset": offset}
    seen = jax.jit(lambda *qkv: layers.attend(*qkv, **how))(q, k, v)
    wanted = softmax_attention(q, repeat(k), repeat(v), mask)
    np.testing.assert_allclose(seen, wanted, rtol=1e-4, atol=1e-5)


def test_a_query_sees_up_to_its_own_slot():
    """With the first query in slot 3, query i sees the slots 0 to 3 + i."""
    q, k, *_ = example()
    weights = layers.attention_weights(
        q[:, :2], k, q_segments=jnp.ones((2, 2), int), k_segments=jnp.ones((2, 7), int), offset=3
    )
    np.testing.assert_array_equal(
        weights[0, 0] > 0, [[True] * 4 + [False] * 3, [True] * 5 + [False] * 2]
    )
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)


def test_weights_to_look_at_are_those_attended_by():
    """What `attend` gives is the values weighted by `attention_weights`."""
    q, k, v, segments = example()
    how = {"q_segments": segments, "k_segments": segments, "offset": 0}
    weights = layers.attention_weights(q, k, **how)
    wanted = jnp.einsum("bnls,bsnh->blnh", weights, jnp.repeat(v, 2, axis=2))
    np.testing.assert_allclose(layers.attend(q, k, v, **how), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("queries", [3, 4, 100])
@pytest.mark.parametrize("offset", [None, 0])
def test_attention_by_head_equals_attention_at_once(monkeypatch, queries, offset):
    """The CPU's way, blocks that do not divide the length among them: values and gradients."""
    q, k, v, segments = example()
    how = {"q_segments": segments, "k_segments": segments, "offset": offset}

    def gradients():
        def total(*qkv):
            seen = layers.attend(*qkv, **how)
            return (seen**2).sum(), seen

        return jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    at_once = gradients()
    monkeypatch.setattr(layers, "CPU_SCORES", 0)
    monkeypatch.setattr(layers, "CPU_QUERIES", queries)
    by_head = gradients()
    for a, b in zip(jax.tree.leaves(by_head), jax.tree.leaves(at_once), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scores", [0, 10**9])
def test_a_query_that_sees_nothing_is_finite(monkeypatch, scores):
    """Padding whose segment no key has gives no NaN, forward or backward."""
    monkeypatch.setattr(layers, "CPU_SCORES", scores)
    q, k, v, _ = example()
    alone = {"q_segments": jnp.full((2, 7), 5), "k_segments": jnp.ones((2, 7), int), "offset": 0}
    total = lambda q, k, v: layers.attend(q, k, v, **alone).sum()
    value, gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(q, k, v)
    assert all(np.isfinite(x).all() for x in (value, *gradients))


def test_softmax_is_float32_in_bfloat16():
    """Thousands of equal keys: weights that bfloat16 could not add up still make a mean."""
    q, k = jnp.zeros((1, 1, 1, 8), jnp.bfloat16), jnp.zeros((1, 4099, 1, 8), jnp.bfloat16)
    v = jnp.ones((1, 4099, 1, 8), jnp.bfloat16)
    ones = {"q_segments": jnp.ones((1, 1), int), "k_segments": jnp.ones((1, 4099), int)}
    weights = layers.attention_weights(q, k, **ones)
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-4)
    np.testing.assert_allclose(layers.attend(q, k, v, **ones).astype(jnp.float32), 1, rtol=4e-3)


class Affine(nnx.Module):
    def __init__(self, rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (3, 3)))


@pytest.mark.parametrize("per_block", [False, True])
def test_a_scanned_stack_runs_as_a_list_of_its_blocks(per_block):
    """`x` is threaded through in order; every block gets its own and gives its own."""

    def step(block, x, own):
        x = jnp.tanh(x @ block.kernel[...]) + (0 if own is None else own)
        return x, x.sum()

    x, own = normal(0, 2, 3), normal(1, 4, 2, 3)
    stacked = layers.stack(Affine, 4, scan=True, rngs=nnx.Rngs(0))
    assert stacked.kernel.shape == (4, 3, 3)
    listed = layers.stack(Affine, 4, scan=False, rngs=nnx.Rngs(0))
    assert not np.allclose(listed[0].kernel[...], listed[1].kernel[...])
    for block, kernel in zip(listed, stacked.kernel[...], strict=True):
        block.kernel.set_value(kernel)
    last, outs = layers.run(stacked, step, x, own if per_block else None)
    wanted, each = layers.run(listed, step, x, list(own) if per_block else None)
    np.testing.assert_allclose(last, wanted, rtol=1e-6)
    np.testing.assert_allclose(outs, jnp.stack(each), rtol=1e-5)
