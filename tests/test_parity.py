"""Every stage, the loss and all gradients equal transformers'."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch
import transformers
from flax import nnx

from convert import verify
from qwen2audio_jax import audio, encoder, weights
from qwen2audio_jax.training import loss
from qwen2audio_jax.weights import table

TOLERANCE = 1e-4


def features(waves, mels, frames=3000):
    """transformers' own log-mel, cut to `frames`."""
    extractor = transformers.WhisperFeatureExtractor(feature_size=mels)
    out = extractor(
        waves,
        sampling_rate=16_000,
        padding="max_length",
        return_attention_mask=True,
        return_tensors="np",
    )
    return out["input_features"][..., :frames], out["attention_mask"][..., :frames]


def batch(config, waves, seed=0):
    """Three rows: two clips and text, a clip and text, text alone; padded left, right, both."""
    mel, mask = features(waves, config.encoder.mels)
    rng = np.random.default_rng(seed)
    counts = encoder.states_of(mask.sum(axis=1))
    special = {config.audio_token, config.pad_token, *config.end_tokens}
    words = [word for word in range(config.decoder.vocabulary) if word not in special]
    text = lambda n: list(rng.choice(words, n))
    clip = lambda i: [config.audio_token] * int(counts[i])
    rows = [text(5) + clip(0) + text(3) + clip(1) + text(4), text(2) + clip(2) + text(9), text(7)]
    length = max(map(len, rows)) + 2
    ids = np.full((3, length), config.pad_token, np.int32)
    attention = np.zeros((3, length), np.int32)
    for i, (row, start) in enumerate(zip(rows, (2, 0, 4), strict=True)):
        ids[i, start : start + len(row)] = row
        attention[i, start : start + len(row)] = 1
    return {
        "input_ids": ids,
        "attention_mask": attention,
        "input_features": mel,
        "feature_attention_mask": mask.astype(np.int32),
    }


def shortened(inputs):
    """The fewest frames that the encoder needs for these clips."""
    needed = 2 * int(encoder.positions_of(inputs["feature_attention_mask"].sum(axis=1)).max()) + 2
    keys = ("input_features", "feature_attention_mask")
    return inputs | {key: inputs[key][..., :needed] for key in keys}


@pytest.fixture(scope="module")
def made(chirp):
    """Three clips of made sound, one of an odd number of encoder positions."""
    return [chirp(2.0), chirp(0.31, 1), chirp(5.73, 2)]


@pytest.fixture(scope="module")
def speech(shared_data):
    """Three clips of real speech, the longest of 30 s."""
    names = ("librispeech/1255-90413-0010.flac", "ami_ES2011a_40s_46s.wav", "jfk.flac")
    files = [shared_data / "speech_en" / name for name in names]
    waves = [audio.load(str(file)) for file in files]
    return [waves[0], waves[1][:77_777], np.tile(waves[2], 3)[:480_000]]


@pytest.fixture(scope="module", params=reference.SHAPES)
def pair(request, tmp_path_factory):
    """A model of every shape: the config, torch's, the folder it was saved to."""
    config = reference.SHAPES[request.param]
    theirs = reference.build(config)
    return config, theirs, reference.save(theirs, tmp_path_factory.mktemp(request.param))


def assert_close(ours, theirs, inputs):
    for stage, difference in verify.differences(ours, theirs, inputs).items():
        assert difference.max() <= TOLERANCE, f"{stage} differs by {difference.max()}"


def test_every_stage_equals_the_reference(pair, made):
    """Float32, on made sound: conv stem to logits; all 30 s, and only the clips' own length."""
    config, theirs, folder = pair
    inputs = batch(config, made)
    expected = verify.trace_reference(theirs, inputs)
    assert len(expected) == config.encoder.layers + config.decoder.layers + 5
    assert_close(verify.trace(weights.load(folder, scan_layers=True), inputs), expected, inputs)
    short = shortened(inputs)
    assert_close(verify.trace(weights.load(folder), short), expected, short)


def test_every_stage_equals_the_reference_on_speech(pair, speech):
    """Float32, on real speech: conv stem to logits; all 30 s, and only the clips' own length."""
    config, theirs, folder = pair
    model, inputs = weights.load(folder, scan_layers=True), batch(config, speech)
    expected = verify.trace_reference(theirs, inputs)
    assert_close(verify.trace(model, inputs), expected, inputs)
    assert_close(verify.trace(model, shortened(inputs)), expected, shortened(inputs))


@pytest.mark.parametrize("shape", ["one_layer", "tied"])
def test_the_trace_is_what_the_model_computes(shape, made, tmp_path):
    """The stages that are compared are those that a call goes through."""
    config = reference.SHAPES[shape]
    reference.save(reference.build(config), tmp_path)
    model, inputs = weights.load(tmp_path), shortened(batch(config, made))
    tokens = inputs["attention_mask"].astype(bool)
    traced = verify.trace(model, inputs)["logits"][tokens]
    np.testing.assert_allclose(np.asarray(model(**inputs))[tokens], traced, atol=1e-5)


def test_bfloat16_is_no_worse_than_the_reference(pair, made):
    """Our bfloat16 lies as close to torch's float32 as torch's own bfloat16 does, in the mean."""
    config, theirs, folder = pair
    inputs = batch(config, made)
    exact = verify.trace_reference(theirs, inputs)
    half = type(theirs).from_pretrained(folder, dtype=torch.bfloat16).eval()
    rounded = verify.differences(verify.trace_reference(half, inputs), exact, inputs)
    ours = verify.trace(weights.load(folder, dtype=jnp.bfloat16), inputs)
    ratios = {
        stage: difference.mean() / rounded[stage].mean()
        for stage, difference in verify.differences(ours, exact, inputs).items()
    }
    # one stage is a matter of a few roundings' luck, all of them are not
    assert np.mean(list(ratios.values())) <= 1.0, ratios
    assert max(ratios.values()) <= 1.05, ratios


def test_the_loss_and_all_gradients_equal_the_reference(pair, made):
    """A labelled batch: the relative error of the loss and of every parameter's gradient."""
    config, theirs, folder = pair
    inputs = batch(config, made)
    learned = inputs["attention_mask"].astype(bool) & (inputs["input_ids"] != config.audio_token)
    learned[:, 1:] &= inputs["attention_mask"][:, :-1].astype(bool)  # what padding expects is noise
    labels = np.where(learned, inputs["input_ids"], loss.IGNORED)
    theirs.zero_grad()
    torch_inputs = {name: torch.from_numpy(np.array(x)) for name, x in inputs.items()}
    expected = theirs(**torch_inputs, labels=torch.from_numpy(labels).long()).loss
    expected.backward()

    graph, params = nnx.split(weights.load(folder, scan_layers=True))
    batched = jax.tree.map(jnp.asarray, shortened(inputs) | {"labels": labels})
    value = lambda params: loss.next_token(nnx.merge(graph, params), batched).mean()
    got, grads = jax.jit(jax.value_and_grad(value))(params)
    np.testing.assert_allclose(got, expected.item(), rtol=TOLERANCE)
    paths = jax.tree_util.tree_flatten_with_path(grads)[0]
    ours = {table.split(path)[0]: np.asarray(grad) for path, grad in paths}
    wanted = {table.on_disk(name): p.grad for name, p in theirs.named_parameters()}
    assert wanted["audio_tower.embed_positions.weight"] is None  # never trained
    for row in table.entries(config):
        if row.path != "encoder.positions":
            grad = ours[row.path] if row.layer is None else ours[row.path][row.layer]
            correct = row.to_ours(wanted[row.name].numpy())
            error = np.linalg.norm(grad - correct) / np.linalg.norm(correct)
            assert error <= TOLERANCE, f"{row.key}: {error}"
