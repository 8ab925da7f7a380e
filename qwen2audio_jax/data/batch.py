"""Batches for training, made by other processes while the device computes."""

import collections
import concurrent.futures
import dataclasses
import functools
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from qwen2audio_jax import audio, mel
from qwen2audio_jax.data import augment, lessons, manifest, synth
from qwen2audio_jax.processor import IGNORED, Inputs, Processor, needed_frames


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes that many batches share, so that few programs are compiled."""

    clips: int  # one per row
    frames: tuple[int, int]  # the shortest and the longest clip, in mel frames of 10 ms
    tokens: int  # the longest prompt with its answer
    words: tuple[int, int]  # how many are said, at least and at most
    lesson: lessons.Kind = "recognise"
    weight: float = 1.0  # how often, relative to the others


@dataclasses.dataclass(frozen=True, kw_only=True)
class Course:
    """What is taught, in which order: every batch is a pure function of this and its number."""

    processor: str  # a folder with a tokenizer
    seed: int = 0
    shapes: tuple[Shape, ...] = (
        Shape(clips=32, frames=(0, 70), tokens=36, words=(1, 2), weight=0.15),
        Shape(clips=20, frames=(60, 120), tokens=48, words=(1, 4), weight=0.25),
        Shape(clips=13, frames=(110, 190), tokens=68, words=(2, 5), weight=0.25),
        Shape(clips=8, frames=(180, 300), tokens=94, words=(3, 5), weight=0.2),
        Shape(clips=16, frames=(0, 130), tokens=104, words=(1, 4), lesson="converse", weight=0.15),
    )
    warmup: int = 0  # batches that are all clean; augmentation comes in over as many more
    voices: tuple[str, ...] = synth.TRAIN_VOICES
    recordings: tuple[tuple[str, str], ...] = ()  # (audio, text) beside what is synthesised
    recorded: float = 0.4  # of the clips, where there are recordings
    augmented: float = 0.8  # of the clips: waveform and, independently, mel
    pool: int = 6000  # utterances that recur, each time in another room; espeak-ng is slow
    fresh: int = 2  # utterances that leave and enter the pool with every batch


def make(course: Course, number: int) -> Inputs:
    """The `number`th batch of a course, padded right, with labels and each clip's words."""
    rng = np.random.default_rng((course.seed, number))
    weights = np.array([shape.weight for shape in course.shapes])
    shape = course.shapes[rng.choice(len(weights), p=weights / weights.sum())]
    ramp = (number - course.warmup + 1) / (course.warmup + 1)
    augmented = course.augmented * min(max(ramp, 0.0), 1.0)
    processor = _processor(course.processor)
    chosen = []
    while len(chosen) < shape.clips:
        wave, text = draw(course, number, shape, rng)
        if _frames(wave) < shape.frames[0]:
            continue
        if rng.random() < augmented:
            wave = augment.augment(wave, rng)
        lesson = lessons.make(processor, wave, text, shape.lesson, rng)
        if _fits(lesson, shape):
            chosen.append(lesson)
    inputs = processor.batch(
        [lesson.prompt for lesson in chosen],
        [lesson.wave for lesson in chosen],
        padding_side="right",
        labels=True,
        frames=shape.frames[1],
        length=shape.tokens,
    )
    for picture, valid in zip(
        inputs["input_features"], inputs["feature_attention_mask"].sum(axis=1), strict=True
    ):
        if rng.random() < augmented:
            picture[:, :valid] = augment.spec_augment(picture[:, :valid], rng)
    inputs["words"] = np.full((shape.clips, _most_words(shape)), IGNORED, np.int32)
    for row, lesson in zip(inputs["words"], chosen, strict=True):
        row[: len(lesson.words)] = lesson.words
    return inputs


def _fits(lesson: lessons.Lesson, shape: Shape) -> bool:
    return (
        _frames(lesson.wave) <= shape.frames[1]
        and sum(len(segment.ids) for segment in lesson.prompt) <= shape.tokens
        and len(lesson.words) <= _most_words(shape)
    )


def _frames(wave: Float[np.ndarray, " S"]) -> int:
    return needed_frames(mel.frames(len(wave)))


def _most_words(shape: Shape) -> int:
    return 2 * shape.words[1]  # a word that the vocabulary lacks is several tokens


def draw(
    course: Course, number: int, shape: Shape, rng: np.random.Generator
) -> tuple[Float[np.ndarray, " S"], str]:
    """Something that is said in as many words as the shape has room for."""
    few, many = shape.words
    recordings = _short_enough(course.recordings, shape.words[1])
    if recordings and rng.random() < course.recorded:
        return _phrase_of_recordings(recordings, shape.words, rng)
    while True:
        said = _utterance(
            (course.seed, int(rng.integers(course.pool)) + number * course.fresh), course.voices
        )
        if few <= len(said.text.split()) <= many:
            return said.wave, said.text


def _phrase_of_recordings(
    recordings: tuple[tuple[str, str], ...], words: tuple[int, int], rng: np.random.Generator
) -> tuple[Float[np.ndarray, " S"], str]:
    """Recordings, mostly of single words, one after another, until there are enough words."""
    wanted = rng.integers(words[0], words[1] + 1)
    waves, said = [], []
    for path, text in (recordings[i] for i in rng.integers(len(recordings), size=4 * words[1])):
        if len(said) >= wanted:
            break
        if len(said) + len(text.split()) > words[1]:
            continue
        if waves:
            waves.append(np.zeros(int(rng.uniform(0, 0.15) * audio.SAMPLE_RATE), np.float32))
        waves.append(_recording(path))
        said += text.split()
    return np.concatenate(waves), " ".join(said)


def usable(
    samples: Sequence[manifest.Sample], shapes: Sequence[Shape]
) -> tuple[list[manifest.Sample], dict[str, int]]:
    """Looks through recordings before a training relies on them.

    Returns:
      Those that the largest shape can use, and how many were left out for which reason.
    """
    longest = max(shape.frames[1] for shape in shapes) / 100 - 0.1
    most = max(shape.words[1] for shape in shapes)
    kept, left_out = [], collections.Counter()
    for sample in samples:
        try:
            seconds = len(audio.load(sample.audio)) / audio.SAMPLE_RATE
        except audio.AudioError:
            left_out["unreadable"] += 1
            continue
        if not sample.text.split():
            left_out["without words"] += 1
        elif len(sample.text.split()) > most:
            left_out[f"more than {most} words"] += 1
        elif seconds > longest:
            left_out[f"longer than {longest:.1f} s"] += 1
        else:
            kept.append(sample)
    return kept, dict(left_out)


_processor = functools.lru_cache(maxsize=2)(Processor.from_pretrained)
_utterance = functools.lru_cache(maxsize=8000)(synth.utterance)


_recording = functools.lru_cache(maxsize=5000)(audio.load)


@functools.lru_cache(maxsize=16)
def _short_enough(recordings: tuple[tuple[str, str], ...], words: int) -> tuple:
    return tuple(each for each in recordings if len(each[1].split()) <= words)


def ahead(
    make: Callable[[int], Any], numbers: range, *, workers: int = 1, depth: int = 12
) -> Iterator[Any]:
    """`make(i)` for each number in order, up to `depth` of them ahead of time.

    Args:
      make: a picklable function; runs in `workers` processes of low priority.
    """
    context = multiprocessing.get_context("spawn")  # jax does not survive a fork
    with concurrent.futures.ProcessPoolExecutor(workers, context, _settle) as pool:
        waiting = collections.deque()
        try:
            for number in numbers:
                waiting.append(pool.submit(make, number))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _settle() -> None:
    """What a worker does first: leaves accelerator and priority to the trainer, and ends with it.

    A trainer that is killed cannot stop its workers, and they would wait for work forever.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.nice(5)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
