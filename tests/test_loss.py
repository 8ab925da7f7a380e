"""The loss is the mean cross entropy of learned tokens, and never holds all logits at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
from flax import nnx

from qwen2audio_jax import DecoderConfig, Qwen2Audio
from qwen2audio_jax.decoder import Decoder
from qwen2audio_jax.training import loss

LENGTHS = [30, 13, 21]


@pytest.fixture(scope="module")
def model():
    return small.shaken(Qwen2Audio(small.CONFIG, rngs=nnx.Rngs(0)))


@pytest.fixture
def batch():
    """Padded right; words are learned, audio tokens and padding are not."""
    inputs = small.inputs(LENGTHS)
    learned = (inputs["attention_mask"] == 1) & (inputs["input_ids"] != small.CONFIG.audio_token)
    return inputs | {"labels": np.where(learned, inputs["input_ids"], loss.IGNORED)}


@pytest.fixture(scope="module")
def measure(model):
    """Loss, metrics and gradients of a batch."""
    graph, params = nnx.split(model)
    next_token = lambda p, batch: loss.next_token(nnx.merge(graph, p), batch)
    run = jax.jit(jax.value_and_grad(next_token, has_aux=True))
    return lambda batch: run(params, batch)


def test_the_loss_is_optax_cross_entropy_of_what_comes_next(model, measure, batch):
    """Shifted by one, mean over learned tokens; so are their number and the accuracy."""
    (value, metrics), _ = measure(batch)
    logits = model(**{name: x for name, x in batch.items() if name != "labels"})[:, :-1]
    labels = batch["labels"][:, 1:]
    kept = labels != loss.IGNORED
    each = optax.softmax_cross_entropy_with_integer_labels(logits, np.where(kept, labels, 0))
    np.testing.assert_allclose(value, np.asarray(each)[kept].mean(), rtol=1e-5)
    assert metrics["tokens"] == kept.sum()
    hits = np.asarray(logits).argmax(axis=-1)[kept] == labels[kept]
    np.testing.assert_allclose(metrics["accuracy"], hits.mean(), rtol=1e-6)


@pytest.mark.parametrize("chunk", [1, 7, 16, 69])
def test_chunks_change_nothing(monkeypatch, chunk):
    """Sizes that do not divide the 69 tokens among them; values and gradients."""
    c = DecoderConfig(**{**vars(small.DECODER), "layers": 1})
    graph, params = nnx.split(small.shaken(Decoder(c, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    x = jnp.float32(rng.standard_normal((3, 23, 12)))
    labels = jnp.array(np.where(rng.random((3, 23)) < 0.5, rng.integers(0, 64, (3, 23)), -100))

    def run(params, x):
        nll, hits = loss.token_losses(nnx.merge(graph, params), x, labels)
        return (nll**2).sum(), (nll, hits)

    both = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)
    whole = jax.jit(both)(params, x)
    monkeypatch.setattr(loss, "CHUNK", chunk)
    parts = jax.jit(lambda *a: both(*a))(params, x)
    for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    nll, hits = whole[0][1]
    ignored = np.asarray(labels) == -100
    assert (np.asarray(nll)[~ignored] > 0).all()
    assert not np.asarray(nll)[ignored].any() and not np.asarray(hits)[ignored].any()


def test_what_is_ignored_has_no_say(measure, batch):
    """Labels on padding count for nothing, even where somebody wrote some; given words likewise."""
    (value, metrics), _ = measure(batch)
    padding = batch["attention_mask"] == 0
    (same, counted), _ = measure(batch | {"labels": np.where(padding, 7, batch["labels"])})
    assert same == value and counted["tokens"] == metrics["tokens"]
    fewer = batch["labels"].copy()
    fewer[0] = loss.IGNORED
    (other, counted), _ = measure(batch | {"labels": fewer})
    assert other != value and counted["tokens"] < metrics["tokens"]


def test_nothing_to_learn_is_zero_and_moves_nothing(measure, batch):
    """A batch without a learned token has loss 0 and gradients 0, not NaN."""
    nothing = np.full_like(batch["labels"], loss.IGNORED)
    (value, metrics), grads = measure(batch | {"labels": nothing})
    assert value == 0 and metrics["tokens"] == 0 and metrics["accuracy"] == 0
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(grads))


def equations(jaxpr):
    """Every operation of a program, those of the programs inside of it too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_all_logits_never_exist_at_once(monkeypatch):
    """Forward and backward: no array has a vocabulary for more tokens than a chunk."""
    monkeypatch.setattr(loss, "CHUNK", 8)
    V = 2048
    c = DecoderConfig(**{**vars(small.DECODER), "layers": 1, "vocabulary": V, "width": 4})
    graph, params = nnx.split(Decoder(c, rngs=nnx.Rngs(0)))
    labels = jnp.ones((2, 25), int)
    total = lambda p, x: loss.token_losses(nnx.merge(graph, p), x, labels)[0].sum()
    gradient = jax.value_and_grad(total, argnums=(0, 1))
    program = jax.make_jaxpr(gradient)(params, jnp.ones((2, 25, 4)))
    shapes = {v.aval.shape for e in equations(program.jaxpr) for v in e.outvars}
    found = [shape for shape in shapes if V in shape]
    # a chunk's logits are there to be found
    assert max(int(np.prod(s)) for s in found) == 8 * V


def test_audio_states_that_spell_the_words_help(model, batch):
    """CTC is added with its weight: a mean over words, to which ignored words add nothing."""
    words = np.array([[9, 11, -100], [12, -100, -100], [20, 21, -100]])
    spelled = batch | {"words": words}
    plain, _ = jax.jit(loss.next_token)(model, batch)
    value, metrics = jax.jit(functools.partial(loss.next_token_and_words, weight=0.3))(
        model, spelled
    )
    np.testing.assert_allclose(value, plain + 0.3 * metrics["ctc"], rtol=1e-5)
    states, counts = jax.jit(model.listen)(
        jnp.array(batch["input_features"]), jnp.array(batch["feature_attention_mask"])
    )
    chances = np.asarray(jax.nn.log_softmax(model.decoder.logits(states)))
    wanted = sum(
        spelling(chances[i, : counts[i]], [w for w in row if w >= 0]) for i, row in enumerate(words)
    )
    np.testing.assert_allclose(metrics["ctc"], wanted / 5, rtol=1e-4)


def spelling(chances, words, blank=0):
    """-log of the chance of all paths that spell `words`, by the textbook's recursion."""
    symbols = [blank, *(s for word in words for s in (word, blank))]
    paths = np.full(len(symbols), -np.inf)
    paths[:2] = chances[0, symbols[:2]]
    for now in chances[1:]:
        before = paths.copy()
        for i, symbol in enumerate(symbols):
            skip = i > 1 and symbol not in (blank, symbols[i - 2])
            paths[i] = now[symbol] + np.logaddexp.reduce(
                before[max(i - 2 if skip else i - 1, 0) : i + 1]
            )
    return -np.logaddexp(*paths[-2:])


def test_rematerialised_loss_is_the_same(model, batch):
    """`remat` reaches both towers: the same value, with checkpoints in the program."""
    run = lambda remat: jax.jit(functools.partial(loss.next_token, remat=remat))(model, batch)[0]
    np.testing.assert_allclose(run(True), run(False), rtol=1e-6)
    programs = {
        remat: jax.make_jaxpr(functools.partial(loss.next_token, remat=remat))(model, batch)
        for remat in (True, False)
    }
    checkpoints = lambda remat: sum(
        equation.primitive.name in ("checkpoint", "remat2")
        for equation in equations(programs[remat].jaxpr)
    )
    assert checkpoints(True) == checkpoints(False) + 2
