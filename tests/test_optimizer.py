"""The optimizer moves what it should, as far as it should."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
from flax import nnx

from qwen2audio_jax import Qwen2Audio
from qwen2audio_jax.training import loss as losses
from qwen2audio_jax.training.learner import Learner
from qwen2audio_jax.training.optimizer import (
    ADJUSTABLE,
    OptimizerConfig,
    averaged,
    by_path,
    part_of,
)


@pytest.fixture(scope="module")
def params():
    return nnx.state(small.shaken(Qwen2Audio(small.CONFIG, rngs=nnx.Rngs(0))))


def flat(tree):
    paths = jax.tree.leaves(by_path(tree, lambda path: path))
    return dict(zip(paths, map(np.asarray, jax.tree.leaves(tree)), strict=True))


def step(config, params, grads, count=1):
    """How far each parameter moves in `count` steps with the same gradient."""
    optimizer = config.make()

    @jax.jit
    def run(params, grads):
        state, moved = optimizer.init(params), params
        for _ in range(count):
            updates, state = optimizer.update(grads, state, moved)
            moved = optax.apply_updates(moved, updates)
        return jax.tree.map(jnp.subtract, moved, params)

    return flat(run(params, grads))


def test_paths_are_the_table_s(params):
    """Parameters are named as everywhere else."""
    names = flat(params)
    assert "encoder.positions" in names and "encoder.blocks.attention.query.kernel" in names
    assert "decoder.embedding.embedding" in names and "projector.bias" in names


def test_the_projection_of_values_has_its_name_and_can_be_frozen(params):
    """Though nnx calls every parameter's content a value, too."""
    config = OptimizerConfig(warmup_steps=0, frozen=("decoder.blocks.attention.value",))
    config.check(flat(params))
    moved = step(config, params, jax.tree.map(jnp.ones_like, params))
    still = {path for path, delta in moved.items() if not delta.any()} - {"encoder.positions"}
    assert still == {f"decoder.blocks.attention.value.{name}" for name in ("kernel", "bias")}


def test_without_gradients_only_matrices_decay(params):
    """Kernels and embeddings shrink by rate * decay; norms, biases and positions stay."""
    config = OptimizerConfig(learning_rate=0.1, steps=10, warmup_steps=0, weight_decay=0.5)
    moved = step(config, params, jax.tree.map(jnp.zeros_like, params))
    for path, before in flat(params).items():
        decays = path.rpartition(".")[2] in ("kernel", "embedding")
        np.testing.assert_allclose(
            moved[path], -0.05 * before if decays else 0 * before, rtol=1e-4, atol=1e-7
        )


def test_frozen_parameters_never_move(params):
    """A prefix freezes itself and all below it, and nothing that merely begins alike."""
    config = OptimizerConfig(warmup_steps=0, frozen=("encoder.conv1", "decoder.blocks.mlp"))
    moved = step(config, params, jax.tree.map(jnp.ones_like, params))
    still = {path for path, delta in moved.items() if not delta.any()}
    below = ("encoder.conv1.", "decoder.blocks.mlp.", "encoder.positions")
    assert still == {path for path in moved if path.startswith(below)}
    assert "decoder.blocks.mlp_norm.scale" not in still


def test_a_prefix_means_the_same_of_a_stack_and_of_a_list():
    """And one that means nothing is refused; positions are never moved."""
    config = OptimizerConfig(frozen=("decoder.blocks.mlp", "encoder.blocks.1"))
    assert not config.trains("decoder.blocks.mlp.up.kernel")
    assert not config.trains("decoder.blocks.3.mlp.up.kernel")
    assert config.trains("decoder.blocks.3.mlp_norm.scale")
    assert config.trains("encoder.blocks.0.mlp.up.kernel")
    assert not config.trains("encoder.blocks.1.mlp.up.kernel")
    assert not config.trains("encoder.positions")
    model = Qwen2Audio(small.CONFIG, rngs=nnx.Rngs(0), scan_layers=False)
    frozen = OptimizerConfig(frozen=("encoder.conv1", "decoder.block"))
    with pytest.raises(ValueError, match=r"no parameter is under 'decoder.block'; there is"):
        Learner(model, frozen, losses.next_token)


def test_each_part_has_a_learning_rate_of_its_own(params):
    """The encoder's is 0: frozen; the projector's a tenth; the embeddings' that of all."""
    config = OptimizerConfig(
        learning_rate=1e-2,
        encoder_learning_rate=0.0,
        projector_learning_rate=1e-3,
        decoder_learning_rate=1e-4,
        warmup_steps=0,
        weight_decay=0.0,
    )
    sizes = {"encoder": 0.0, "projector": 1e-3, "decoder": 1e-4, "embeddings": 1e-2}
    for path, delta in step(config, params, jax.tree.map(jnp.ones_like, params)).items():
        assert config.trains(path) == bool(sizes[part_of(path)])
        np.testing.assert_allclose(delta, -sizes[part_of(path)], rtol=1e-3, atol=1e-8)
    np.testing.assert_allclose(config.schedule("projector")(0), 1e-3)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("cosine", [0, 1, 2, 1.1, 0.2, 0.2]),
        ("linear", [0, 1, 2, 1.1, 0.2, 0.2]),
        ("wsd", [0, 1, 2, 2, 0.2, 0.2]),
        ("constant", [0, 1, 2, 2, 2, 2]),
    ],
)
def test_the_learning_rate_warms_up_and_falls(schedule, rates):
    """Linear to the peak; in the middle; the final fraction at the end and behind it."""
    config = OptimizerConfig(
        learning_rate=2.0,
        schedule_type=schedule,
        steps=110,
        warmup_steps=10,
        final_fraction=0.1,
        decay_fraction=0.2,
    )
    at = config.schedule()
    np.testing.assert_allclose([at(i) for i in (0, 5, 10, 60, 110, 500)], rates, rtol=1e-5)
    if schedule == "wsd":
        np.testing.assert_allclose([at(88), at(99)], [2, 1.1], rtol=1e-5)
    if schedule == "cosine":
        np.testing.assert_allclose(at(35), 0.2 + 1.8 * (1 + np.cos(np.pi / 4)) / 2, rtol=1e-5)


@pytest.mark.parametrize("steps", [1, 30, 1000])
def test_a_part_of_the_steps_warms_up_however_many_they_are(steps):
    part = OptimizerConfig(steps=steps, warmup_steps=0.05)
    whole = OptimizerConfig(steps=steps, warmup_steps=round(steps / 20))
    assert part.warmup == whole.warmup == {1: 0, 30: 2, 1000: 50}[steps]
    rates = [[config.schedule()(i) for i in range(0, steps, 7)] for config in (part, whole)]
    np.testing.assert_array_equal(*rates)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 50, "warmup_steps": 50}, "fewer warm-up steps than the 50 steps, got 50"),
        ({"steps": 100, "warmup_steps": 0.996}, "warm-up steps than the 100 steps, got 0.996"),
        (
            {"steps": 50, "warmup_steps": 45, "schedule_type": "wsd", "decay_fraction": 0.2},
            "warm-up and decay within 50 steps, got 45 and 10",
        ),
        ({"warmup_steps": 1.5}, "whole warm-up steps, or a part below 1, got 1.5"),
        ({"ema_decay": 1.0}, r"ema_decay from 0 to below 1, got 1.0"),
        ({"b1": 1.0}, "b1 from 0 to below 1, got 1.0"),
        ({"clip_norm": -1.0}, "clip_norm from 0, got -1.0"),
        ({"decoder_learning_rate": -1e-4}, "decoder_learning_rate from 0, got -0.0001"),
        ({"weight_decay": float("nan")}, "weight_decay from 0, got nan"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**wrong)


def test_adamw_is_optax_s(params):
    """Three steps equal `optax.adamw`, whose settings go by the same names."""
    config = OptimizerConfig(warmup_steps=0, clip_norm=0.0, b1=0.8, b2=0.9, eps=1e-4)
    config = dataclasses.replace(config, schedule_type="constant", learning_rate=0.01)
    mask = lambda tree: by_path(tree, lambda path: path.endswith((".kernel", ".embedding")))
    theirs = optax.adamw(0.01, b1=0.8, b2=0.9, eps=1e-4, weight_decay=0.1, mask=mask)
    state, moved = theirs.init(params), params
    for _ in range(3):
        updates, state = theirs.update(params, state, moved)
        moved = optax.apply_updates(moved, updates)
    wanted = flat(jax.tree.map(jnp.subtract, moved, params))
    for path, delta in step(config, params, params, count=3).items():
        still = path == "encoder.positions"
        np.testing.assert_allclose(delta, 0 if still else wanted[path], rtol=1e-4, atol=1e-6)


def test_moments_are_held_as_asked():
    """Of bfloat16 parameters, each in what is set."""
    tree = {"projector": {"kernel": jnp.ones((256, 128), jnp.bfloat16)}}
    types = lambda config: [
        str(x.dtype) for x in jax.tree.leaves(config.make().init(tree)) if x.ndim == 2
    ]
    assert types(OptimizerConfig()) == ["float32", "float32"]
    assert types(OptimizerConfig(mu_dtype="bfloat16")) == ["bfloat16", "float32"]
    assert types(OptimizerConfig(nu_dtype="bfloat16")) == ["float32", "bfloat16"]
    with pytest.raises(ValueError, match=r"b2 of at most 0.99 beside nu_dtype bfloat16, got 0.999"):
        OptimizerConfig(nu_dtype="bfloat16", b2=0.999)
    adafactor = OptimizerConfig(name="adafactor", learning_rate=0.5, warmup_steps=0)
    state = adafactor.make().init(tree)
    assert sum(x.size for x in jax.tree.leaves(state)) < 1000  # rows and columns
    updates, _ = adafactor.make().update(tree, state, tree)
    moved = optax.apply_updates(tree, updates)["projector"]["kernel"]
    assert moved.dtype == jnp.bfloat16 and (moved < 1).all()


def test_shorter_second_moments_are_rounded_and_no_more(params):
    """Updates of several steps are those of long ones within bfloat16's rounding, not its drift."""
    moved = [
        step(OptimizerConfig(nu_dtype=dtype, warmup_steps=0), params, params, count=6)
        for dtype in ("float32", "bfloat16")
    ]
    for path, wanted in moved[0].items():
        np.testing.assert_allclose(moved[1][path], wanted, rtol=2e-2, atol=1e-9)
    assert any((moved[1][path] != wanted).any() for path, wanted in moved[0].items())


def test_adam_does_not_decay(params):
    config = OptimizerConfig(name="adam", warmup_steps=0)
    moved = step(config, params, jax.tree.map(jnp.zeros_like, params))
    assert not any(delta.any() for delta in moved.values())


def test_the_average_follows_the_parameters():
    """An exponential mean of what each step led to, in float32; where all began is not in it."""
    tree = {"projector": {"bias": jnp.full(1, 100.0)}}
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=0, steps=4, ema_decay=0.5)
    config = dataclasses.replace(config, schedule_type="constant")
    optimizer = config.make()
    state, moved, were = optimizer.init(tree), tree, []
    for _ in range(3):
        updates, state = optimizer.update({"projector": {"bias": jnp.ones(1)}}, state, moved)
        moved = optax.apply_updates(moved, updates)
        were.append(float(moved["projector"]["bias"][0]))
        mean = np.average(were, weights=[1, 2, 4][: len(were)])
        np.testing.assert_allclose(averaged(state)["projector"]["bias"], mean, rtol=1e-6)
    assert were[0] < 100  # by weight decay, too
    slow = dataclasses.replace(config, ema_decay=0.99999).make()  # 1 less that is coarse in float32
    _, state = slow.update({"projector": {"bias": jnp.ones(1)}}, slow.init(tree), tree)
    np.testing.assert_allclose(averaged(state)["projector"]["bias"], were[0], rtol=1e-6)
    with pytest.raises(ValueError, match="wanted an optimizer with ema_decay"):
        averaged(OptimizerConfig().make().init(tree))


def test_long_gradients_are_clipped():
    """Beyond `clip_norm` only the direction counts; below it the length does."""
    tree = {"a": {"kernel": jnp.zeros(3)}}
    grads = lambda size: {"a": {"kernel": size * jnp.array([0.6, 0.0, 0.8])}}
    config = OptimizerConfig(weight_decay=0.0, warmup_steps=0, clip_norm=1.0)
    state = lambda size: config.make().update(grads(size), config.make().init(tree), tree)[1]
    first = lambda size: np.concatenate([x.ravel() for x in jax.tree.leaves(state(size))])
    np.testing.assert_allclose(first(1.0), first(1e3), rtol=1e-5)
    assert not np.allclose(first(0.5), first(1.0))


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_a_run_can_go_on_with_or_without_clipping(params, name):
    """The state is the same, of either."""
    of = lambda norm: OptimizerConfig(name=name, clip_norm=norm).make()
    states = [jax.eval_shape(of(norm).init, params) for norm in (0.0, 1.0)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])


def test_a_part_s_rate_may_be_changed_but_not_to_or_from_0(params):
    """No state's shape depends on it; what has been frozen has no state."""
    config = OptimizerConfig(encoder_learning_rate=1e-5, projector_learning_rate=0.0)
    assert config.rates == ("learning_rate", "encoder_learning_rate")
    before = dataclasses.asdict(config)
    other = dataclasses.replace(config, encoder_learning_rate=1e-6, learning_rate=1e-3)
    other.check_change(before)
    dataclasses.replace(config, encoder_learning_rate=None).check_change(before)
    assert {"encoder_learning_rate", "embeddings_learning_rate"} <= set(ADJUSTABLE)
    shapes = [jax.eval_shape(each.make().init, params) for each in (config, other)]
    assert jax.tree.structure(shapes[0]) == jax.tree.structure(shapes[1])
    for change, message in (
        ({"encoder_learning_rate": 0.0}, "encoder_learning_rate was 1e-05, now 0.0"),
        ({"projector_learning_rate": None}, "projector_learning_rate was 0.0, now 0.0001"),
        ({"learning_rate": 0.0}, "decoder_learning_rate was 0.0001, now 0.0"),
    ):
        with pytest.raises(ValueError, match=f"{message}: a run that goes on moves the same parts"):
            dataclasses.replace(config, **change).check_change(before)
    config.check_change({"learning_rate": 1e-4, "projector_learning_rate": 0.0})  # an older run's


def test_adafactor_factors_the_encoder_s_attention():
    """Whose heads are 64 wide: Whisper's of every size."""
    kernel = lambda *shape: {"kernel": jax.ShapeDtypeStruct((32, *shape), jnp.float32)}
    attention = {"query": kernel(1280, 20, 64), "out": kernel(20, 64, 1280)}
    tree = {"encoder": {"blocks": {"attention": attention}}}
    size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    state = jax.eval_shape(OptimizerConfig(name="adafactor").make().init, tree)
    assert size(state) < 0.02 * size(tree)


def test_adafactor_moves_each_layer_by_itself():
    """A stack moves as a list does: one layer's spike is not its neighbours', and of many layers
    none is taken for a row."""
    rng, layers = np.random.default_rng(0), 70
    shapes = {"kernel": (layers, 64, 80), "bias": (layers, 80)}
    stack = {name: jnp.float32(rng.normal(size=shape)) for name, shape in shapes.items()}
    lists = lambda tree: [{name: x[i] for name, x in tree.items()} for i in range(layers)]
    config = OptimizerConfig(name="adafactor", warmup_steps=0, clip_norm=0.0, weight_decay=0.0)
    moved = []
    for form in (lambda tree: tree, lists):
        within = lambda tree, form=form: {"decoder": {"blocks": form(tree)}}
        optimizer, params = config.make(), within(stack)
        update = jax.jit(optimizer.update)
        state = optimizer.init(params)
        for size in (1.0, 1.0, 1000.0):
            grads = {name: x.at[0].multiply(size) for name, x in stack.items()}
            updates, state = update(within(grads), state, params)
        moved.append(updates["decoder"]["blocks"])
    for name, found in moved[0].items():
        np.testing.assert_allclose(found, [each[name] for each in moved[1]], rtol=1e-5)
        sizes = np.sqrt(np.mean(np.square(found.reshape(layers, -1)), axis=1))
        assert sizes.max() < 1.01 * config.learning_rate  # the spike is cut, and it alone
        assert sizes[1:].min() > 0.9 * config.learning_rate


def test_muon_makes_block_matrices_orthogonal(params):
    """Layer by layer, inputs against outputs, of Adam's size; all else moves as by AdamW."""
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params)
    config = OptimizerConfig(
        name="muon", learning_rate=1.0, warmup_steps=0, weight_decay=0.0, clip_norm=0.0
    )
    moved, adam = (
        step(c, params, grads) for c in (config, dataclasses.replace(config, name="adamw"))
    )
    matrices = 0
    for path, delta in moved.items():
        if ".blocks." not in path or not path.endswith(".kernel"):
            np.testing.assert_allclose(delta, adam[path], rtol=1e-5, atol=1e-7)
            continue
        for layer in delta:
            rows = layer.shape[:-1] if path.endswith(".out.kernel") else layer.shape[:1]
            matrix = layer.reshape(int(np.prod(rows)), -1)
            spectrum = np.linalg.svd(matrix, compute_uv=False)
            # five iterations bring all but the smallest close to each other
            assert np.quantile(spectrum, 0.25) / spectrum.max() > 0.4
            assert 0.3 < np.sqrt(np.mean(matrix**2)) < 0.7
            matrices += 1
    assert matrices == 2 * 6 + 2 * 7  # two layers each of encoder and decoder


def test_muon_remembers_as_it_is_told(params):
    """b1 is Adam's alone."""
    config = OptimizerConfig(name="muon", b1=0.6, muon_beta=0.8, clip_norm=0.0)
    grads = jax.tree.map(jnp.ones_like, params)
    update = lambda params: config.make().update(grads, config.make().init(params), params)[1]
    moments = [x for _, x in optax.tree.get_all_with_path(jax.jit(update)(params), "mu")]
    first = {float(x.ravel()[0]) for each in moments for x in jax.tree.leaves(each)}
    assert sorted(first) == pytest.approx([0.2, 0.4])
