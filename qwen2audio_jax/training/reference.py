"""What a reference model makes of preference pairs, computed once and kept beside a run."""

import dataclasses
import json
import logging
import math
import os
import pathlib
import re
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Bool, Float, Int, UInt32

from qwen2audio_jax.data import reading
from qwen2audio_jax.data.chats import from_preference
from qwen2audio_jax.data.example import UNFORESEEN, BadSample, Pair, why
from qwen2audio_jax.data.mixture import Mixture, Part
from qwen2audio_jax.data.pack import Bad
from qwen2audio_jax.data.sources import ELSEWHERE, FEW, Made, RandomAccess, each_clip, where
from qwen2audio_jax.processor import Processor
from qwen2audio_jax.progress import Progress
from qwen2audio_jax.training import checksum, hosts, inputs, run
from qwen2audio_jax.training.learner import Learner
from qwen2audio_jax.training.preference import REFERENCE
from qwen2audio_jax.training.settings import PreferenceSettings

FOLDER = "ref_log_probs"
PAIRS = "pairs"  # the folder of manifests with what the reference answered
MODEL = "ref_model"  # their column that says which model it was
AUDIO = ("audio",)  # fields that name clips, beside those of conversations
# Why a pair may be of use to the next start, though not to this one.
PASSING = ("missing audio", "corrupt audio", UNFORESEEN)
SAVE_EVERY = 60  # seconds: what a start that was killed has asked for is not asked for again

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class WithReference:
    """A source whose rows have the reference's log-probabilities in them."""

    source: RandomAccess
    logps: Float[np.ndarray, "rows 2"]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        known = zip(REFERENCE, self.logps[index].tolist(), strict=True)
        return {**self.source[index], **dict(known)}

    def where(self, index: int) -> str:
        return where(self.source, index)


@dataclasses.dataclass(frozen=True)
class _Some:
    """Some rows of a source."""

    source: RandomAccess
    rows: Int[np.ndarray, " some"]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.source[int(self.rows[index])]

    def where(self, index: int) -> str:
        return where(self.source, int(self.rows[index]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _How:
    """What answers depend on beside the rows."""

    model: str
    dtype: str  # of the arithmetic
    shapes: str  # of batches: what fits none has no answer
    stamp: str = ""  # of files whose rows are the same as long as it is; "" where each is looked at


KEPT = (*(field.name for field in dataclasses.fields(_How)), "rows", "logps", "asked", "unheard")


def settle(settings: PreferenceSettings, parts: Sequence[Part]) -> PreferenceSettings:
    """The settings; where rows have the reference's log-probabilities, it is not kept in memory.

    Args:
      parts: all of the run, those that are held out too.

    Raises:
      ValueError: some have them, and nobody is to compute those of the others.
    """
    if not settings.preference.wants_reference or settings.precompute_ref_log_probs:
        return settings
    known = _answered(parts)
    if any(known) and not all(known):
        raise ValueError(
            f"{parts[known.index(True)].name} has {' and '.join(REFERENCE)}, "
            f"{parts[known.index(False)].name} has not: wanted them in all that is learned and "
            "held out, or in none, or --precompute-ref-log-probs for those without"
        )
    return dataclasses.replace(settings, precompute_ref_log_probs=any(known))


def _answered(parts: Sequence[Part]) -> list[bool]:
    """Of which parts the rows have the reference's log-probabilities; all processes agree."""
    found = np.array([_has_columns(part) for part in parts], np.int32)
    return [bool(x) for x in multihost_utils.broadcast_one_to_all(found)] if parts else []


def _has_columns(part: Part) -> bool:
    return all(_first(part).get(name) is not None for name in REFERENCE)


def _first(part: Part) -> Mapping[str, Any]:
    """The first row that can be read; empty if none of the first can."""
    for index in range(min(len(part.source), FEW)):
        try:
            return part.read(index)
        except Exception as error:  # it is counted when it is its turn
            why(error)
    return {}


def compile(record: Mapping, processor: Processor) -> Pair:
    """As `from_preference`, of a row `WithReference`."""
    pair = from_preference(record, processor)
    if math.isnan(record[REFERENCE[0]]):
        message = "it could not be used when the reference answered, which was told then"
        raise BadSample("no reference", message)
    return pair


def precompute(
    learner: Learner, mixture: Mixture, parts: Sequence[Part], folder: pathlib.Path
) -> tuple[Part, ...]:
    """The parts with the learner's log-probabilities as it is, before all steps.

    What another start of the same run has computed is read from its folder; rows that say
    something else since then are asked for again, and so are those whose clips could not be
    heard. Parts whose rows have them stay as they are.
    `PAIRS` has manifests of all pairs that could be used, with the columns, for other runs.

    Args:
      mixture: whose batches' shapes are used.

    Raises:
      ValueError: clips are augmented, so that no two visits hear the same; a source does not end;
        or the run that goes on began with another model.
    """
    known = []
    how = _How(
        model=_identity(learner),  # all hosts add it up together
        dtype=str(learner.dtype),
        shapes=" ".join(map(str, mixture.buckets)),
    )
    for part, answered in zip(parts, _answered(parts), strict=True):
        if part.augmented or part.masked:
            raise ValueError(
                "log-probabilities of a reference that are known beforehand are of clips as they "
                "are: wanted data.augmented and data.masked of 0, or no precompute_ref_log_probs "
                f"and no {' and '.join(REFERENCE)} in the rows"
            )
        if answered:
            if jax.process_index() == 0 and _first(part).get(MODEL, how.model) != how.model:
                _log.warning(
                    "%s: its log-probabilities are of another reference than --model", part.name
                )
            known.append(part)
            continue
        if isinstance(part.source, Made):
            raise ValueError(f"precompute_ref_log_probs wants pairs in a file, got {part.name}")
        path = folder / FOLDER / f"{zlib.crc32(part.name.encode()):08x}.npz"
        source = WithReference(part.source, _compute(learner, mixture, part, path, how))
        known.append(dataclasses.replace(part, source=source, compile=compile))
        if jax.process_index() == 0:
            words = re.sub(r"\W+", "-", part.name.replace(".jsonl", ""))[-50:].strip("-")
            pairs = folder / PAIRS / f"{words}-{path.stem}.jsonl"
            if not pairs.exists() or pairs.stat().st_mtime_ns < path.stat().st_mtime_ns:
                _publish(pairs, source, how)
    return tuple(known)


def _compute(
    learner: Learner, mixture: Mixture, part: Part, path: pathlib.Path, how: _How
) -> Float[np.ndarray, "rows 2"]:
    """Asks for what the file does not have yet, and writes it every so often.

    A pair that is wrong in itself is not asked for again; one whose clip storage did not give is.
    """
    first = jax.process_index() == 0
    how = dataclasses.replace(how, stamp=getattr(part.source, "stamp", ""))
    kept = _kept_rows(path, how.stamp, len(part.source)) if first and how.stamp else None
    rows = kept
    if kept is None:
        rows = _fingerprints(part.source) if first else np.zeros(len(part.source), np.uint32)
    # All ask for the same: together.
    logps, (asked, unheard) = hosts.by_first(lambda: _read(path, how, rows)) or (
        np.full((len(part.source), len(REFERENCE)), np.nan, np.float32),
        np.zeros((2, len(part.source)), bool),
    )
    logps[~asked] = np.nan
    if asked.all():
        if first and how.stamp and kept is None:  # touched, and the same: not to be read once more
            _write(path, how, rows, logps, asked, unheard)
        return logps
    # Who was killed makes the same batches again; for what only could not be heard a few will do.
    again = bool((asked | unheard).all())
    which = np.flatnonzero(~asked) if again else np.arange(len(asked))
    bad: list[Bad] = []
    before, saved, told = [asked.copy(), unheard.copy()], time.monotonic(), 0
    with Progress(len(which), desc="reference", unit=" pairs", shown=first) as progress:
        some = dataclasses.replace(part, source=_Some(part.source, which)) if again else part
        for batch in hosts.each_by_first(_batches(some, mixture, bad, again)):
            used = batch["rows"] >= 0
            pairs = which[batch["rows"][used]]
            new = ~asked[pairs]
            if new.any():
                known = learner.reference_logps(batch)
                both = np.stack([known[name][: len(used)][used] for name in REFERENCE], axis=1)
                logps[pairs[new]], asked[pairs] = both[new], True
                if first and time.monotonic() - saved >= SAVE_EVERY:
                    _write(path, how, rows, logps, asked, unheard)
                    saved = time.monotonic()
            progress.update(int(used.sum()) + len(bad) - told)
            told = len(bad)
        progress.update(len(bad) - told)
    for each in hosts.by_first(lambda: bad):
        unheard[which[each.row]] = each.reason in PASSING
        asked[which[each.row]] = each.reason not in PASSING
    unheard &= ~asked
    if first and not np.array_equal(before, [asked, unheard]):
        _write(path, how, rows, logps, asked, unheard)
    return logps


def _batches(
    part: Part, mixture: Mixture, bad: list[Bad], again: bool
) -> Iterator[dict[str, np.ndarray]]:
    """All of a part; where it is asked for again, it may well be that none can be heard yet."""
    try:
        yield from inputs.once(part, mixture, bad)
    except ValueError as error:
        if not again or mixture.fatal:
            raise
        _log.warning("%s: still without a reference: %s", part.name, error)


def _kept_rows(path: pathlib.Path, stamp: str, count: int) -> UInt32[np.ndarray, " rows"] | None:
    """Each row's fingerprint as it was kept, if nobody has touched the files since then."""
    file = _kept(path)
    same = file is not None and str(file["stamp"]) == stamp and len(file["rows"]) == count
    return file["rows"] if same else None


def _kept(path: pathlib.Path) -> dict[str, np.ndarray] | None:
    """What was written, if it is there and whole; else it is asked for again."""
    try:
        with open(path, "rb") as raw, np.load(raw) as file:
            return {name: file[name] for name in KEPT}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        _log.warning("%s is damaged, so the reference is asked again: %s", path, error)
        return None


def _fingerprints(source: RandomAccess) -> UInt32[np.ndarray, " rows"]:
    """Of each row a number that changes with what it says, with its clips' names or samples and,
    of files on a disk, with their sizes and times."""
    found = reading.each(_Fingerprints(source), range(len(source)), "looking for changed pairs")
    return np.fromiter(found, np.uint32, len(source))


@dataclasses.dataclass(frozen=True)
class _Fingerprints:
    source: RandomAccess

    def __getitem__(self, index: int) -> int:
        try:
            row = each_clip(dict(self.source[index]), AUDIO, _stamped)
        except Exception as error:  # of a row that cannot be read
            row = why(error)
        return zlib.crc32(json.dumps(row, default=_number, skipkeys=True).encode())


def _stamped(clip: Any) -> Any:
    if isinstance(clip, Mapping):
        return {name: _stamped(value) for name, value in clip.items()}
    if not isinstance(clip, str):
        return clip
    try:
        file = os.stat(clip)
    except (OSError, ValueError):  # not there, or somewhere else
        return clip
    return [clip, file.st_size, file.st_mtime_ns]


def _number(value: Any) -> Any:
    """For what JSON has no word for: samples, a file's content."""
    if isinstance(value, np.ndarray):
        words = value.dtype.hasobject
        return value.tolist() if words else [*value.shape, zlib.crc32(value.tobytes())]
    return zlib.crc32(value) if isinstance(value, bytes) else repr(value)


def _identity(learner: Learner) -> str:
    if learner.adapters is None:
        return f"{learner.stays} {checksum.of(learner.state.params)}"
    return f"{learner.stays} {learner.began}"  # new adapters, which are drawn, change no answer


def _read(
    path: pathlib.Path, how: _How, rows: UInt32[np.ndarray, " rows"]
) -> tuple[Float[np.ndarray, "rows 2"], Bool[np.ndarray, "2 rows"]] | None:
    """What is known, and of which rows it was asked or could not be, for want of sound; None:
    nothing, of this model and source."""
    file = _kept(path)
    if file is None:
        return None
    goes_on = run.holds_checkpoint(path.parent.parent)
    then = _How(**{field.name: str(file[field.name]) for field in dataclasses.fields(_How)})
    same = then.model == how.model
    if not same and goes_on:
        raise ValueError(
            f"{path.parent.parent} holds a run whose reference is another model than --model"
        )
    same &= goes_on or then.dtype == how.dtype
    if not same or len(file["rows"]) != len(rows):
        return None
    same, logps, asked = file["rows"] == rows, file["logps"], file["asked"]
    if then.shapes != how.shapes:  # what fitted none of those may fit these
        asked = asked & np.isfinite(logps).all(axis=1)
    return logps, np.stack([asked, file["unheard"]]) & same


def _write(
    path: pathlib.Path,
    how: _How,
    rows: UInt32[np.ndarray, " rows"],
    logps: Float[np.ndarray, "rows 2"],
    asked: Bool[np.ndarray, " rows"],
    unheard: Bool[np.ndarray, " rows"],
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    known = {"rows": rows, "logps": logps, "asked": asked, "unheard": unheard}
    with open(partial, "wb") as file:
        np.savez(file, **dataclasses.asdict(how), **known)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _publish(path: pathlib.Path, source: WithReference, how: _How) -> None:
    """Writes the pairs that could be used as a manifest, unless its rows hold their clips."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            for index in np.flatnonzero(np.isfinite(source.logps).all(axis=1)).tolist():
                row = each_clip({**source[index], MODEL: how.model}, AUDIO, _absolute)
                file.write(json.dumps(row) + "\n")  # escaped: a field may hold half a letter
    except (TypeError, BadSample):
        partial.unlink()
        _log.warning("no %s: its rows hold their clips, which no manifest can", path)
    else:
        os.replace(partial, path)


def _absolute(clip: Any) -> Any:
    if isinstance(clip, Mapping):
        return {name: _absolute(value) for name, value in clip.items()}
    relative = isinstance(clip, str) and clip and not ELSEWHERE.match(clip)
    return os.path.abspath(clip) if relative else clip
