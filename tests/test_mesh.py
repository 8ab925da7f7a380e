"""Eight devices, however they share the work, do what one does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from flax import nnx

from qwen2audio_jax import (
    Qwen2Audio,
    Sampling,
    cache,
    flash,
    generate,
    layers,
    programs,
    sharding,
    spread,
)
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
    "lora": (
        packed,
        loss.next_token,
        {"adapters": Lora(r=2, target_modules="all-linear", lora_dropout=0.3)},
    ),
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


@pytest.fixture(scope="module")
def model():
    return small.shaken(Qwen2Audio(CONFIG, scan_layers=False, rngs=nnx.Rngs(0)))


def spread_over(model, mesh):
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.device_put(state, sharding.shardings(state, mesh)))


@pytest.mark.parametrize("name", MESHES)
def test_answers_on_a_mesh_are_those_of_one_device(model, monkeypatch, name):
    """Token for token, the cache split over rows and heads, before and after."""
    inputs = small.inputs(FRAMES, length=16)
    wanted = generate(model, inputs, max_new_tokens=12, end_tokens=())
    mesh = sharding.mesh(**MESHES[name])
    many, caches, decode = spread_over(model, mesh), [], programs.decode

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


SAMPLED = Sampling(temperature=1.0, repetition_penalty=1.2)
FIVE = {
    "greedy": {"logprobs": True},
    "sampled": {"sampling": SAMPLED},
    "answers": {"sampling": SAMPLED, "n": 3},
    "beams": {"num_beams": 4, "n": 2},
    "beams that end": {"num_beams": 4, "early_stopping": True},
}


@pytest.mark.parametrize(
    ("way", "name"),
    [
        *(pytest.param(way, "data", marks=() if way == "greedy" else pytest.mark.slow)
          for way in FIVE),
        ("answers", "fsdp x tensor"),
        ("beams", "data x tensor x context"),
    ],
)  # fmt: skip
def test_rows_that_do_not_divide_are_split_all_the_same(model, monkeypatch, way, name):
    """Five prompts: their tokens, and when all end, are those of one device; of the cache each
    device has its share, in prefill as well, and of the clips, too."""
    inputs = small.inputs(FRAMES[:5], length=16)
    plain = generate(model, inputs, max_new_tokens=20, end_tokens=(), **FIVE["greedy"])[0]
    how = {"max_new_tokens": 20, "end_tokens": [*map(int, plain[:, 5])]} | FIVE[way]
    wanted = generate(model, inputs, **how)
    mesh = sharding.mesh(**MESHES[name])
    many, kept = spread_over(model, mesh), []

    def watch(module, name, cache_of):
        do = getattr(module, name)

        def watched(*args, **kwargs):
            made = do(*args, **kwargs)
            if not isinstance(jax.tree.leaves(made)[0], jax.core.Tracer):
                kept.append((name, cache_of(made)))
            return made

        monkeypatch.setattr(module, name, watched)

    watch(programs, "listen", lambda made: made)
    watch(programs, "prefill", lambda made: made[1])
    watch(programs, "decode", lambda made: (made[0].cache, int(made[0].step)))
    watch(programs, "repeat", lambda made: made[1])
    watch(cache, "repeat", lambda made: made)
    got = generate(many, inputs, **how)
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    assert {"listen", "prefill"} < {name for name, _ in kept}
    for name, arrays in kept:
        for x in jax.tree.leaves(arrays):
            if np.ndim(x):
                assert x.shape[0] % rows == 0, name
                assert x.sharding.shard_shape(x.shape)[0] <= x.shape[0] // rows, (name, x.sharding)
    a, b = (x if isinstance(x, tuple) else (x,) for x in (got, wanted))
    steps = [made[1] for name, made in kept if name == "decode"]
    assert max(steps, default=b[0].shape[1]) == b[0].shape[1]  # no step more
    np.testing.assert_array_equal(a[0], b[0])
    for scores in zip(a[1:], b[1:], strict=True):
        np.testing.assert_allclose(*scores, atol=1e-5)


def test_one_prompt_stays_alone(model, monkeypatch):
    """Nobody reads empty rows beside it; its answers are split, as many as there are."""
    many = spread_over(model, sharding.mesh(data=8))
    inputs, seen, decode = small.inputs([21], length=16), [], programs.decode
    monkeypatch.setattr(
        programs, "decode", lambda m, state, *args: (seen.append(state), decode(m, state, *args))[1]
    )
    how = {"max_new_tokens": 4, "end_tokens": ()}
    np.testing.assert_array_equal(generate(many, inputs, **how), generate(model, inputs, **how))
    assert len(seen[0].last) == 1
    del seen[:]
    how |= {"sampling": SAMPLED, "n": 5}
    np.testing.assert_array_equal(generate(many, inputs, **how), generate(model, inputs, **how))
    assert len(seen[0].last) == 8


def test_scores_are_counted_where_they_are(monkeypatch):
    """Attention that would not fit goes block by block; who shares rows and heads is who can."""
    monkeypatch.setattr(spread, "platform", lambda: "tpu")
    blocks, by_queries = [], flash.by_queries

    def counted(attend, *qkv, split):
        blocks.append(split)
        return by_queries(attend, *qkv, split=split)

    monkeypatch.setattr(flash, "by_queries", counted)
    monkeypatch.setattr(flash, "SCORES", 4 * 16 * 32)  # of a row

    def splits(rows, sizes, offset=3):
        del blocks[:]
        q, k = jnp.zeros((rows, 16, 4, 8)), jnp.zeros((rows, 32, 2, 8))
        seen = lambda x: jnp.ones(x.shape[:2], int)
        with jax.set_mesh(sharding.mesh(**sizes)):
            how = {"q_segments": seen(q), "k_segments": seen(k), "offset": offset}
            jax.eval_shape(lambda q, k: layers.attend(q, k, k, **how), q, k)
        return blocks

    assert splits(8, {"data": 8}) == [] and splits(16, {"data": 8}) == [8]
    assert splits(5, {"data": 8}) == [1]  # all of them on every device
    assert splits(5, {"data": 2, "tensor": 4}) == [4] and splits(4, {"data": 2, "tensor": 4}) == []
    assert splits(3, {"context": 8}) == []  # by their queries, of which context has its part
    assert splits(16, {"data": 2, "context": 4}, offset=None) == [8]  # a clip's, over both


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
