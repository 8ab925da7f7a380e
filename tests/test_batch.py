"""Batches are pure functions of course and number, whoever makes them."""

import functools

import numpy as np
import pytest
import soundfile

from qwen2audio_jax.data import batch, lessons

pytest.importorskip("espeakng_loader")

SHAPES = (
    batch.Shape(clips=3, frames=(0, 130), tokens=90, words=(1, 1)),
    batch.Shape(clips=2, frames=(0, 320), tokens=140, words=(2, 3), lesson="converse"),
)


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    lessons.write_tokenizer(folder, [], vocabulary=512)
    return batch.Course(processor=str(folder), shapes=SHAPES, pool=40, fresh=4)


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_a_batch_has_its_shape(course):
    """Clips, frames and tokens as declared, padded right; every row has something to learn."""
    sizes = set()
    for number in range(6):
        made = batch.make(course, number)
        clips, _, frames = made["input_features"].shape
        sizes.add((clips, frames, made["input_ids"].shape[1]))
        assert (np.diff(made["attention_mask"], axis=1) <= 0).all()
        assert ((made["labels"] != -100).sum(axis=1) > 1).all()
        learned = made["labels"] != -100
        np.testing.assert_array_equal(made["labels"][learned], made["input_ids"][learned])
        assert (made["feature_attention_mask"].sum(axis=1) <= frames - 2).all()
        assert made["words"].shape == (clips, 2 if clips == 3 else 6)
        assert (made["words"][:, 0] >= 0).all()  # then nothing, as padding: -100
    assert sizes == {(3, 130, 90), (2, 320, 140)}


def test_warm_up_is_clean_and_what_follows_is_not(course, monkeypatch):
    """Augmentation changes waves and pictures, of no clip at first and of nearly all in the end."""
    seen = []
    for name in ("augment", "spec_augment"):
        change = getattr(batch.augment, name)
        count = lambda x, rng, name=name, change=change: seen.append(name) or change(x, rng)
        monkeypatch.setattr(batch.augment, name, count)
    warm = batch.Course(**{**vars(course), "warmup": 4})
    for number in range(4):
        batch.make(warm, number)
    assert not seen
    for number in range(8, 12):
        batch.make(warm, number)
    assert set(seen) == {"augment", "spec_augment"}


def test_course_seed_and_number_decide_a_batch(course):
    """Equal ones give equal bits; another number or seed another batch."""
    fifth = batch.make(course, 5)
    assert same(fifth, batch.make(course, 5))
    assert not same(fifth, batch.make(course, 7))
    assert not same(fifth, batch.make(batch.Course(**{**vars(course), "seed": 1}), 5))


def test_other_processes_make_the_same_in_order(course):
    """Ahead of time, with two workers: the bits that this process makes, in order."""
    made = batch.ahead(functools.partial(batch.make, course), range(3, 8), workers=2, depth=2)
    for number, each in zip(range(3, 8), made, strict=True):
        assert same(each, batch.make(course, number)), number


def fail_at_two(number):
    if number == 2:
        raise ValueError(f"no batch {number}")
    return number


def test_a_worker_s_error_reaches_the_trainer():
    """After the batches before it, with its own message."""
    made = batch.ahead(fail_at_two, range(4))
    assert [next(made), next(made)] == [0, 1]
    with pytest.raises(ValueError, match="no batch 2"):
        next(made)


def test_recordings_are_joined_to_phrases(course, tmp_path):
    """Two recordings are one clip with their words in order, at most a short gap between them."""
    recordings = []
    for i, word in enumerate(("one", "two")):
        path = tmp_path / f"{word}.wav"
        soundfile.write(path, np.full(4000, 0.25 * (i + 1), np.float32), 16_000, "FLOAT")
        recordings.append((str(path), word))
    mixed = batch.Course(**{**vars(course), "recordings": tuple(recordings), "recorded": 1.0})
    level = {"one": 0.25, "two": 0.5}
    texts = set()
    for seed in range(12):
        rng = np.random.default_rng(seed)
        wave, text = batch.draw(mixed, 0, SHAPES[1], rng)
        words = text.split()
        assert 2 <= len(words) <= 3
        assert 4000 * len(words) <= len(wave) <= 4000 * len(words) + 2400 * (len(words) - 1)
        loud = wave[wave != 0].reshape(len(words), 4000)
        np.testing.assert_array_equal(loud[:, 0], [level[word] for word in words])
        texts.add(text)
    assert len(texts) > 3
