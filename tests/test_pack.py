"""Packing moves samples into rows and changes nothing about them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from flax import nnx

from qwen2audio_jax import Qwen2Audio, mel
from qwen2audio_jax.audio import SAMPLE_RATE
from qwen2audio_jax.data import augment
from qwen2audio_jax.data.example import BadSample, Example
from qwen2audio_jax.data.pack import Bucket, Group, Sample, Text, draw
from qwen2audio_jax.processor import IGNORED, needed_frames
from qwen2audio_jax.prompt import Segment

MELS = small.ENCODER.mels


def sample(seed: int, words: int, *frames: int, texts: int = 1, **more) -> Sample:
    """Random words around clips of so many mel frames; the last two words are learned."""
    rng = np.random.default_rng(seed)
    slots = [small.CONFIG.audio_token] * sum(mel.audio_tokens(n) for n in frames)
    made = []
    for _ in range(texts):
        ids = np.array([5, *slots, *rng.integers(6, 64, words)], np.int32)
        made.append(Text(ids=ids, learned=np.arange(len(ids)) >= len(ids) - 2))
    pictures = tuple(rng.normal(size=(MELS, needed_frames(n))).astype(np.float32) for n in frames)
    return Sample(texts=tuple(made), pictures=pictures, valid=frames, **more)


def packed(samples, bucket):
    group = Group(bucket, packed=True)
    assert all(group.take(each, i) for i, each in enumerate(samples))
    return group, group.arrays(samples[0].kind, mels=MELS, pad=0)


@pytest.fixture(scope="module")
def model() -> Qwen2Audio:
    return small.shaken(Qwen2Audio(small.CONFIG, rngs=nnx.Rngs(0)))


@jax.jit
def read(model, batch):
    return model.hidden(**{name: x for name, x in batch.items() if name != "labels"})[0]


def test_every_sample_is_read_as_if_it_stood_alone(model):
    """States of packed samples equal those of each by itself: its own clips, positions, words."""
    samples = [sample(0, 4, 20), sample(1, 3), sample(2, 5, 9, 30), sample(3, 2, 14)]
    bucket = Bucket(rows=3, tokens=32, clips=6, frames=40)
    group, batch = packed(samples, bucket)
    assert max(len(row) for row in group.batches[0]) > 1
    together = read(model, batch)
    for b, row in enumerate(group.batches[0]):
        for number, each in enumerate(row, 1):
            place = batch["segment_ids"][b] == number
            np.testing.assert_array_equal(batch["input_ids"][b, place], each.texts[0].ids)
            alone = read(model, packed([each], bucket)[1])[0, : each.tokens]
            np.testing.assert_allclose(together[b, place], alone, rtol=1e-4, atol=1e-5)


def test_what_is_left_over_hears_nothing_and_hurts_nothing(model):
    """Clip rows without a clip have empty masks; gradients beside them are finite."""
    _, batch = packed([sample(0, 4, 20)], Bucket(rows=2, tokens=16, clips=3, frames=40))
    assert batch["feature_attention_mask"].sum(axis=1).tolist() == [20, 0, 0]
    assert not batch["segment_ids"][1].any() and not batch["attention_mask"][1].any()
    graph, params = nnx.split(model)

    @jax.jit
    def loss(params, batch):
        x = read(nnx.merge(graph, params), batch)
        return jnp.where(batch["labels"][..., None] != IGNORED, x, 0).sum()

    grads = jax.tree.leaves(jax.grad(loss)(params, batch))
    assert all(np.isfinite(g).all() for g in grads) and any(np.abs(g).max() > 0 for g in grads)


def test_labels_stay_within_their_sample():
    """Learned tokens are labelled, and no sample's first token is: nothing foretells it."""
    first = sample(0, 4)
    whole = Sample(
        texts=(Text(ids=first.texts[0].ids, learned=np.ones(5, bool)),), pictures=(), valid=()
    )
    _, batch = packed([whole, whole], Bucket(rows=1, tokens=12, clips=0, frames=0))
    ids = first.texts[0].ids
    expected = [IGNORED, *ids[1:], IGNORED, *ids[1:], IGNORED, IGNORED]
    assert batch["labels"][0].tolist() == expected and "input_features" not in batch


def test_places_follow_from_the_order_alone():
    """What was taken, taken again in that order, gives the same arrays; the least room is used."""
    rng = np.random.default_rng(0)
    bucket = Bucket(rows=4, tokens=40, clips=12, frames=40)
    samples = {
        i: sample(i, int(rng.integers(2, 20)), *[12] * int(rng.integers(3))) for i in range(40)
    }
    group = Group(bucket, packed=True, batches=2)
    for key, each in samples.items():
        group.take(each, key)
    again = Group(bucket, packed=True, batches=2)
    assert all(again.take(samples[key], key) for key in group.keys)
    one, two = (g.arrays([1, 0], mels=MELS, pad=0) for g in (group, again))
    assert one["input_ids"].shape == (2, 4, 40) and one["input_features"].shape[:2] == (2, 12)
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert one["attention_mask"].mean() > 0.9
    counts = (one["feature_attention_mask"].sum(axis=2) + 1) // 4
    slots = (one["input_ids"] == small.CONFIG.audio_token).sum(axis=(1, 2))
    assert counts.sum(axis=1).tolist() == slots.tolist()


def test_pairs_share_their_clips():
    """A row each, both answers behind the same slots, one set of clips, known log-probabilities."""
    pairs = [sample(i, 3 + i, 20, texts=2, row=7 - i, reference=(-1.0 - i, -2.0)) for i in range(2)]
    bucket = Bucket(rows=3, tokens=32, clips=3, frames=40)
    group, batch = packed(pairs, bucket)
    assert [len(row) for row in group.batches[0]] == [1, 1]
    assert batch["rows"].tolist() == [7, 6, -1]
    assert batch["ref_chosen_logps"].tolist() == [-1, -2, 0]
    for i, answer in enumerate(("chosen", "rejected")):
        for b, pair in enumerate(pairs):
            kept = batch[f"{answer}_attention_mask"][b] == 1
            np.testing.assert_array_equal(batch[f"{answer}_input_ids"][b, kept], pair.texts[i].ids)
    assert batch["input_features"].shape == (3, MELS, 40)


def test_words_stand_with_their_clips():
    """In the clips' order; those that could not be spelt in the clip's time are all left out."""
    bucket = Bucket(rows=2, tokens=40, clips=4, frames=48)
    group = Group(bucket, packed=True, words=True)
    said = lambda each, *words: dataclasses.replace(each, words=words)
    samples = [said(sample(0, 3, 20, 9), [7, 8], []), sample(1, 3), said(sample(2, 3, 40), [9] * 6)]
    assert all(group.take(each, key) for key, each in enumerate(samples))
    words = group.arrays([1, 0], mels=MELS, pad=0)["words"]
    assert words.shape == (4, 12)
    none = [IGNORED] * 12
    assert words.tolist() == [[7, 8, *none[2:]], none, none, none]
    assert [each.unspelt for each in samples] == [0, 0, 1]
    assert "words" not in packed([sample(0, 3, 20)], bucket)[1]


def test_whatever_states_can_spell_is_spelt():
    """Of a clip that fills its bucket one token a state, which is faster than anybody speaks."""
    states = mel.audio_tokens(46)
    for ids, spelt in (([*range(states)], True), ([5, 5, *range(6, states + 4)], False)):
        each = dataclasses.replace(sample(0, 3, 46), words=(ids,))
        group = Group(Bucket(rows=1, tokens=40, clips=1, frames=48), packed=True, words=True)
        assert group.take(each, 0)
        words = group.arrays([1, 0], mels=MELS, pad=0)["words"][0]
        assert words[words != IGNORED].tolist() == (ids if spelt else [])
        assert each.unspelt == (not spelt)


def test_a_bucket_says_what_fits():
    """Tokens, clips, and the frames that the longest clip needs."""
    bucket = Bucket(rows=1, tokens=10, clips=1, frames=40)
    assert bucket.fits(10, [38]) and not bucket.fits(11, [38])
    assert not bucket.fits(10, [39, 1]) and not bucket.fits(10, [40])
    with pytest.raises(ValueError, match="even number of 4 to 3000 frames, got 41"):
        Bucket(rows=1, tokens=10, clips=1, frames=41)


def test_a_bucket_is_a_word_of_the_command_line():
    for text in ("8x4096,40x3000", "4x100,0x4", "2x10,1x40@2.5"):
        assert str(Bucket.parse(text)) == text
    parsed = Bucket.parse("2x10,1x40@2.5")
    assert parsed == Bucket(rows=2, tokens=10, clips=1, frames=40, weight=2.5)
    for text in ("8x4096", "8x4096,40", "8x4096,40x3000@", "x,x"):
        with pytest.raises(ValueError, match=f"wanted a bucket as 8x4096,40x3000, got '{text}'"):
            Bucket.parse(text)


def test_a_clip_that_augmentation_draws_out_of_its_bucket_stays_as_it_was(monkeypatch):
    """It fitted, so it is learned; where its longer form fits too, that is."""
    longer = lambda wave, rng, how, timed: np.pad(wave, (0, SAMPLE_RATE // 2))
    monkeypatch.setattr(augment, "augment", longer)
    prompt = (
        Segment(ids=(small.CONFIG.audio_token,), clip=0),
        Segment(ids=(7, 8), learned=True),
    )
    example = Example(prompt=prompt, waves=(np.zeros(SAMPLE_RATE, np.float32),))
    tight = Bucket(rows=1, tokens=60, clips=1, frames=needed_frames(100))
    roomy = Bucket(rows=1, tokens=60, clips=1, frames=needed_frames(150))
    drawn = lambda *buckets: draw(
        example, buckets, np.random.default_rng(0), mels=MELS, augmented=1.0
    )
    assert drawn(tight).valid == (100,)
    assert drawn(roomy).valid == drawn(tight, roomy).valid == (150,)
    with pytest.raises(BadSample, match="fits no bucket: 27 tokens and 1 clips of up to"):
        drawn(Bucket(rows=1, tokens=60, clips=1, frames=40))
