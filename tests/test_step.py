"""A step moves the parameters against the gradient, however its samples are laid out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from qwen2audio_jax import Qwen2Audio, layers, sharding
from qwen2audio_jax.training import loss, optimizer, step
from qwen2audio_jax.training.loss import Sums
from qwen2audio_jax.training.optimizer import OptimizerConfig

FRAMES = [30, 13, 21, 9, 26, 17, 24, 12]


def parabola(params, batch):
    """The mean of `batch` times the squares of the parameters' elements."""
    total = (params["x"] ** 2).sum() * batch.sum()
    return Sums(total, jnp.array(batch.size), {"seen": batch.sum()})


def test_a_step_is_the_optimizer_s_update():
    """Plain gradient descent on a parabola, by hand; in one go and in two parts."""
    for batch, parts in (([2.0, 2.0], 1), ([[2.0], [2.0]], 2)):
        descent = optax.sgd(0.1)
        state = step.start({"x": jnp.array([1.0, -2.0])}, descent)
        state, logs = step.update(
            state,
            jnp.array(batch),
            loss=parabola,
            optimizer=descent,
            gradient_accumulation_steps=parts,
        )
        np.testing.assert_allclose(state.params["x"], [0.6, -1.2], rtol=1e-6)
        assert state.step == 1 and logs["seen"] == 4.0 and logs["skipped"] == 0
        np.testing.assert_allclose(logs["loss"], 10.0)
        np.testing.assert_allclose(logs["grad_norm"], np.hypot(4, 8), rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_moves_nothing(bad):
    """It is counted, and training goes on as if the batch had never been."""
    adam = OptimizerConfig(warmup_steps=0, ema_decay=0.5).make()

    def run(batches):
        state = step.start({"decoder": {"x": jnp.array([1.0, -2.0])}}, adam)
        parabola_of = lambda params, batch: parabola(params["decoder"], batch)
        for batch in batches:
            state, _ = step.update(state, jnp.array([batch]), loss=parabola_of, optimizer=adam)
        return state

    clean, hurt = run([2.0, 3.0]), run([2.0, bad, 3.0])
    assert (hurt.step, hurt.skipped) == (3, 1) and clean.skipped == 0
    for a, b in zip(*map(jax.tree.leaves, (hurt, clean)), strict=True):
        if a.dtype == np.float32:
            np.testing.assert_array_equal(a, b)


def test_a_batch_without_its_parts_is_refused():
    state = step.start({"x": jnp.ones(2)}, optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"a batch in 3 parts to accumulate, got one in \{2\}"):
        step.update(
            state,
            jnp.ones(2),
            loss=parabola,
            optimizer=optax.sgd(0.1),
            gradient_accumulation_steps=3,
        )


@pytest.fixture(scope="module")
def plain():
    """Eight samples, a row each, as short as they can be."""
    inputs = small.inputs(FRAMES, length=12)
    learned = (inputs["attention_mask"] == 1) & (inputs["input_ids"] != small.CONFIG.audio_token)
    return inputs | {"labels": np.where(learned, inputs["input_ids"], loss.IGNORED)}


TOKENS = ("input_ids", "attention_mask", "labels")


def padded(batch):
    """The same rows, longer."""
    fill = lambda name: -100 if name == "labels" else 0
    longer = lambda name: np.pad(batch[name], ((0, 0), (3, 8)), constant_values=fill(name))
    return batch | {name: longer(name) for name in TOKENS}


def packed(batch):
    """Three samples in the first row, five in the second."""
    kept = [mask == 1 for mask in batch["attention_mask"]]
    rows = {name: [] for name in (*TOKENS, "segment_ids")}
    for samples in (range(3), range(3, 8)):
        size = lambda b: int(kept[b].sum())
        pad = 64 - sum(map(size, samples))
        fill = lambda x, value, pad=pad: np.pad(np.concatenate(x), (0, pad), constant_values=value)
        for name in TOKENS:
            each = [batch[name][b][kept[b]] for b in samples]
            rows[name].append(fill(each, -100 if name == "labels" else 0))
        ids = [np.full(size(b), i + 1) for i, b in enumerate(samples)]
        rows["segment_ids"].append(fill(ids, 0))
    return batch | {name: np.stack(x) for name, x in rows.items()}


def accumulated(batch):
    """Four parts of two rows, which have different numbers of learned tokens."""
    return {name: x.reshape(4, 2, *x.shape[1:]) for name, x in batch.items()}


def spread(batch):
    """A row a device."""
    place = NamedSharding(sharding.mesh(data=8), PartitionSpec("data"))
    return {name: jax.device_put(x, place) for name, x in batch.items()}


@pytest.fixture(scope="module")
def model():
    return small.shaken(Qwen2Audio(small.CONFIG, rngs=nnx.Rngs(0)))


def begin(model, config):
    """The optimizer, the first state, structure and frozen parameters; `model` stays whole."""
    adam = config.make()
    graph, params, frozen = step.split(model, config.trains)
    return adam, step.start(jax.tree.map(jnp.copy, params), adam), graph, frozen


@pytest.fixture(scope="module")
def one_step(model):
    """One AdamW step from the same parameters: the new ones, and what was logged."""
    adam, first, graph, frozen = begin(model, OptimizerConfig(learning_rate=1e-4, warmup_steps=0))
    next_token = step.bind(loss.next_token, graph)

    def run(batch, parts=1):
        state = jax.tree.map(jnp.copy, first)
        state, logs = step.update(
            state,
            batch,
            (frozen,),
            loss=next_token,
            optimizer=adam,
            gradient_accumulation_steps=parts,
        )
        return jax.device_get((state.params, logs, optax.tree.get(state.opt_state, "mu")))

    return run


@pytest.fixture(scope="module")
def wanted(plain, one_step):
    return one_step(plain)


@pytest.mark.parametrize(
    ("layout", "parts"), [(padded, 1), (packed, 1), (accumulated, 4), (spread, 1)]
)
def test_one_step_is_the_same_in_every_layout(plain, wanted, one_step, layout, parts):
    """Padded, packed, accumulated, spread over devices: the parameters to 1e-6, and the logs.

    Adam's first step is as long whatever the gradient's size: its moments tell what that was.
    """
    params, logs, moments = one_step(layout(plain), parts)
    for a, b in zip(*map(jax.tree.leaves, (params, wanted[0])), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
    for a, b in zip(*map(jax.tree.leaves, (moments, wanted[2])), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())
    for name, value in wanted[1].items():
        np.testing.assert_allclose(logs[name], value, rtol=1e-5)


def test_parts_with_several_weights_add_up():
    """A mean over tokens and a mean over words, each divided by its own global weight."""
    rng = np.random.default_rng(0)
    batch = {"tokens": rng.normal(size=(8, 5)), "words": rng.normal(size=(8, 3))}
    batch = {k: jnp.float32(x * (rng.random(x.shape) < 0.5)) for k, x in batch.items()}

    def loss_of(x, batch):
        tokens, words = batch["tokens"], batch["words"]
        total = jnp.stack([(tokens * x**2).sum(), (words * jnp.sin(x)).sum()])
        count = lambda each: (each != 0).sum()
        return Sums(total, jnp.stack([count(tokens), count(words)]), {"words": count(words)})

    gradient = lambda batch, parts: step._gradient(loss_of, jnp.float32(0.7), batch, parts)
    (whole, sums), (parts, added) = gradient(batch, 1), gradient(accumulated(batch), 4)
    np.testing.assert_allclose(parts, whole, rtol=1e-5)
    np.testing.assert_allclose(added.mean(), sums.mean(), rtol=1e-5)
    means = [
        (x * f).sum() / (x != 0).sum()
        for x, f in zip(batch.values(), (1.4, np.cos(0.7)), strict=True)
    ]
    np.testing.assert_allclose(whole, sum(means), rtol=1e-5)


def test_weights_of_parts_cost_no_second_model(model, plain):
    """Accumulating computes hardly more than the parts' own gradients."""
    graph, params = nnx.split(model)
    of = lambda params, batch: loss.next_token(nnx.merge(graph, params), batch)
    weight = jax.jit(lambda params, batch: jax.lax.map(lambda b: of(params, b).weight, batch))
    cost = weight.lower(params, accumulated(plain)).compile().cost_analysis()
    assert cost["flops"] < 10_000  # one product with one matrix of the smallest would be more


def test_arithmetic_may_be_shorter_than_parameters(model, plain, monkeypatch):
    """`dtype` is that of the computation, in both towers; parameters and what they become stay
    float32."""
    adam, state, graph, frozen = begin(model, OptimizerConfig(warmup_steps=0))
    seen, attend = [], layers.attend

    def looks(q, k, v, **how):
        seen.append((q.dtype, k.dtype, v.dtype, how.get("offset")))
        return attend(q, k, v, **how)

    monkeypatch.setattr(layers, "attend", looks)
    short = step.bind(loss.next_token, graph, dtype=jnp.bfloat16)
    state, logs = step.update(state, plain, (frozen,), loss=short, optimizer=adam)
    assert {offset for *_, offset in seen} == {None, 0} and np.isfinite(logs["loss"])
    assert {dtype for *dtypes, _ in seen for dtype in dtypes} == {np.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {np.dtype(np.float32)}


def test_the_norm_of_many_short_gradients_is_added_up_in_float32():
    """Of 600 ones in bfloat16 a sum stops at 256."""
    params = {f"decoder.{i}": jnp.ones((), jnp.bfloat16) for i in range(600)}
    adam = OptimizerConfig(warmup_steps=0).make()

    def loss(params, batch):
        total = sum(x.astype(jnp.float32) for x in params.values())
        return Sums(total, jnp.ones(()), {})

    _, logs = step.update(step.start(params, adam), {}, loss=loss, optimizer=adam)
    np.testing.assert_allclose(logs["grad_norm"], 600**0.5, rtol=1e-3)


def test_short_parameters_move_by_less_than_their_last_bit():
    """By as much as long ones, on average over many; a step that is done again ends as it did."""
    descent = optax.sgd(1.0)
    start = {"x": jnp.full((256, 256), 0.02, jnp.bfloat16), "still": jnp.ones(8, jnp.bfloat16)}

    def loss_of(params, batch):
        return Sums(batch * params["x"].astype(jnp.float32).sum(), jnp.ones(()), {})

    def run(steps):
        state = step.start(jax.tree.map(jnp.copy, start), descent)
        for _ in range(steps):
            state, _ = step.update(state, jnp.float32(2e-6), loss=loss_of, optimizer=descent)
        return jax.tree.map(lambda x: np.asarray(x, np.float32), state.params)

    once, often = run(1), run(100)
    assert 0.01 < (once["x"] != once["x"].max()).mean() < 0.04  # a last bit is 1.2e-4 there
    np.testing.assert_allclose(often["x"].mean(), float(start["x"][0, 0]) - 2e-4, atol=2e-6)
    np.testing.assert_array_equal(often["still"], 1)
    np.testing.assert_array_equal(often["x"], run(100)["x"])


@pytest.mark.slow
def test_one_batch_is_learned_by_heart(model, plain):
    """Twenty steps on the same rows: the loss falls to less than half; so does the average's."""
    config = OptimizerConfig(learning_rate=0.03, steps=20, warmup_steps=2, ema_decay=0.8)
    adam, state, graph, frozen = begin(model, config)
    next_token, rows = step.bind(loss.next_token, graph), []
    for _ in range(20):
        state, logs = step.update(state, plain, (frozen,), loss=next_token, optimizer=adam)
        rows.append({name: float(x) for name, x in logs.items()})
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    assert rows[-1]["accuracy"] > rows[0]["accuracy"]
    smooth = jax.jit(next_token)(optimizer.averaged(state.opt_state), plain, frozen).mean()
    assert smooth < 0.5 * rows[0]["loss"]
