"""The plain loop: batches in, a trained model and its history out."""

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import tqdm
from flax import nnx

from qwen2audio_jax.model import Qwen2Audio
from qwen2audio_jax.training import loss as losses
from qwen2audio_jax.training import step
from qwen2audio_jax.training.optimizer import OptimizerConfig


def train(
    model: Qwen2Audio,
    batches: Iterable[dict[str, Any]],
    config: OptimizerConfig,
    *,
    loss: Callable[[Qwen2Audio, Any], losses.Sums] = losses.next_token,
    every: Callable[[int, Qwen2Audio], None] | None = None,
) -> tuple[Qwen2Audio, list[dict[str, float]]]:
    """Moves a model's parameters by one step a batch.

    Args:
      batches: what a `Processor` makes with labels; as many as `config.steps`.
      loss: what to minimise, of a model and a batch.
      every: called after each step with the number of steps done and the model.

    Returns:
      The trained model, and per step: what `step.update` logs, learning_rate, seconds.

    Raises:
      FloatingPointError: the loss is not finite; the message names the step.
    """
    graph, params, frozen = step.split(model, config.trains)
    of_params = step.bind(loss, graph)
    optimizer = config.make()
    state = step.start(params, optimizer)
    schedule = config.schedule()
    history = []

    with tqdm.tqdm(total=config.steps, unit="step", desc="training", mininterval=1) as bar:
        for number, batch in enumerate(batches):
            began = time.perf_counter()
            state, metrics = step.update(
                state, batch, (frozen,), loss=of_params, optimizer=optimizer
            )
            row = {name: float(x) for name, x in jax.device_get(metrics).items()}
            row["learning_rate"] = float(schedule(number))
            row["seconds"] = time.perf_counter() - began
            if not math.isfinite(row["loss"]):
                raise FloatingPointError(f"the loss is {row['loss']} at step {number + 1}")
            history.append(row)
            bar.set_postfix(loss=f"{row['loss']:.3f}", accuracy=f"{row['accuracy']:.1%}")
            bar.update()
            if every is not None:
                every(number + 1, nnx.merge(graph, state.params, frozen))
    return nnx.merge(graph, state.params, frozen), history
