"""Samples -> batches of few static shapes, several samples in a row where they fit.

Audio tokens are filled in the batch's order, so clips stand in the order of rows, and within a row
of its samples; clip rows that are left over hear nothing: their masks are zero throughout.
"""

import dataclasses
import itertools
import operator
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int32

from qwen2audio_jax import audio, mel
from qwen2audio_jax.data import augment
from qwen2audio_jax.data.example import BadSample, Example, Pair
from qwen2audio_jax.processor import IGNORED, Inputs, Wave, count_tokens, needed_frames
from qwen2audio_jax.prompt import Prompt

OPEN = 2  # groups of a bucket that are filled at the same time: the next may fill the first's gaps
ANSWERS = ("chosen", "rejected")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bucket:
    """Sizes that many batches share, so that few programs are compiled."""

    rows: int  # B
    tokens: int  # L, of a row
    clips: int  # C, of a batch; 0 for text alone
    frames: int  # T, room for each clip's own mel frames and what the convolutions see behind them
    # How often, relative to the others, where several hosts keep step; None: as the first samples
    # of the mixture need it.
    weight: float | None = None

    def __post_init__(self):
        weight = 1.0 if self.weight is None else self.weight
        if min(self.rows, self.tokens) < 1 or self.clips < 0 or weight <= 0:
            raise ValueError(f"wanted positive sizes and a positive weight, got {self}")
        if self.clips and (self.frames % 2 or not 4 <= self.frames <= 3000):
            raise ValueError(f"wanted an even number of 4 to 3000 frames, got {self.frames}")

    @classmethod
    def parse(cls, text: str) -> "Bucket":
        """Sizes as the command line has them: rows x tokens, clips x frames, "8x4096,40x3000".

        Raises:
          ValueError: it is not written so, or a size cannot be.
        """
        found = re.fullmatch(r"(\d+)x(\d+),(\d+)x(\d+)(?:@([\d.]+))?", text)
        if not found:
            raise ValueError(f"wanted a bucket as 8x4096,40x3000, got {text!r}")
        rows, tokens, clips, frames = map(int, found.groups()[:4])
        weight = float(found[5]) if found[5] else None
        return cls(rows=rows, tokens=tokens, clips=clips, frames=frames, weight=weight)

    def __str__(self) -> str:
        weight = "" if self.weight is None else f"@{self.weight:g}"
        return f"{self.rows}x{self.tokens},{self.clips}x{self.frames}{weight}"

    def fits(self, tokens: int, clips: Sequence[int]) -> bool:
        """Whether a sample fits, of so many tokens and of clips of so many valid mel frames."""
        return (
            tokens <= self.tokens
            and len(clips) <= self.clips
            and all(needed_frames(valid) <= self.frames for valid in clips)
        )

    def share(self, sample: "Sample", *, packed: bool) -> float:
        """The part of a batch that a sample takes."""
        of_row = sample.tokens / self.tokens if packed and len(sample.texts) == 1 else 1.0
        return max(of_row / self.rows, len(sample.pictures) / max(self.clips, 1))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Text:
    """Tokens, and which of them are learned."""

    ids: Int32[np.ndarray, " L"]
    learned: Bool[np.ndarray, " L"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """What takes part of a row, ready to be copied there."""

    texts: tuple[Text, ...]  # one; two of a preference pair, chosen and rejected
    pictures: tuple[Float[np.ndarray, "M _"], ...]  # log-mel, as many frames as are needed
    valid: tuple[int, ...]  # the clips' own mel frames
    words: tuple[list[int], ...] = ()  # what is said in each clip, none where that is not known
    bucket: int = 0
    part: str = ""  # of the mixture
    row: int = 0  # of the part's source
    seconds: float = 0.0  # of sound
    reference: tuple[float, ...] = ()  # log-probabilities of a pair's answers, if precomputed

    @property
    def tokens(self) -> int:
        return max(len(text.ids) for text in self.texts)

    @property
    def longest(self) -> float:
        """Seconds of its longest clip."""
        return max(self.valid, default=0) / 100

    @property
    def unspelt(self) -> int:
        """Clips that CTC has to leave out, as more is said than their states can spell."""
        told = zip(self.words, self.valid, strict=False)
        return sum(not _can_spell(ids, valid) for ids, valid in told)

    @property
    def kind(self) -> list[int]:
        """What decides which arrays there are: answers, and log-probabilities known of them."""
        return [len(self.texts), len(self.reference)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bad:
    """What is left of a sample that cannot be used: for the main process to count."""

    part: str
    reason: str
    message: str
    row: int = -1  # of the part's source
    trace: str = ""  # where in the code, of what nobody foresaw


def draw(
    example: Example | Pair,
    buckets: Sequence[Bucket],
    rng: np.random.Generator,
    *,
    mels: int,
    augmented: float = 0.0,
    masked: float = 0.0,
    how: augment.Augmentation = augment.USUAL,
    timed: bool = False,
) -> Sample:
    """Makes of an example what takes part of a row.

    Args:
      buckets: the first that it fits is its own.
      rng: of augmentation.
      augmented: the chance of each clip to come from another room, microphone and speaker.
      masked: the chance of each clip to lose bands and spans (SpecAugment).
      how: both are done.
      timed: whether clips keep their own time, because texts tell of it.

    Raises:
      BadSample: "too long": it fits none of the buckets.
    """
    waves = [
        _augmented(wave, rng, how, timed) if rng.random() < augmented else wave
        for wave in example.waves
    ]
    try:
        texts, bucket = _laid_out(example, waves, buckets)
    except BadSample:
        if all(map(operator.is_, waves, example.waves)):
            raise
        waves = example.waves  # drawn out, they outgrew the buckets; as they were, they may fit
        texts, bucket = _laid_out(example, waves, buckets)
    valid = tuple(mel.frames(len(wave)) for wave in waves)
    return Sample(
        texts=texts,
        pictures=tuple(_picture(wave, rng, mels, masked, how) for wave in waves),
        valid=valid,
        words=(getattr(example, "words", ()) or ([],) * len(waves)),
        bucket=bucket,
        seconds=sum(map(len, waves)) / audio.SAMPLE_RATE,
    )


def _laid_out(
    example: Example | Pair, waves: Sequence[Wave], buckets: Sequence[Bucket]
) -> tuple[tuple[Text, ...], int]:
    """An example's texts with such clips, and its bucket."""
    prompts = [example.prompt]
    if isinstance(example, Pair):
        prompts = [example.prompt + example.chosen, example.prompt + example.rejected]
    texts = tuple(_text(prompt, waves) for prompt in prompts)
    tokens, valid = max(len(text.ids) for text in texts), [mel.frames(len(w)) for w in waves]
    return texts, _bucket(tokens, valid, buckets)


def _augmented(
    wave: Wave, rng: np.random.Generator, how: augment.Augmentation, timed: bool
) -> Wave:
    changed = augment.augment(wave, rng, how, timed=timed)
    return changed if len(changed) <= mel.LONGEST else wave


def _text(prompt: Prompt, waves: Sequence[Wave]) -> Text:
    """The prompt's tokens, with as many for each clip as it is long now."""
    ids, learned = [], []
    for segment in prompt:
        run = segment.ids
        if segment.clip is not None:
            run = run[:1] * count_tokens(waves[segment.clip])
        ids += run
        learned += [segment.learned] * len(run)
    return Text(ids=np.array(ids, np.int32), learned=np.array(learned, bool))


def _bucket(tokens: int, valid: Sequence[int], buckets: Sequence[Bucket]) -> int:
    for number, bucket in enumerate(buckets):
        if bucket.fits(tokens, valid):
            return number
    got = f"{tokens} tokens"
    if valid:
        got += f" and {len(valid)} clips of up to {needed_frames(max(valid))} frames"
    largest = ", ".join(map(str, buckets[-2:]))
    raise BadSample("too long", f"fits no bucket: {got}; the last of data.buckets: {largest}")


def _picture(
    wave: Wave, rng: np.random.Generator, mels: int, masked: float, how: augment.Augmentation
) -> Float[np.ndarray, "M _"]:
    valid = mel.frames(len(wave))
    picture = mel.log_mel(wave, mels=mels, frames=needed_frames(valid))
    if rng.random() < masked:
        picture[:, :valid] = augment.spec_augment(picture[:, :valid], rng, how)
    return picture


class Group:
    """One batch being filled, or several to accumulate gradients over.

    Args:
      bucket: the sizes of each batch.
      packed: whether rows hold several samples; pairs have a row each.
      batches: how many.
      words: whether batches have what is said in each clip, too.
    """

    def __init__(self, bucket: Bucket, *, packed: bool, batches: int = 1, words: bool = False):
        self.bucket, self.packed, self.words = bucket, packed, words
        self.batches: list[list[list[Sample]]] = [[] for _ in range(batches)]
        self.keys: list[int] = []  # of what was taken, in that order, which decides its places

    def take(self, sample: Sample, key: int) -> bool:
        """Finds a place where the least is left over; whether there was one."""
        places = []
        for b, rows in enumerate(self.batches):
            clips = sum(len(each.pictures) for row in rows for each in row)
            if clips + len(sample.pictures) > self.bucket.clips:
                continue
            if self.packed and len(sample.texts) == 1:
                for r, row in enumerate(rows):
                    left = self.bucket.tokens - sum(each.tokens for each in row) - sample.tokens
                    if left >= 0:
                        places.append((left, b, r))
            if len(rows) < self.bucket.rows:
                places.append((self.bucket.tokens, b, len(rows)))
        if not places:
            return False
        _, b, r = min(places)
        if r == len(self.batches[b]):
            self.batches[b].append([])
        self.batches[b][r].append(sample)
        self.keys.append(key)
        return True

    @property
    def full(self) -> bool:
        """Whether no sample can find a place, however small it is."""
        return not self.packed and all(len(rows) == self.bucket.rows for rows in self.batches)

    def samples(self) -> list[Sample]:
        return [sample for rows in self.batches for row in rows for sample in row]

    def arrays(self, kind: list[int], *, mels: int, pad: int) -> Inputs:
        """What a step of training takes; several batches have an axis of their own, the first."""
        made = [_arrays(self.bucket, rows, kind, mels, pad) for rows in self.batches]
        if self.words:
            for batch, rows in zip(made, self.batches, strict=True):
                batch["words"] = _words(self.bucket, [each for row in rows for each in row])
        if len(made) == 1:
            return made[0]
        return {name: np.stack([each[name] for each in made]) for name in made[0]}


def _arrays(
    bucket: Bucket, rows: list[list[Sample]], kind: list[int], mels: int, pad: int
) -> Inputs:
    answers, known = kind
    if answers > 1:
        batch = _references(bucket, rows, known)
        for i, answer in enumerate(ANSWERS):
            texts = [[sample.texts[i] for sample in row] for row in rows]
            batch |= {f"{answer}_{name}": x for name, x in _tokens(bucket, texts, pad).items()}
            del batch[f"{answer}_segment_ids"]  # a pair has its row to itself
    else:
        batch = _tokens(bucket, [[sample.texts[0] for sample in row] for row in rows], pad)
    if bucket.clips:
        batch |= _features(bucket, [sample for row in rows for sample in row], mels)
    return batch


def _references(bucket: Bucket, rows: list[list[Sample]], known: int) -> Inputs:
    """Where each pair is in its source, -1 for none, and its reference's log-probabilities."""
    samples = [row[0] for row in rows]
    batch = {"rows": np.full(bucket.rows, -1, np.int32)}
    batch["rows"][: len(samples)] = [sample.row for sample in samples]
    if known:
        for i, answer in enumerate(ANSWERS):
            batch[f"ref_{answer}_logps"] = np.zeros(bucket.rows, np.float32)
            batch[f"ref_{answer}_logps"][: len(samples)] = [s.reference[i] for s in samples]
    return batch


def _tokens(bucket: Bucket, rows: list[list[Text]], pad: int) -> Inputs:
    shape = bucket.rows, bucket.tokens
    batch = {
        "input_ids": np.full(shape, pad, np.int32),
        "labels": np.full(shape, IGNORED, np.int32),
        "attention_mask": np.zeros(shape, np.int32),
        "segment_ids": np.zeros(shape, np.int32),
    }
    for b, row in enumerate(rows):
        start = 0
        for number, text in enumerate(row, 1):
            place = b, slice(start, start + len(text.ids))
            batch["input_ids"][place] = text.ids
            batch["labels"][place] = np.where(text.learned, text.ids, IGNORED)
            # Else the end of the sample before would be taught to foretell it.
            batch["labels"][b, start] = IGNORED
            batch["attention_mask"][place] = 1
            batch["segment_ids"][place] = number
            start += len(text.ids)
    return batch


def _features(bucket: Bucket, samples: list[Sample], mels: int) -> Inputs:
    batch = {
        "input_features": np.zeros((bucket.clips, mels, bucket.frames), np.float32),
        "feature_attention_mask": np.zeros((bucket.clips, bucket.frames), np.int32),
    }
    clips = [clip for s in samples for clip in zip(s.pictures, s.valid, strict=True)]
    for c, (picture, valid) in enumerate(clips):
        frames = picture.shape[1]
        batch["input_features"][c, :, :frames] = picture
        batch["input_features"][c, :, frames:] = picture[:, -1:]  # silence, as log_mel goes on
        batch["feature_attention_mask"][c, :valid] = 1
    return batch


def most_words(frames: int) -> int:
    """Room for what is said in a clip of so many frames: what its states can spell, 25 a second.

    People speak at 3 words a second, which are up to 13 tokens; but CTC's arrays, [C A N] in
    float32, are small beside a model's even so: 90 MB of the 40 clips of 30 s of a 7B's batch.
    """
    return max(mel.audio_tokens(frames), 1)


def _can_spell(ids: Sequence[int], valid: int) -> bool:
    """CTC wants a state for each word, and one more between two that are equal."""
    twice = sum(a == b for a, b in itertools.pairwise(ids))
    return len(ids) + twice <= mel.audio_tokens(valid)


def _words(bucket: Bucket, samples: list[Sample]) -> Int32[np.ndarray, "C N"]:
    """What is said in each clip, IGNORED behind it; all of it where it cannot be spelt in time."""
    words = np.full((bucket.clips, most_words(bucket.frames)), IGNORED, np.int32)
    said = [each for s in samples for each in zip(s.words, s.valid, strict=True)]
    for row, (ids, valid) in zip(words, said, strict=False):
        if _can_spell(ids, valid):
            row[: len(ids)] = ids
    return words
