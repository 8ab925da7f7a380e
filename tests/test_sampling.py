"""Each rule of choice is transformers', and chance is fair."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch
from flax import nnx
from transformers.generation import logits_process as theirs

from qwen2audio_jax import Qwen2Audio, Sampling, generate, sampling

B, V = 4, 300
CONFIG = reference.SHAPES["tied"]


@pytest.fixture
def logits():
    return jnp.asarray(3 * np.random.default_rng(0).normal(size=(B, V)), jnp.float32)


def agree(ours, processor, logits, ids=None):
    ids = torch.zeros((len(logits), 1), dtype=torch.int64) if ids is None else torch.tensor(ids)
    expected = processor(ids, torch.tensor(np.array(logits))).numpy()
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("k", [1, 20, V, 2 * V])
def test_top_k_is_the_references(logits, k):
    agree(sampling.keep_top_k(logits, k), theirs.TopKLogitsWarper(k), logits)


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.5, 0.9, 0.999])
def test_top_p_is_the_references(logits, p):
    agree(sampling.keep_top_p(logits, p), theirs.TopPLogitsWarper(p), logits)


def test_ties_are_kept_as_the_reference_keeps_them():
    """All that equal the k-th best stay; of equals on the border of p the later ones stay."""
    ties = np.array([[1, 2, 2, 2, 0, 3], [1, 1, 1, 1, 1, 1]], np.float32)
    ours = jnp.asarray(ties)
    for k in (1, 2, 3, 5):
        agree(sampling.keep_top_k(ours, k), theirs.TopKLogitsWarper(k), ties)
    for p in (0.3, 0.5, 0.6, 0.9):
        agree(sampling.keep_top_p(ours, p), theirs.TopPLogitsWarper(p), ties)


def test_the_repetition_penalty_is_the_references(logits):
    ids = np.random.default_rng(1).integers(0, V, (B, 40))
    seen = jnp.zeros((B, V), bool).at[np.arange(B)[:, None], ids].set(True)
    for penalty in (0.8, 1.1):
        ours = sampling.penalise(logits, seen, penalty)
        agree(ours, theirs.RepetitionPenaltyLogitsProcessor(penalty), logits, ids)


@pytest.mark.parametrize("made", [0, 4, 5])
def test_the_shortest_answer_is_the_references(logits, made):
    rules = sampling.rules_for(CONFIG, Sampling(temperature=0.0), min_new_tokens=5)
    ours = sampling.adjust(logits, None, jnp.int32(made), rules)
    processor = theirs.MinNewTokensLengthLogitsProcessor(7, 5, list(CONFIG.end_tokens))
    agree(ours, processor, logits, np.ones((B, 7 + made), np.int64))


def test_the_rules_together_are_the_references(logits):
    """Penalty, end tokens, temperature, top-k, top-p, in this order."""
    how = Sampling(temperature=0.7, top_k=20, top_p=0.5, repetition_penalty=1.1)
    rules = sampling.rules_for(CONFIG, how, min_new_tokens=2)
    ids = np.random.default_rng(1).integers(0, V, (B, 9))
    seen = jnp.zeros((B, V), bool).at[np.arange(B)[:, None], ids].set(True)
    ours = sampling.warp(sampling.adjust(logits, seen, jnp.int32(0), rules), rules)
    processors = theirs.LogitsProcessorList(
        [
            theirs.RepetitionPenaltyLogitsProcessor(1.1),
            theirs.MinNewTokensLengthLogitsProcessor(9, 2, list(CONFIG.end_tokens)),
            theirs.TemperatureLogitsWarper(0.7),
            theirs.TopKLogitsWarper(20),
            theirs.TopPLogitsWarper(0.5),
        ]
    )
    agree(ours, processors, logits, ids)


def test_tokens_are_as_frequent_as_they_are_likely(logits):
    """10 000 draws, against the probabilities after the rules: a chi-square test."""
    rules = sampling.rules_for(CONFIG, Sampling(temperature=0.9, top_k=12))
    draw = jax.vmap(
        lambda step: sampling.choose(logits[:1], None, step, jnp.zeros(1, jnp.uint32), rules)
    )
    tokens = np.asarray(draw(jnp.arange(10_000))[0]).ravel()
    likely = np.asarray(jax.nn.softmax(sampling.warp(logits[:1], rules)))[0]
    expected, counts = 10_000 * likely, np.bincount(tokens, minlength=V)
    assert (counts[expected == 0] == 0).all()
    some = expected > 0
    # 11 degrees of freedom: above 31.3 once in a thousand
    assert (((counts - expected) ** 2)[some] / expected[some]).sum() < 31.3


def test_a_seed_fixes_the_answer():
    """The same seed, the same tokens: in any batch, and as one of any number of samples."""
    model = Qwen2Audio(CONFIG, scan_layers=False, rngs=nnx.Rngs(0))
    ids = np.random.default_rng(0).integers(4, V, (3, 12))
    hot = lambda seed: Sampling(temperature=5.0, top_p=0.99, repetition_penalty=1.2, seed=seed)
    answer = lambda ids, n=2, seed=1: generate(
        model, {"input_ids": ids}, max_new_tokens=16, sampling=hot(seed), n=n, end_tokens=()
    )
    tokens = answer(ids)
    assert tokens.shape == (6, 16)
    np.testing.assert_array_equal(answer(ids), tokens)
    np.testing.assert_array_equal(answer(ids[1:2]), tokens[2:4])
    np.testing.assert_array_equal(answer(ids[1:2], n=4)[:2], tokens[2:4])
    assert (answer(ids, seed=2) != tokens).any(axis=1).all()
    assert len({tuple(row) for row in tokens.tolist()}) == 6  # samples differ


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1.0), ("top_k", 0), ("top_p", 0.0), ("top_p", 1.5),
     ("repetition_penalty", 0.0), ("repetition_penalty", math.nan), ("temperature", math.nan),
     ("temperature", math.inf)],
)  # fmt: skip
def test_impossible_rules_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be .*, got {value}"):
        Sampling(**{name: value})
