"""What comes out of a run: its model and its adapters, the last and the best."""

import pathlib
import shutil

import jax
import jax.numpy as jnp

from qwen2audio_jax import spread, weights
from qwen2audio_jax.data.example import LONGEST
from qwen2audio_jax.processor import Processor
from qwen2audio_jax.training import peft
from qwen2audio_jax.training.checkpoint import Checkpoints
from qwen2audio_jax.training.learner import Learner
from qwen2audio_jax.training.settings import Settings
from qwen2audio_jax.weights.source import TINY

# Folders of a run's, and the end of their names where that is the best, not the last.
MODEL, ADAPTER, BEST = "model", "adapter", "-best"


def folders(out: pathlib.Path) -> list[pathlib.Path]:
    """All that a run may write."""
    return [out / f"{name}{end}" for name in (MODEL, ADAPTER) for end in ("", BEST)]


def save(
    settings: Settings, learner: Learner, processor: Processor, heard: float, which: str = ""
) -> None:
    """Writes the model as it is, and its adapters, into folders whose names end so.

    Args:
      heard: seconds of the longest clip that was learned from.
    """
    if settings.lora.r:
        adapters = jax.tree.map(lambda x: jnp.asarray(spread.whole(x)), learner.averaged())
        if jax.process_index() == 0:
            folder = settings.out / f"{ADAPTER}{which}"
            peft.save(folder, adapters, settings.lora.config, learner.base(), base=_base(settings))
    folder = settings.out / f"{MODEL}{which}"
    weights.save(jax.tree.map(lambda x: x.astype(settings.dtype), learner.merged()), folder)
    if jax.process_index() == 0:
        processor.save_pretrained(folder, window=_window(settings, processor, heard))


def save_best(
    settings: Settings,
    learner: Learner,
    processor: Processor,
    heard: float,
    checkpoints: Checkpoints,
) -> int | None:
    """Writes the best checkpoint, where that is not the last; gives its step.

    What an earlier end of a run that has gone on since then found best is removed.
    """
    if jax.process_index() == 0:
        for name in (MODEL, ADAPTER):
            shutil.rmtree(settings.out / f"{name}{BEST}", ignore_errors=True)
    best, abstract = checkpoints.best, None
    while best not in (None, learner.optimizer.steps):
        abstract = abstract or learner.release()
        try:
            learner.state = checkpoints.restore(abstract, best).state
        except ValueError:
            if checkpoints.best == best:
                raise
            best = checkpoints.best  # that one was damaged, which has been told
        else:
            save(settings, learner, processor, heard, BEST)
            break
    return best


def _window(settings: Settings, processor: Processor, heard: float) -> float:
    """Seconds of the longest clips that the model has learned from, here or before."""
    before = 0.0 if settings.from_scratch and heard else processor.window
    return max(before, min(heard, LONGEST), 1.0)  # what transcription takes


def _base(settings: Settings) -> str:
    """What adapters are of, as others find it: a hub id, or a folder of this disk."""
    folder = TINY if settings.model == "tiny" else pathlib.Path(settings.model).expanduser()
    return str(folder.absolute()) if folder.is_dir() else settings.model
