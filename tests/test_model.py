"""Sound and text to scores: one answer however a batch is padded, and errors with both numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from flax import nnx

from qwen2audio_jax import Qwen2Audio
from qwen2audio_jax.encoder import states_of

LENGTHS = [30, 13, 21]


@pytest.fixture(scope="module")
def model():
    return small.shaken(Qwen2Audio(small.CONFIG, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def logits(model):
    """Scores of a batch of three rows padded right, and which of them belong to tokens."""
    inputs = small.inputs(LENGTHS)
    return np.asarray(model(**inputs)), inputs["attention_mask"].astype(bool)


def test_scores_are_float32_for_every_token_and_word(model, logits):
    scores, mask = logits
    assert scores.shape == (*mask.shape, 64) and scores.dtype == np.float32
    assert model.dtype == jnp.float32


def test_left_padding_equals_right_padding(model, logits):
    """A row's tokens have the same scores on either side."""
    scores, mask = logits
    inputs = small.inputs(LENGTHS, left=True)
    left = np.asarray(model(**inputs))[inputs["attention_mask"].astype(bool)]
    np.testing.assert_allclose(left, scores[mask], rtol=1e-4, atol=1e-4)


def test_a_row_alone_equals_itself_in_a_batch(model, logits):
    """At another length in tokens, too."""
    scores, mask = logits
    alone = model(**small.inputs(LENGTHS[1:2], length=int(mask[1].sum())))
    np.testing.assert_allclose(alone[0], scores[1][mask[1]], rtol=1e-4, atol=1e-4)


def test_a_short_picture_equals_thirty_seconds(model, logits):
    """T may be as short as the clip."""
    scores, mask = logits
    full = np.asarray(model(**small.inputs(LENGTHS, total=3000)))
    np.testing.assert_allclose(full[mask], scores[mask], rtol=1e-4, atol=1e-4)


def test_what_is_heard_matters_from_its_place_on(model, logits):
    """Another clip in the second row moves that row from its first audio token on; no other."""
    scores, _ = logits
    inputs = small.inputs(LENGTHS)
    inputs["input_features"][1] *= -1
    moved = np.abs(np.asarray(model(**inputs)) - scores).max(axis=-1)
    np.testing.assert_array_equal(moved[[0, 2]], 0)
    assert moved[1, 0] == 0 and moved[1, 1:3].min() > 1e-4


def test_listening_and_merging_make_the_decoder_s_input(model):
    """Embeddings of words are the table's rows; those of clips are the projected states."""
    inputs = {name: jnp.asarray(x) for name, x in small.inputs(LENGTHS).items()}
    states, counts = model.listen(inputs["input_features"], inputs["feature_attention_mask"])
    np.testing.assert_array_equal(counts, states_of(np.array(LENGTHS)))
    mask = inputs.pop("attention_mask")
    x = np.asarray(model.embed(**inputs))
    slots = np.asarray(inputs["input_ids"]) == small.CONFIG.audio_token
    heard = np.concatenate([s[:n] for s, n in zip(states, counts, strict=True)])
    np.testing.assert_allclose(x[slots], heard, rtol=1e-6)
    table = np.asarray(model.decoder.embedding.embedding[...])
    np.testing.assert_array_equal(x[~slots], table[np.asarray(inputs["input_ids"])[~slots]])
    assert mask.sum() > slots.sum()


def test_text_alone_needs_no_clip(model):
    """Without a clip and without a mask: every token is one."""
    ids = np.array([[5, 9, 11]])
    np.testing.assert_allclose(model(ids), model(ids, np.ones((1, 3), int)), rtol=1e-6)


def test_tokens_and_states_that_differ_in_number_are_refused(model):
    """With both numbers, for a clip that is missing as well; inside of jit nobody can look."""
    inputs = small.inputs(LENGTHS)
    inputs["feature_attention_mask"][0, 20:] = 0
    with pytest.raises(ValueError, match="15 audio tokens, its 3 clips have 13 audio states"):
        model(**inputs)
    with pytest.raises(ValueError, match="15 audio tokens, its 0 clips have 0 audio states"):
        model(inputs["input_ids"], inputs["attention_mask"])
    assert jax.eval_shape(lambda x: model(**x), inputs).shape == (3, 24, 64)


def test_a_list_of_blocks_equals_the_stack(model, logits):
    scores, mask = logits
    listed = small.listed(model)(**small.inputs(LENGTHS))
    np.testing.assert_allclose(np.asarray(listed)[mask], scores[mask], rtol=1e-4, atol=1e-4)
