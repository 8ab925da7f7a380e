"""What a reference model makes of preference pairs, computed once and kept beside a run."""

import dataclasses
import math
import os
import pathlib
import time
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float

from qwen2audio_jax.data.chats import from_preference
from qwen2audio_jax.data.example import BadSample, Pair
from qwen2audio_jax.data.mixture import Mixture, Part
from qwen2audio_jax.data.sources import Made, RandomAccess, where
from qwen2audio_jax.processor import Processor
from qwen2audio_jax.progress import Progress
from qwen2audio_jax.training import checksum, inputs, run
from qwen2audio_jax.training.learner import Learner
from qwen2audio_jax.training.preference import REFERENCE

FOLDER = "ref_log_probs"
SAVE_EVERY = 60  # seconds: what a start that was killed has asked for is not asked for again


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


def compile(record: Mapping, processor: Processor) -> Pair:
    """As `from_preference`, of a row `WithReference`."""
    pair = from_preference(record, processor)
    if math.isnan(record[REFERENCE[0]]):
        raise BadSample("no reference", "it could not be used when the reference answered")
    return pair


def precompute(
    learner: Learner, mixture: Mixture, parts: Sequence[Part], folder: pathlib.Path
) -> tuple[Part, ...]:
    """The parts with the learner's log-probabilities as it is, before all steps.

    What another start of the same run has computed is read from its folder.

    Args:
      mixture: whose batches' shapes are used.

    Raises:
      ValueError: clips are augmented, so that no two visits hear the same; a source does not end;
        or the run that goes on began with another model.
    """
    known = []
    model = _identity(learner)  # all hosts add it up together
    for part in parts:
        if part.augmented or part.masked:
            raise ValueError(
                "precompute_ref_log_probs wants clips as they are: data.augmented and data.masked 0"
            )
        if isinstance(part.source, Made):
            raise ValueError(f"precompute_ref_log_probs wants pairs in a file, got {part.name}")
        path = folder / FOLDER / f"{zlib.crc32(part.name.encode()):08x}.npz"
        source = WithReference(part.source, _compute(learner, mixture, part, path, model))
        known.append(dataclasses.replace(part, source=source, compile=compile))
    return tuple(known)


def _compute(
    learner: Learner, mixture: Mixture, part: Part, path: pathlib.Path, model: str
) -> Float[np.ndarray, "rows 2"]:
    """Asks for what the file does not have yet, and writes it every so often."""
    first = jax.process_index() == 0
    logps, asked = _read(path, part, model) or (
        np.full((len(part.source), len(REFERENCE)), np.nan, np.float32),
        np.zeros(len(part.source), bool),
    )
    if asked.all():
        return logps
    saved = time.monotonic()
    with Progress(len(logps), desc="reference", unit=" pairs", shown=first) as progress:
        for batch in inputs.once(part, mixture):
            rows = batch["rows"]
            used = rows >= 0
            if not asked[rows[used]].all():
                known = learner.reference_logps(batch)
                pairs = [known[name][: len(rows)][used] for name in REFERENCE]
                logps[rows[used]], asked[rows[used]] = np.stack(pairs, axis=1), True
                if first and time.monotonic() - saved >= SAVE_EVERY:
                    _write(path, logps, asked, model)
                    saved = time.monotonic()
            progress.update(int(used.sum()))
    asked[:] = True  # the rest could not be used
    if first:
        _write(path, logps, asked, model)
    return logps


def _identity(learner: Learner) -> str:
    return f"{learner.identity()} {checksum.of(learner.state.params)}"


def _read(
    path: pathlib.Path, part: Part, model: str
) -> tuple[Float[np.ndarray, "rows 2"], Bool[np.ndarray, " rows"]] | None:
    """What is known, and which rows were asked for; None: nothing, of this model and source."""
    if not path.exists():
        return None
    with np.load(path) as file:
        same = "asked" in file and str(file["model"]) == model
        if not same and run.goes_on(path.parent.parent):
            raise ValueError(
                f"{path.parent.parent} holds a run whose reference is another model than --model"
            )
        same = same and len(file["logps"]) == len(part.source)
        return (file["logps"], file["asked"]) if same else None


def _write(
    path: pathlib.Path,
    logps: Float[np.ndarray, "rows 2"],
    asked: Bool[np.ndarray, " rows"],
    model: str,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    np.savez(partial, logps=logps, asked=asked, model=model)
    os.replace(partial, path)
