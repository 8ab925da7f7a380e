"""DPO and its kin are TRL's formulas, of log-probabilities that are torch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import small
import torch
import torch.nn.functional as F
from flax import nnx
from test_parity import features

from qwen2audio_jax import Qwen2Audio, audio, encoder, weights
from qwen2audio_jax.training.loss import IGNORED
from qwen2audio_jax.training.preference import (
    REFERENCE,
    PreferenceConfig,
    pair_losses,
    preference,
    reference_logps,
    score,
)
from qwen2audio_jax.weights import table

CONFIGS = [
    *(
        PreferenceConfig(loss_type=t, beta=b)
        for t in ("sigmoid", "ipo", "hinge")
        for b in (0.1, 1.0)
    ),
    PreferenceConfig(label_smoothing=0.2),
    PreferenceConfig(loss_type="robust", label_smoothing=0.3, beta=0.5),
    PreferenceConfig(loss_type="robust"),
    PreferenceConfig(loss_type="orpo", beta=0.2),
]


def trl(c, chosen, rejected, ref_chosen, ref_rejected):
    """As in TRL's DPOTrainer.dpo_loss and ORPOTrainer.odds_ratio_loss."""
    if c.loss_type == "orpo":
        odds = (chosen - rejected) - (
            torch.log1p(-torch.exp(chosen)) - torch.log1p(-torch.exp(rejected))
        )
        return -c.beta * F.logsigmoid(odds)
    logits = (chosen - rejected) - (ref_chosen - ref_rejected)
    if c.loss_type == "hinge":
        return torch.relu(1 - c.beta * logits)
    if c.loss_type == "ipo":
        return (logits - 1 / (2 * c.beta)) ** 2
    right, wrong = F.logsigmoid(c.beta * logits), F.logsigmoid(-c.beta * logits)
    s = c.label_smoothing
    if c.loss_type == "robust":
        return (-right * (1 - s) + wrong * s) / (1 - 2 * s)
    return -right * (1 - s) - wrong * s


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.loss_type}-{c.beta}")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_losses_and_gradients_are_trl_s(config, dtype):
    """Of given log-probabilities, with those of sure and of hopeless answers among them."""
    logps = -np.random.default_rng(0).exponential(3.0, (4, 32)).astype(dtype)
    with jax.enable_x64(dtype == np.float64):
        run = lambda *logps: pair_losses(*logps, config=config)
        ours, back = jax.vjp(run, *map(jnp.asarray, logps))
        slopes = back(jnp.ones(32, dtype))
    inputs = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in logps]
    theirs = trl(config, *inputs)
    wanted = torch.autograd.grad(theirs.sum(), inputs, allow_unused=True)
    tolerance = {"rtol": 1e-6, "atol": 1e-6}
    np.testing.assert_allclose(ours, theirs.detach(), **tolerance)
    for a, b in zip(slopes, wanted, strict=True):
        np.testing.assert_allclose(a, 0 if b is None else b, **tolerance)


def test_a_certain_answer_has_finite_odds():
    """ORPO of a probability of 1, which float32 reaches: a number, and no NaN behind it."""
    run = lambda x: pair_losses(x, x - 1, x, x, config=PreferenceConfig(loss_type="orpo")).sum()
    value, slope = jax.value_and_grad(run)(jnp.zeros(1))
    assert np.isfinite(value) and np.isfinite(slope).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"label_smoothing": 0.5}, "label_smoothing from 0 to below 0.5, got 0.5"),
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, "sigmoid and robust, got ipo"),
        ({"loss_type": "orpo", "rpo_alpha": 1.0}, "wanted no rpo_alpha"),
        ({"loss_type": "orpo", "reference_free": True}, "orpo has no reference: wanted no ref"),
        ({"loss_type": "ipo", "length_normalized": True}, "ipo takes means already: wanted no l"),
        ({"beta": 0.0}, "beta above 0, got 0.0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        PreferenceConfig(**wrong)


@pytest.fixture(scope="module")
def models():
    """The model that learns, and its reference."""
    make = lambda seed: small.shaken(Qwen2Audio(small.CONFIG, rngs=nnx.Rngs(0)), seed)
    return make(0), make(1)


def pairs():
    """Three pairs about a clip each, of which the last teaches nothing."""
    inputs = small.inputs([30, 13, 21])
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
    words = (mask == 1) & (ids != small.CONFIG.audio_token)
    words[:, :3], words[2] = False, False
    other = np.where(words, 70 - ids, ids)
    for side, answer in (("chosen", ids), ("rejected", other)):
        inputs[f"{side}_input_ids"], inputs[f"{side}_attention_mask"] = answer, mask
        inputs[f"{side}_labels"] = np.where(words, answer, IGNORED)
    inputs["rejected_labels"][0, 9:] = IGNORED  # answers differ in length
    return jax.tree.map(jnp.asarray, inputs)


def test_the_loss_is_the_mean_over_pairs_that_teach(models):
    """Each form, from log-probabilities; chosen answers' tokens have a mean of their own."""
    model, base = models
    batch = pairs()
    found, before = (jax.jit(score)(each, batch) for each in models)
    assert np.asarray(found.tokens[2] == 0).all() and (found.tokens[:2] > 0).all()
    assert found.tokens[0, 0] > found.tokens[0, 1]
    for config in (
        PreferenceConfig(),
        PreferenceConfig(reference_free=True),
        PreferenceConfig(length_normalized=True),
        PreferenceConfig(loss_type="ipo", rpo_alpha=0.5),
        PreferenceConfig(loss_type="orpo"),
    ):
        run = jax.jit(lambda *a, c=config: preference(*a[:2], reference=a[2], config=c))
        logs = run(model, batch, base).means()
        ours, theirs = np.array(found.logps[:2]), np.array(before.logps[:2])
        if not config.wants_reference:
            theirs[:] = 0
        if config.length_normalized or config.loss_type in ("ipo", "orpo"):
            ours, theirs = ours / found.tokens[:2], theirs / found.tokens[:2]
        wanted = trl(config, *(torch.tensor(np.array(x)) for x in (*ours.T, *theirs.T))).mean()
        nll = -found.logps[:2, 0].sum() / found.tokens[:2, 0].sum()
        wanted += {"ipo": 0.5, "orpo": 1}.get(config.loss_type, 0) * float(nll)
        np.testing.assert_allclose(logs["loss"], wanted, rtol=1e-5)
        margins = config.beta * np.diff(theirs - ours, axis=1)
        np.testing.assert_allclose(logs["rewards/margins"], margins.mean(), rtol=1e-4)
        assert logs["accuracy"] == (margins > 0).mean() and logs["pairs"] == 2


@pytest.mark.slow
def test_references_from_anywhere_are_the_same(models, monkeypatch):
    """Held beside the model or computed beforehand; the clips are heard once by each model."""
    model, base = models
    calls, listen = [], Qwen2Audio.listen
    monkeypatch.setattr(Qwen2Audio, "listen", lambda *a, **k: calls.append(1) or listen(*a, **k))
    config, batch = PreferenceConfig(), pairs()

    @jax.jit
    def with_gradients(model, base, batch):
        graph, params = nnx.split((model, base))
        of = lambda p: (lambda m, b: preference(m, batch, config=config, reference=b).mean())(
            *nnx.merge(graph, p)
        )
        return jax.value_and_grad(of)(params)

    value, grads = with_gradients(model, base, batch)
    assert len(calls) == 2
    assert any(np.asarray(x).any() for x in jax.tree.leaves(grads[0]))
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(grads[1]))
    made = jax.jit(reference_logps)(base, batch)
    assert set(made) == set(REFERENCE)
    again = jax.jit(lambda m, b: preference(m, b, config=config).mean())(model, batch | made)
    np.testing.assert_allclose(again, value, rtol=1e-6)
    with pytest.raises(ValueError, match="sigmoid wants a reference: a model, or ref_chosen_logps"):
        preference(model, batch, config=config)


def test_answers_of_different_shapes_are_refused(models):
    batch = pairs()
    for name in ("input_ids", "attention_mask", "labels"):
        batch[f"chosen_{name}"] = batch[f"chosen_{name}"][:, :-1]
    with pytest.raises(ValueError, match=r"of one shape, got \(3, 23\) and \(3, 24\)"):
        score(models[0], batch)


def compare_with_torch(waves, folder):
    """Log-probabilities, DPO's loss, and all gradients, of two pairs about two clips each."""
    shape = reference.SHAPES["two_kv_heads"]
    theirs, base = reference.build(shape), reference.build(shape, seed=1)
    model, ours_base = (
        weights.load(reference.save(m, folder / str(i)), scan_layers=True)
        for i, m in enumerate((theirs, base))
    )
    mel, mask = features(waves, shape.encoder.mels)
    counts = encoder.states_of(mask.sum(axis=1))
    words, clips = np.random.default_rng(0).integers(4, 320, (2, 2, 9)), []
    for first in (0, 2):
        clips.append([shape.audio_token] * int(counts[first : first + 2].sum()))
    length = max(map(len, clips)) + 9
    batch = {"input_features": mel, "feature_attention_mask": mask.astype(np.int32)}
    for s, side in enumerate(("chosen", "rejected")):
        rows = [[*clip, *words[s, i]] for i, clip in enumerate(clips)]
        ids, labels = np.zeros((2, length), np.int32), np.full((2, length), IGNORED)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            labels[i, len(row) - 6 - s : len(row)] = row[-6 - s :]
        batch[f"{side}_input_ids"], batch[f"{side}_labels"] = ids, labels
        batch[f"{side}_attention_mask"] = (
            np.array([[i < len(r) for i in range(length)] for r in rows]) * 1
        )

    def logps_of(model):
        """TRL's: log_softmax, gathered at the labels, summed."""
        out = []
        for side in ("chosen", "rejected"):
            names = ("input_ids", "attention_mask")
            inputs = {name: batch[f"{side}_{name}"] for name in names} | {
                name: batch[name] for name in ("input_features", "feature_attention_mask")
            }
            logits = model(**{k: torch.from_numpy(np.array(x)) for k, x in inputs.items()}).logits
            labels = torch.from_numpy(batch[f"{side}_labels"])[:, 1:]
            each = logits[:, :-1].log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
            out.append((each * (labels != IGNORED)).sum(1))
        return torch.stack(out)

    found = logps_of(theirs)
    with torch.no_grad():
        before = logps_of(base)
    config = PreferenceConfig(beta=0.3)
    wanted = trl(config, *found, *before).mean()
    wanted.backward()

    short = 2 * int(encoder.positions_of(mask.sum(axis=1)).max()) + 2
    batch = {k: x[..., :short] if "feature" in k else x for k, x in batch.items()}
    graph, params = nnx.split(model)

    def run(params, base, batch):
        model = nnx.merge(graph, params)
        sums = preference(model, batch, config=config, reference=base)
        return sums.mean(), score(model, batch).logps

    (value, logps), grads = jax.jit(jax.value_and_grad(run, has_aux=True))(params, ours_base, batch)
    np.testing.assert_allclose(logps, found.detach().T, rtol=1e-4)
    np.testing.assert_allclose(value, wanted.item(), rtol=1e-4)
    paths = jax.tree_util.tree_flatten_with_path(grads)[0]
    ours = {table.split(path)[0]: np.asarray(grad) for path, grad in paths}
    slopes = {table.on_disk(name): p.grad for name, p in theirs.named_parameters()}
    for row in table.entries(shape):
        if row.path != "encoder.positions":
            grad = ours[row.path] if row.layer is None else ours[row.path][row.layer]
            correct = row.to_ours(slopes[row.name].numpy())
            error = np.linalg.norm(grad - correct) / np.linalg.norm(correct)
            assert error <= 1e-4, f"{row.key}: {error}"


def test_dpo_equals_torch(chirp, tmp_path):
    compare_with_torch([chirp(s, i) for i, s in enumerate((1.2, 0.31, 2.0, 0.8))], tmp_path)


@pytest.mark.slow
def test_dpo_equals_torch_on_speech(shared_data, tmp_path):
    names = ("librispeech/1255-90413-0010.flac", "ami_ES2011a_40s_46s.wav", "jfk.flac")
    waves = [audio.load(str(shared_data / "speech_en" / name)) for name in names]
    compare_with_torch([*waves, waves[0][:20_000]], tmp_path)
