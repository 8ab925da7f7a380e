"""The loop: batches in, a trained model, its checkpoints and its history out."""

import contextlib
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

from qwen2audio_jax.training.checkpoint import Checkpoints
from qwen2audio_jax.training.learner import Learner
from qwen2audio_jax.training.log import Log
from qwen2audio_jax.training.meter import Meter
from qwen2audio_jax.training.settings import LoopConfig
from qwen2audio_jax.training.signals import Interrupted, Interruption

DEFAULTS = LoopConfig()


def train(
    learner: Learner,
    batches: Iterable[dict[str, Any]],
    config: LoopConfig = DEFAULTS,
    *,
    log: Log | None = None,
    checkpoints: Checkpoints | None = None,
    evaluate: Callable[[], dict[str, float]] | None = None,
    resumed: Callable[[], None] | None = None,
    dtype: str = "float32",
) -> int | None:
    """Moves a learner by a step a batch, from its last checkpoint to the optimizer's last step.

    SIGTERM and SIGINT end it after the step they meet, with a checkpoint; a second one at once.

    Args:
      batches: with checkpoints, what can say and be told where it is: `feeds.Feeds`.
      evaluate: measures the learner as it is.
      resumed: called when all is where the run begins or goes on; what is refused comes before.
      dtype: of the arithmetic, for MFU.

    Returns:
      The signal that ended it; None: it is done.

    Raises:
      FloatingPointError: too many gradients in a row were not finite; the message names the step
        and the last good checkpoint.
      OSError: a checkpoint could not be saved; the last good one is still there.
      ValueError: the checkpoint to go on from cannot be read, or is another run's.
    """
    batches, steps = iter(batches), learner.optimizer.steps
    done = resume(learner, batches, checkpoints)
    if resumed is not None:
        resumed()
    meter = Meter(learner, config, log or Log(None), checkpoints, done=done, dtype=dtype)
    with meter, Interruption() as stop:
        if evaluate is not None and config.evaluate_first and done == 0:
            score(evaluate, meter, stop, 0)
        measured = evaluate is None or (checkpoints is not None and checkpoints.measured(steps))
        if done == steps and not measured:  # an earlier start was ended while it measured
            scores = score(evaluate, meter, stop, done)
            save(learner, batches, checkpoints, done, meter, scores)
            measured = scores is not None
        for number in _traced(range(done, steps), config.profile, meter):
            asked = time.perf_counter()
            try:
                batch = next(batches, None)
            except Exception:
                if stop.signal is not None:  # it ended the processes that make batches, too
                    break
                if done and jax.process_count() == 1:  # others would have to save with it
                    save(learner, batches, checkpoints, done, meter, None)
                raise
            if batch is None:
                raise ValueError(f"the batches ended after {done} of {steps} steps")
            meter.batch_came(asked)
            metrics = learner.step(batch, number)
            meter.add(number + 1, batch, metrics, getattr(batches, "counts", {}))
            done, scores = number + 1, None
            last = done == steps
            if evaluate is not None and (last or done % config.evaluate_every == 0):
                try:
                    scores = score(evaluate, meter, stop, done)
                except Exception:
                    save(learner, batches, checkpoints, done, meter, None)
                    raise
                measured = scores is not None
            if last or scores or done % config.save_every == 0:
                save(learner, batches, checkpoints, done, meter, scores)
            if stop.agreed(done):
                break
        if stop.signal is not None:
            save(learner, batches, checkpoints, done, meter, None)
    if checkpoints is not None:
        checkpoints.wait()
    return None if done == steps and measured else stop.signal


def score(
    evaluate: Callable[[], dict[str, float]], meter: Meter, stop: Interruption, done: int
) -> dict[str, float] | None:
    """Measures the learner, unless a signal says that the run is to end: there is little time."""
    meter.flush()
    if stop.signal is not None:
        return None
    try:
        with stop.at_once():
            scores = evaluate()
    except Interrupted:
        return None
    meter.scored(done, scores)
    return scores


def resume(learner: Learner, batches: Iterator[Any], checkpoints: Checkpoints | None) -> int:
    """Puts a learner and its batches where the last good checkpoint was; gives its step."""
    if checkpoints is None or not checkpoints.steps:
        return 0
    stays, abstract = learner.identity(), learner.release()
    restored = checkpoints.restore(abstract)
    if restored.data[0]["stays"] != stays:
        raise ValueError(
            f"{checkpoints.folder} was made beside other parameters than --model has now: those "
            "that do not train differ"
        )
    learner.state = restored.state
    batches.set_state({k: v for host in restored.data for k, v in host["batches"].items()})
    return restored.step


def save(
    learner: Learner,
    batches: Iterator[Any],
    checkpoints: Checkpoints | None,
    done: int,
    meter: Meter,
    scores: dict[str, float] | None,
) -> None:
    """Saves all that the run needs to go on, unless its gradients have ceased to be finite."""
    meter.flush()
    if meter.bad:
        meter.say(f"step {done} is not saved: nothing is sound since step {done - meter.bad}")
    elif checkpoints is not None:
        data = {"batches": batches.get_state(), "stays": learner.identity()}
        checkpoints.save(done, learner.state, data, scores)


@contextlib.contextmanager
def _trace(folder: pathlib.Path) -> Iterator[None]:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # it would hook into every thread, of batches and checkpoints
    jax.profiler.start_trace(str(folder), profiler_options=options)
    try:
        yield
    finally:
        jax.profiler.stop_trace()


def _traced(numbers: Iterable[int], window: tuple[int, int] | None, meter: Meter) -> Iterator[int]:
    """The same numbers; what happens from step to step of the window is traced."""
    with contextlib.ExitStack() as traces:
        for number in numbers:
            if window is not None and number + 1 == window[0]:
                meter.flush()
                traces.enter_context(_trace((meter.log.folder or pathlib.Path()) / "profile"))
            yield number
            if window is not None and number + 1 == window[1]:
                meter.flush()
                traces.close()
