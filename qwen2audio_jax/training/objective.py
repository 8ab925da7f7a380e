"""A run's settings -> what it minimises, and the learner that does."""

from collections.abc import Callable
from functools import partial
from typing import Any

from jax.sharding import Mesh

from qwen2audio_jax import flash
from qwen2audio_jax.model import Qwen2Audio
from qwen2audio_jax.training import lora
from qwen2audio_jax.training.learner import Learner
from qwen2audio_jax.training.loss import Sums, next_token, next_token_and_words
from qwen2audio_jax.training.preference import preference
from qwen2audio_jax.training.settings import PreferenceSettings, Settings


def learner_of(
    settings: Settings, model: Qwen2Audio, mesh: Mesh, *, start: lora.Adapters | None = None
) -> Learner:
    """What a run drives.

    Args:
      model: given away; it may be of shapes alone.
      start: as in `Learner`.
    """
    reference = isinstance(settings, PreferenceSettings) and settings.keeps_reference
    return Learner(
        model,
        settings.optimizer,
        loss_of(settings),
        adapters=settings.lora.config,
        start=start,
        reference=reference,
        mesh=mesh,
        dtype=None if settings.dtype == settings.weight_dtype else settings.dtype,
        accumulate=settings.gradient_accumulation_steps,
        seed=settings.seed,
        drawn=settings.from_scratch,
    )


def loss_of(settings: Settings) -> Callable[..., Sums]:
    """What a run minimises: of a model and a batch, and of a `reference` model if it has one."""
    remat = settings.remat_policy
    if isinstance(settings, PreferenceSettings):
        loss = partial(preference, config=settings.preference, remat=remat)
    elif settings.ctc:
        loss = partial(next_token_and_words, weight=settings.ctc, remat=remat)
    else:
        loss = partial(next_token, remat=remat)

    def attending(*args: Any, **models: Any) -> Sums:
        with flash.using(settings.attention):
            return loss(*args, **models)

    return attending
