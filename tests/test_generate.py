"""Answers equal transformers', whatever they are batched and padded with."""

import jax
import numpy as np
import pytest
import reference
import torch
from flax import nnx

from qwen2audio_jax import Qwen2Audio, Sampling, encoder, generate, programs, weights
from qwen2audio_jax.generate import GREEDY, bucket

NEW = 64
PENALISED = Sampling(temperature=0.0, repetition_penalty=1.1)
# seconds of each prompt's clips: 1, 3 and 8 rows; several clips, none, the shortest and 30 s
BATCHES = (
    [(1.7,)],
    [(0.3,), (4.0, 2.2), ()],
    [(0.5,), (), (30.0,), (1, 2, 3), (9,), (6,), (), (2,)],
)


class Pair:
    """transformers' model and ours, with the same weights."""

    def __init__(self, shape, folder, *, dtype="float32", scan_layers=False):
        self.config = reference.SHAPES[shape]
        self.theirs = reference.build(self.config)
        reference.save(self.theirs, folder)
        self.ours = weights.load(folder, dtype=dtype, scan_layers=scan_layers)

    def answers(self, inputs, **options):
        """What transformers answers."""
        if "input_features" in inputs:  # it always wants 30 s
            inputs = {**inputs, **lengthen(inputs)}
        torch_inputs = {k: torch.from_numpy(v) for k, v in inputs.items()}
        with torch.no_grad():
            out = self.theirs.generate(**torch_inputs, do_sample=False, **options)
        return out[:, inputs["input_ids"].shape[1] :].numpy()


def make_inputs(config, clips, *, seed=0, pad=3):
    """Prompts with made clips of so many seconds each, left-padded, as short as they may be."""
    rng = np.random.default_rng(seed)
    special = {config.audio_token, config.pad_token, *config.end_tokens}
    words = [t for t in range(config.decoder.vocabulary) if t not in special]
    frames = np.array([round(100 * s) for row in clips for s in row], np.int32)
    counts = iter(encoder.states_of(frames))
    rows = []
    for row in clips:
        ids = list(rng.choice(words, rng.integers(2, 9)))
        for _ in row:
            ids += [config.audio_token] * int(next(counts))
            ids += list(rng.choice(words, rng.integers(2, 9)))
        rows.append(ids)
    length = max(map(len, rows)) + pad
    inputs = {
        "input_ids": np.full((len(rows), length), config.pad_token, np.int64),
        "attention_mask": np.zeros((len(rows), length), np.int64),
    }
    for b, ids in enumerate(rows):
        inputs["input_ids"][b, length - len(ids) :] = ids
        inputs["attention_mask"][b, length - len(ids) :] = 1
    if len(frames):
        inputs |= features(config, frames, rng)
    return inputs


def features(config, frames, rng):
    """Made mel pictures; -1.5 is what silence looks like."""
    T = min(2 * int(encoder.positions_of(frames).max()) + 2, 3000)
    mask = (np.arange(T) < frames[:, None]).astype(np.int64)
    mel = rng.normal(size=(len(frames), config.encoder.mels, T)).astype(np.float32)
    return {
        "input_features": np.where(mask[:, None], mel, np.float32(-1.5)),
        "feature_attention_mask": mask,
    }


def lengthen(inputs):
    """The same clips padded to 30 s."""
    mel, mask = inputs["input_features"], inputs["feature_attention_mask"]
    more = 3000 - mel.shape[2]
    return {
        "input_features": np.pad(mel, ((0, 0), (0, 0), (0, more)), constant_values=-1.5),
        "feature_attention_mask": np.pad(mask, ((0, 0), (0, more))),
    }


def row_of(inputs, clips, b):
    """One prompt of a batch, alone and without padding."""
    first = sum(map(len, clips[:b]))
    kept = inputs["attention_mask"][b].astype(bool)
    row = {k: inputs[k][b : b + 1, kept] for k in ("input_ids", "attention_mask")}
    if clips[b]:
        for key in ("input_features", "feature_attention_mask"):
            row[key] = inputs[key][first : first + len(clips[b])]
    return row


def padded(tokens, length, config):
    return np.pad(tokens, ((0, 0), (0, length - tokens.shape[1])), constant_values=config.pad_token)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    made = {}

    def get(shape):
        if shape not in made:
            made[shape] = Pair(shape, tmp_path_factory.mktemp(shape))
        return made[shape]

    return get


@pytest.fixture(scope="module")
def tiny():
    return Qwen2Audio(reference.SHAPES["tied"], scan_layers=False, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("clips", BATCHES, ids=len)
@pytest.mark.parametrize("shape", [pytest.param("two_kv_heads", marks=pytest.mark.slow), "tied"])
def test_greedy_tokens_equal_the_references(pairs, shape, clips):
    """64 greedy tokens are transformers', with and without a repetition penalty."""
    pair = pairs(shape)
    inputs = make_inputs(pair.config, clips)
    for sampling in (GREEDY, PENALISED):
        ours = generate(pair.ours, inputs, max_new_tokens=NEW, sampling=sampling)
        theirs = pair.answers(
            inputs, max_new_tokens=NEW, repetition_penalty=sampling.repetition_penalty
        )
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("sampling", [GREEDY, PENALISED], ids=["plain", "penalised"])
def test_a_row_is_answered_the_same_alone_in_a_batch_and_at_30_s(pairs, sampling):
    """Neither other rows nor padding of any kind change an answer."""
    pair, clips = pairs("one_kv_head"), BATCHES[1]
    inputs = make_inputs(pair.config, clips)
    options = {"max_new_tokens": 32, "sampling": sampling}
    together = generate(pair.ours, inputs, **options)
    np.testing.assert_array_equal(
        generate(pair.ours, inputs | lengthen(inputs), **options), together
    )
    for b in range(len(clips)):
        alone = generate(pair.ours, row_of(inputs, clips, b), **options)
        np.testing.assert_array_equal(padded(alone, together.shape[1], pair.config)[0], together[b])


def test_padding_on_the_right_is_as_good(tiny):
    """Prompts are what the mask says, wherever they stand."""
    left = make_inputs(tiny.config, [(0.3,), ()])
    right = dict(left)
    for key, fill in (("input_ids", tiny.config.pad_token), ("attention_mask", 0)):
        right[key] = np.full_like(left[key], fill)
        for b, kept in enumerate(left["attention_mask"].astype(bool)):
            right[key][b, : kept.sum()] = left[key][b, kept]
    np.testing.assert_array_equal(generate(tiny, left), generate(tiny, right))


def test_min_new_tokens_and_several_end_tokens_equal_the_references(pairs):
    """End tokens are forbidden at first and obeyed afterwards."""
    pair = pairs("two_kv_heads")
    inputs = make_inputs(pair.config, BATCHES[1])
    plain = generate(pair.ours, inputs, max_new_tokens=NEW, end_tokens=())
    ends = [int(plain[0, 2]), int(plain[1, 20]), int(plain[2, 30])]
    for at_least in (0, 10):
        ours = generate(
            pair.ours, inputs, max_new_tokens=NEW, min_new_tokens=at_least, end_tokens=ends
        )
        theirs = pair.answers(
            inputs, max_new_tokens=NEW, min_new_tokens=at_least, eos_token_id=ends
        )
        np.testing.assert_array_equal(ours, theirs)


def test_answers_end_early(tiny):
    """Once every row has ended there are no more steps; what follows an end is padding."""
    inputs = make_inputs(tiny.config, [(), ()])
    plain = generate(tiny, inputs, max_new_tokens=40, end_tokens=())
    ends = {int(plain[0, 3]), int(plain[1, 6])}
    lengths = [next(i for i, t in enumerate(row, 1) if int(t) in ends) for row in plain]
    short = generate(tiny, inputs, max_new_tokens=40, end_tokens=tuple(ends))
    assert short.shape == (2, max(lengths))
    for row, whole, length in zip(short, plain, lengths, strict=True):
        np.testing.assert_array_equal(row[:length], whole[:length])
        assert (row[length:] == tiny.config.pad_token).all()


@pytest.mark.parametrize("scan_layers", [False, True])
def test_logprobs_are_the_models_own(scan_layers):
    """A token's log-probability is what the uncached model gives it, whatever the sampling."""
    model = Qwen2Audio(reference.SHAPES["tied"], scan_layers=scan_layers, rngs=nnx.Rngs(1))
    inputs = make_inputs(model.config, [(0.5,), ()], pad=0)
    sampling = Sampling(temperature=3.0, top_k=100, repetition_penalty=1.3)
    tokens, scores = generate(
        model, inputs, max_new_tokens=12, sampling=sampling, end_tokens=(), logprobs=True
    )
    whole = dict(inputs)
    whole["input_ids"] = np.concatenate([inputs["input_ids"], tokens], axis=1)
    whole["attention_mask"] = np.pad(inputs["attention_mask"], ((0, 0), (0, 12)), constant_values=1)
    expected = jax.nn.log_softmax(model(**whole)[:, -13:-1])
    expected = np.take_along_axis(np.asarray(expected), tokens[..., None], axis=2)[..., 0]
    np.testing.assert_allclose(scores, expected, atol=1e-4)


def test_a_new_length_rarely_compiles(tiny):
    """Nearby prompt lengths, answer lengths, temperatures and seeds share their programs."""
    answer = lambda length, **options: generate(
        tiny, {"input_ids": np.full((1, length), 9)}, end_tokens=(), **options
    )
    sampled = lambda t, seed: Sampling(temperature=t, top_p=0.9, seed=seed)
    answer(20, max_new_tokens=100)
    answer(20, max_new_tokens=9, sampling=sampled(0.5, 1))
    known = programs.prefill._cache_size(), programs.decode._cache_size()
    for length in (5, 21, 32):
        answer(length, max_new_tokens=10 * length // 3)
        answer(length, max_new_tokens=7, sampling=sampled(0.1 * length, length))
    assert (programs.prefill._cache_size(), programs.decode._cache_size()) == known
    answer(33, max_new_tokens=100)  # the next bucket of prompts in the same cache
    assert (programs.prefill._cache_size(), programs.decode._cache_size()) == (
        known[0] + 1,
        known[1],
    )


def test_buckets_are_few_and_close():
    """At most an eighth or a quarter of a bucket's octave is wasted; nothing shrinks."""
    sizes = {bucket(n, 32, per_octave=4) for n in range(1, 1025)}
    assert sorted(sizes) == [32, 40, 48, 56, 64, *range(80, 129, 16), *range(160, 257, 32),
                             *range(320, 513, 64), *range(640, 1025, 128)]  # fmt: skip
    assert all(n <= bucket(n, 32, per_octave=4) <= max(32, 1.25 * n + 1) for n in range(1, 1025))


def test_answers_in_bfloat16(tiny):
    """The towers may be bfloat16; scores are float32 all the same."""
    model = Qwen2Audio(
        reference.SHAPES["tied"], scan_layers=False, dtype="bfloat16", rngs=nnx.Rngs(0)
    )
    tokens, scores = generate(
        model, make_inputs(model.config, [(0.3,)]), max_new_tokens=5, end_tokens=(), logprobs=True
    )
    assert tokens.shape == (1, 5)
    assert tokens.dtype == np.int32
    assert scores.dtype == np.float32


def test_what_does_not_fit_is_refused(tiny):
    """A prompt over the context is refused with both numbers; so are options at odds."""
    prompt = lambda n: {"input_ids": np.full((1, n), 9, np.int32)}
    with pytest.raises(ValueError, match=r"2040 tokens and 9 new ones.* context of 2048"):
        generate(tiny, prompt(2040), max_new_tokens=9)
    with pytest.raises(ValueError, match=r"2048 tokens and 1 new.* context of 2048"):
        generate(tiny, prompt(2048))
    assert generate(tiny, prompt(2040), end_tokens=()).shape == (1, 8)
    with pytest.raises(ValueError, match="max_new_tokens must be 1 or more, got 0"):
        generate(tiny, prompt(4), max_new_tokens=0)
    with pytest.raises(ValueError, match=r"at least one token.* rows \[1\]"):
        generate(tiny, {"input_ids": np.ones((2, 3), np.int32),
                        "attention_mask": np.array([[0, 1, 1], [0, 0, 0]])})  # fmt: skip
    for options in ({"n": 0}, {"num_beams": 0}, {"min_new_tokens": 9, "max_new_tokens": 3}):
        with pytest.raises(ValueError, match="wanted answers and beams from 1 and min_new_tokens"):
            generate(tiny, prompt(4), **options)
    with pytest.raises(ValueError, match=r"wanted tokens of a vocabulary of \d+, got 9 to 100000"):
        generate(tiny, {"input_ids": np.array([[9, 100_000]])})
    with pytest.raises(ValueError, match=r"wanted input_ids \[B, L\], got the shape \(4,\)"):
        generate(tiny, {"input_ids": np.full(4, 9)})
    with pytest.raises(ValueError, match="3 answers at temperature 0"):
        generate(tiny, prompt(4), n=3)
    with pytest.raises(ValueError, match="want processor="):
        generate(tiny, prompt(4), stop=["."])
    ids = np.full((1, 4), tiny.config.audio_token, np.int32)
    with pytest.raises(ValueError, match="4 audio tokens, its 0 clips"):
        generate(tiny, {"input_ids": ids})


def test_clips_compile_apart_from_prompts(tiny):
    """The encoder's program depends on the clips' shape alone."""
    generate(tiny, make_inputs(tiny.config, [(0.5,)]), max_new_tokens=2)
    known = programs.listen._cache_size()
    generate(tiny, make_inputs(tiny.config, [(0.5,)], pad=60, seed=5), max_new_tokens=2)
    assert programs.listen._cache_size() == known
