"""Beam search finds what transformers' finds."""

import jax
import numpy as np
import pytest
import reference
from flax import nnx
from test_generate import NEW, Pair, make_inputs, row_of

from qwen2audio_jax import Qwen2Audio, Sampling, generate

# The reference's beams hear the clips of one prompt in a wrong order (it repeats each clip for
# all beams before it comes to the next), which is no matter as long as they are the same.
THREE = [(0.3,), (4.0, 4.0), ()]
EIGHT = [(0.5,), (), (30.0,), (2, 2, 2), (9,), (6,), (), (2,)]


def repeating(config, clips):
    """Inputs whose prompts have each but one clip, any number of times."""
    inputs = make_inputs(config, clips)
    first = np.repeat(np.cumsum([0, *map(len, clips)])[:-1], list(map(len, clips)))
    return inputs | {"input_features": inputs["input_features"][first]}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return Pair("one_layer", tmp_path_factory.mktemp("one_layer"))


@pytest.mark.parametrize(
    ("num_beams", "options"),
    [
        (2, {}),
        (4, {"length_penalty": 0.5, "early_stopping": True}),
        (3, {"length_penalty": 2.0, "early_stopping": "never"}),
        (3, {"length_penalty": -1.0, "min_new_tokens": 5}),
    ],
    ids=str,
)
def test_beams_equal_the_references(pair, num_beams, options):
    """The best answers, all of them, in their order; with and without a penalty for repetition.

    Some common tokens are end tokens, so that answers end at different lengths.
    """
    inputs = repeating(pair.config, THREE)
    plain = generate(pair.ours, inputs, max_new_tokens=NEW, end_tokens=())
    ends = [int(plain[0, 9]), int(plain[1, 30])]
    for penalty in (1.0, 1.1):
        ours = generate(
            pair.ours,
            inputs,
            max_new_tokens=NEW,
            num_beams=num_beams,
            n=num_beams,
            end_tokens=ends,
            sampling=Sampling(temperature=0.0, repetition_penalty=penalty),
            **options,
        )
        theirs = pair.answers(
            inputs,
            max_new_tokens=NEW,
            num_beams=num_beams,
            num_return_sequences=num_beams,
            eos_token_id=ends,
            repetition_penalty=penalty,
            **options,
        )
        np.testing.assert_array_equal(ours, theirs)


def test_beams_of_eight_rows_equal_the_references(pair):
    """64 new tokens in a batch of every kind of prompt, and each row as when alone."""
    inputs = repeating(pair.config, EIGHT)
    options = {"max_new_tokens": NEW, "num_beams": 3}
    ours = generate(pair.ours, inputs, **options)
    np.testing.assert_array_equal(ours, pair.answers(inputs, **options))
    alone = generate(pair.ours, row_of(inputs, EIGHT, 0), **options)
    np.testing.assert_array_equal(alone[0], ours[0, : alone.shape[1]])


def test_several_clips_are_heard_in_their_order(pair):
    """A prompt of two clips has the same beams in a batch as alone."""
    clips = [(0.3,), (1.0, 0.7)]
    inputs = make_inputs(pair.config, clips)
    options = {"max_new_tokens": 12, "num_beams": 3}
    ours = generate(pair.ours, inputs, **options)
    alone = generate(pair.ours, row_of(inputs, clips, 1), **options)
    np.testing.assert_array_equal(alone[0], ours[1, : alone.shape[1]])


@pytest.mark.parametrize("scan_layers", [False, True])
def test_beams_logprobs_are_the_models_own(scan_layers):
    """The scores of the tokens are those of the uncached model, in either form of the stack."""
    config = reference.SHAPES["tied"]
    model = Qwen2Audio(config, scan_layers=scan_layers, rngs=nnx.Rngs(3))
    ids = np.random.default_rng(0).integers(4, 300, (2, 10)).astype(np.int32)
    tokens, scores = generate(
        model, {"input_ids": ids}, max_new_tokens=6, num_beams=3, end_tokens=(), logprobs=True
    )
    logits = model(np.concatenate([ids, tokens], axis=1))[:, 9:-1]
    expected = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), tokens[..., None], 2)
    np.testing.assert_allclose(scores, expected[..., 0], atol=1e-4)


def test_options_at_odds_are_refused():
    model = Qwen2Audio(reference.SHAPES["tied"], scan_layers=False, rngs=nnx.Rngs(0))
    inputs = {"input_ids": np.full((1, 4), 9, np.int32)}
    for wrong in ({"sampling": Sampling()}, {"n": 4}, {"stop": ["."]}):
        with pytest.raises(ValueError, match="3 beams want temperature 0, no stop strings and at"):
            generate(model, inputs, num_beams=3, **wrong)
