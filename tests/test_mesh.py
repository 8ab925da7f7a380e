"""Eight devices, however they share the work, do what one does."""

import functools

import jax
import numpy as np
import pytest
import small
from flax import nnx

from qwen2audio_jax import Qwen2Audio, generate, programs, sharding
from qwen2audio_jax.training import loss, preference
from qwen2audio_jax.training.learner import Learner
from qwen2audio_jax.training.optimizer import OptimizerConfig
from qwen2audio_jax.training.preference import PreferenceConfig
from qwen2audio_jax.training.settings import Lora, MeshConfig

CONFIG = small.EVEN
MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "fsdp x tensor": {"fsdp": 4, "tensor": 2},
    "fsdp x context": {"fsdp": 2, "context": 4},
    "data x tensor x context": {"data": 2, "tensor": 2, "context": 2},
    # eight devices have no room for two of all four; `data` is over two slices here
    "slices x fsdp x tensor": {"dcn": {"data": 2}, "fsdp": 2, "tensor": 2},
}
FRAMES = [30, 13, 21, 9, 26, 17, 24, 12]


def rows(frames=FRAMES):
    batch = small.inputs(frames, length=16)
    learned = (batch["attention_mask"] == 1) & (batch["input_ids"] != CONFIG.audio_token)
    return batch | {"labels": np.where(learned, batch["input_ids"], loss.IGNORED)}


def packed():
    """Two samples a row, the second right behind the first."""
    two = [rows(), rows(FRAMES[::-1])]
    beside = lambda name: np.concatenate([batch[name] for batch in two], axis=1)
    # each row's clips next to each other
    clips = lambda name: np.stack([batch[name] for batch in two], axis=1).reshape(
        16, *two[0][name].shape[1:]
    )
    batch = {name: beside(name) for name in ("input_ids", "attention_mask", "labels")}
    batch["segment_ids"] = batch["attention_mask"] * np.repeat([1, 2], 16).astype(np.int32)
    order = np.argsort(batch["attention_mask"] == 0, axis=1, kind="stable")
    batch = {name: np.take_along_axis(x, order, axis=1) for name, x in batch.items()}
    return batch | {k: clips(k) for k in ("input_features", "feature_attention_mask")}


def parts():
    """Two batches of five rows, which make up a step."""
    both = rows(FRAMES[:5]), rows(FRAMES[3:])
    return {name: np.stack([batch[name] for batch in both]) for name in both[0]}


def pairs():
    batch = rows()
    both = {}
    for side, shift in (("chosen", 0), ("rejected", 1)):
        changed = np.where(batch["labels"] > 6, batch["input_ids"] - shift, batch["input_ids"])
        both[f"{side}_input_ids"] = changed
        both[f"{side}_attention_mask"] = batch["attention_mask"]
        both[f"{side}_labels"] = np.where(batch["labels"] >= 0, changed, loss.IGNORED)
    return both | {k: batch[k] for k in ("input_features", "feature_attention_mask")}


def dpo(model, batch, **how):
    return preference.preference(model, batch, config=PreferenceConfig(), **how)


WAYS = {
    "sft": (packed, loss.next_token, {}),
    "five rows": (parts, loss.next_token, {"accumulate": 2}),
    "dpo": (pairs, dpo, {"reference": True}),
    "lora": (packed, loss.next_token, {"adapters": Lora(r=2, target_modules="all-linear")}),
}


@pytest.fixture(scope="module")
def after():
    """A step's logs, moments (of which the first, b1 being 0, are the gradients), parameters."""

    def run(way, sizes):
        batch, of, how = WAYS[way]
        model = small.shaken(Qwen2Audio(CONFIG, rngs=nnx.Rngs(0)))
        optimizer = OptimizerConfig(
            learning_rate=1e-3, warmup_steps=0, clip_norm=0.0, b1=0.0, eps=1e-3
        )
        mesh = sharding.mesh(**sizes) if sizes else None
        if way == "five rows" and sizes:
            of = functools.partial(of, remat="full")
        learner = Learner(model, optimizer, of, mesh=mesh, **how)
        logs = learner.step(batch(), 0)
        return jax.device_get((logs, learner.state.opt_state, learner.state.params))

    return run, functools.cache(lambda way: run(way, {}))


def combinations():
    """All but SFT's are `slow`, and of these the simpler ones."""
    for way in WAYS:
        for name, sizes in MESHES.items():
            if way == "five rows" and len(sizes) == 1 + ("fsdp" in sizes):
                continue  # eight devices without data or with tensor: the others have both
            marks = () if way == "sft" and "context" in sizes else pytest.mark.slow
            yield pytest.param(way, name, marks=marks, id=f"{name}-{way}")


@pytest.mark.parametrize(("way", "name"), [*combinations()])
def test_a_step_on_a_mesh_is_the_step_of_one_device(after, way, name):
    """Loss, gradients and parameters within 1e-5: of all of them with packed rows, of batches that
    make up a step, of rows that do not divide by the devices and whose blocks are made a second
    time, of a preference, and of adapters."""
    run, one = after
    for a, b in zip(*map(jax.tree.leaves, (run(way, MESHES[name]), one(way))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MESHES)
def test_answers_on_a_mesh_are_those_of_one_device(monkeypatch, name):
    """Token for token, the cache split over rows and heads, before and after."""
    model = small.shaken(Qwen2Audio(CONFIG, scan_layers=False, rngs=nnx.Rngs(0)))
    inputs = small.inputs(FRAMES, length=16)
    wanted = generate(model, inputs, max_new_tokens=12, end_tokens=())
    graph, state = nnx.split(model)
    mesh = sharding.mesh(**MESHES[name])
    many = nnx.merge(graph, jax.device_put(state, sharding.shardings(state, mesh)))
    caches, decode = [], programs.decode

    def watched(model, state, *args):
        split = lambda cache: [(x.sharding, x.shape) for x in jax.tree.leaves(cache)]
        caches.append((sharding.of_cache(state.cache, mesh), split(state.cache)))
        made = decode(model, state, *args)
        caches.append((sharding.of_cache(made[0].cache, mesh), split(made[0].cache)))
        return made

    monkeypatch.setattr(programs, "decode", watched)
    np.testing.assert_array_equal(generate(many, inputs, max_new_tokens=12, end_tokens=()), wanted)
    assert caches
    for places, found in caches:
        for place, (got, shape) in zip(jax.tree.leaves(places), found, strict=True):
            assert got.is_equivalent_to(place, len(shape)), (shape, place.spec, got)


def test_slices_are_the_outermost_devices():
    """Two slices of four: an axis over both has a slice's devices next to each other."""
    mesh = MeshConfig(dcn_data_parallelism=2, ici_tensor_parallelism=2).make()
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2, "context": 1}
    first = {device.id for device in mesh.devices[0].ravel()}
    assert first == {0, 1, 2, 3}
    with pytest.raises(ValueError, match=r"on each of 3 slices needs 6 devices, there are 8"):
        MeshConfig(dcn_data_parallelism=3).make()
    with pytest.raises(ValueError, match=r"ici mesh sizes from 1, or a single -1, got .*'data': 0"):
        MeshConfig(ici_data_parallelism=0).make()
