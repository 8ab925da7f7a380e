"""The loss is the mean cross entropy of learned tokens, and never holds all logits at once."""

import dataclasses
import functools
import operator

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

    def next_token(params, batch):
        sums = loss.next_token(nnx.merge(graph, params), batch)
        return sums.mean(), sums.means()

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


@pytest.mark.parametrize("chunk", [3, 7, 1024])
def test_token_log_probabilities_are_log_softmax(monkeypatch, chunk):
    """With their gradients, for chunks that divide nothing; the rows learn 0 to 23 tokens."""
    monkeypatch.setattr(loss, "CHUNK", chunk)
    c = DecoderConfig(**{**vars(small.DECODER), "layers": 1})
    graph, params = nnx.split(small.shaken(Decoder(c, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    x, slopes = jnp.float32(rng.standard_normal((4, 23, 12))), rng.standard_normal((4, 23))
    kept = rng.random((4, 23)) < np.array([[0.0], [0.2], [0.6], [1.0]])
    labels = jnp.array(np.where(kept, rng.integers(0, 64, (4, 23)), -100))

    def ours(params, x):
        logps, hits = loss.token_logps(nnx.merge(graph, params), x, labels)
        return (slopes * logps).sum(), (logps, hits)

    def wanted(params, x):
        logps = jax.nn.log_softmax(nnx.merge(graph, params).logits(x))
        each = jnp.take_along_axis(logps, jnp.where(kept, labels, 0)[..., None], axis=2)[..., 0]
        hits = kept & (logps.argmax(axis=-1) == labels)
        return (slopes * kept * each).sum(), (kept * each, hits)

    run = lambda f: jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(params, x)
    pairs = map(jax.tree.leaves, (run(ours), run(wanted)))
    for a, b in zip(*pairs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


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


def test_the_loud_states_of_what_is_ignored_move_nothing():
    """Logits beyond what float32 can exponentiate, where nothing is learned: slopes as without."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 9, 12)).astype(np.float32)
    labels = jnp.array([np.full(9, loss.IGNORED), rng.integers(0, 64, 9)])
    table = jnp.float32(rng.standard_normal((64, 12)))
    total = lambda x, table: loss._token_logps(3, x, table, labels)[0].sum()
    slopes = jax.jit(jax.grad(total, argnums=(0, 1)))
    for loud, quiet in zip(slopes(x * [[[1000]], [[1]]], table), slopes(x, table), strict=True):
        np.testing.assert_allclose(loud, quiet, rtol=1e-6)


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


def test_the_compiled_step_holds_no_logits_of_a_batch():
    """Qwen2-Audio's vocabulary, 16 rows of 1024 tokens: the whole step fits into a fifth of
    [B L V]."""
    B, L, V = 16, 1024, 156_032
    c = DecoderConfig(**{**vars(small.DECODER), "layers": 1, "vocabulary": V})
    model = nnx.eval_shape(
        lambda: Qwen2Audio(dataclasses.replace(small.CONFIG, decoder=c), rngs=nnx.Rngs(0))
    )
    batch = {
        name: jax.ShapeDtypeStruct((B, L), np.int32)
        for name in ("input_ids", "attention_mask", "segment_ids", "labels")
    }
    graph, params = nnx.split(model)
    mean = lambda params, batch: loss.next_token(
        nnx.merge(graph, params), batch, remat="full"
    ).mean()
    memory = jax.jit(jax.grad(mean)).lower(params, batch).compile().memory_analysis()
    assert loss.CHUNK * V * 4 < memory.temp_size_in_bytes < B * L * V * 4 / 5


def test_logits_cost_what_is_learned(monkeypatch):
    """As many chunks of logits are made as the row with the most labels needs."""
    monkeypatch.setattr(loss, "CHUNK", 8)
    labels = np.full((2, 40), loss.IGNORED)
    labels[0, 3:40:4] = 1  # ten, spread out; four a chunk
    labels[1, :2] = 1
    order, chunks = loss._learned_first(jnp.array(labels), 4)
    assert chunks == 3
    assert (np.asarray(order[0, :10]) == np.arange(3, 40, 4)).all()
    assert loss._learned_first(jnp.full((2, 40), loss.IGNORED), 4)[1] == 0


def packed(batch):
    """The three samples in one row, in the order of their clips."""
    rows = [np.flatnonzero(mask) for mask in batch["attention_mask"]]
    join = lambda x: np.concatenate([x[b][at] for b, at in enumerate(rows)])
    flat = {name: join(batch[name]) for name in ("input_ids", "labels", "attention_mask")}
    flat["segment_ids"] = np.repeat([1, 2, 3], [len(at) for at in rows])
    pad = lambda name, x: np.pad(x, (0, 5), constant_values=-100 * (name == "labels"))
    return batch | {name: pad(name, x)[None] for name, x in flat.items()}


def test_a_packed_row_adds_up_to_its_samples(measure, batch):
    """Samples neither see nor predict each other, positions start anew, clips find their own."""
    (value, metrics), grads = measure(batch)
    (same, counted), others = measure(packed(batch))
    np.testing.assert_allclose(same, value, rtol=1e-6)
    assert counted["tokens"] == metrics["tokens"] and counted["accuracy"] == metrics["accuracy"]
    for a, b in zip(*map(jax.tree.leaves, (grads, others)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_sums_of_parts_are_the_sum_of_the_whole(model, batch):
    """Whatever a batch is parted into; each metric has a weight of its own."""
    words = np.array([[9, 11, -100], [12, -100, -100], [20, 21, -100]])
    whole = batch | {"words": words}
    run = jax.jit(loss.next_token_and_words)
    parts = [{name: x[i : i + 1] for name, x in whole.items()} for i in range(3)]
    total = functools.reduce(operator.add, (run(model, part) for part in parts)).means()
    for name, value in run(model, whole).means().items():
        np.testing.assert_allclose(total[name], value, rtol=1e-5)


def test_audio_states_that_spell_the_words_help(model, batch):
    """CTC is added with its weight: a mean over words, to which ignored words add nothing."""
    words = np.array([[9, 11, -100], [12, -100, -100], [20, 21, -100]])
    spelled = batch | {"words": words}
    plain = jax.jit(loss.next_token)(model, batch).mean()
    helped = jax.jit(functools.partial(loss.next_token_and_words, weight=0.3))
    metrics = helped(model, spelled).means()
    value = metrics["loss"]
    np.testing.assert_allclose(value, plain + 0.3 * metrics["ctc"], rtol=1e-5)
    states, counts = jax.jit(model.listen)(
        jnp.array(batch["input_features"]), jnp.array(batch["feature_attention_mask"])
    )
    chances = np.asarray(jax.nn.log_softmax(model.decoder.logits(states)))
    wanted = sum(
        spelling(chances[i, : counts[i]], [w for w in row if w >= 0]) for i, row in enumerate(words)
    )
    np.testing.assert_allclose(metrics["ctc"], wanted / 5, rtol=1e-4)


def test_a_batch_that_says_no_words_is_learned_as_without_ctc(model, measure, batch):
    """Nobody knows what is spoken in its clips: the same loss and gradients."""
    (plain, _), slopes = measure(batch)
    graph, params = nnx.split(model)
    spelt = lambda params, batch: loss.next_token_and_words(nnx.merge(graph, params), batch).mean()
    unknown = batch | {"words": np.full((3, 4), loss.IGNORED)}
    same, found = jax.jit(jax.value_and_grad(spelt))(params, unknown)
    np.testing.assert_allclose(same, plain, rtol=1e-6)
    for a, b in zip(*map(jax.tree.leaves, (found, slopes)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


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
    run = lambda remat: jax.jit(functools.partial(loss.next_token, remat=remat))(
        model, batch
    ).mean()
    np.testing.assert_allclose(run("full"), run("none"), rtol=1e-6)
    programs = {
        remat: jax.make_jaxpr(functools.partial(loss.next_token, remat=remat))(model, batch)
        for remat in ("full", "none")
    }
    checkpoints = lambda remat: sum(
        equation.primitive.name in ("checkpoint", "remat2")
        for equation in equations(programs[remat].jaxpr)
    )
    assert checkpoints("full") == checkpoints("none") + 2


def test_ctc_over_a_clips_own_words_is_that_over_the_whole_vocabulary():
    """Loss and gradients, with words that recur and clips of unlike lengths; one without words, of
    which nobody knows what is said, costs nothing."""
    graph, state = nnx.split(small.shaken(Qwen2Audio(small.CONFIG, rngs=nnx.Rngs(0))).decoder)
    states = jax.random.normal(jax.random.key(1), (3, 12, small.CONFIG.decoder.width))
    counts = jnp.array([12, 7, 5])
    words = jnp.array([[9, 9, 11, 9], [12, 5, -100, -100], [-100] * 4])

    def whole(state, states):
        logits = nnx.merge(graph, state).logits(states)
        behind = jnp.arange(12) >= counts[:, None]
        spelt = words != -100
        return optax.ctc_loss(
            logits, behind * 1.0, jnp.where(spelt, words, 0), ~spelt * 1.0, blank_id=2
        )[:2].sum()

    def own(state, states):
        return loss.words_loss(nnx.merge(graph, state), states, counts, words, blank=2)

    (wanted, slopes), (got, found) = (
        jax.jit(jax.value_and_grad(each, argnums=(0, 1)))(state, states) for each in (whole, own)
    )
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (found, slopes)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    assert not np.abs(found[1][2]).any()
