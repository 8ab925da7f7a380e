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
SETTLED = 10  # steps after which it is told how often all of them will read the rows


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
    measures = lambda step: evaluate is not None and _measures(config, step, steps)
    # An earlier start may have been ended between a checkpoint and what it would have measured.
    due = measures(done) and not (checkpoints is not None and checkpoints.measured(done))
    how = {"done": done, "again": due, "dtype": dtype}
    meter = Meter(learner, config, log or Log(None), checkpoints, **how)
    with meter, Interruption() as stop:
        if done:
            meter.gather(_counts(batches))
        if due:
            due = not score(evaluate, meter, stop, checkpoints, done)
        owed = False  # a checkpoint: of a step that moves nothing, the next that does gets it
        for number in _traced(range(done, steps), config.profile, meter):
            if stop.signal is not None:  # it met an evaluation
                break
            asked = time.perf_counter()
            try:
                batch = next(batches, None)
            except Exception:
                if stop.signal is not None:  # it ended the processes that make batches, too
                    break
                if done and jax.process_count() == 1:  # others would have to save with it
                    save(learner, batches, checkpoints, done, meter)
                raise
            if batch is None:
                raise ValueError(f"the batches ended after {done} of {steps} steps")
            meter.batch_came(asked)
            metrics = learner.step(batch, number)
            done = number + 1
            meter.add(done, batch, metrics, _counts(batches))
            if done == SETTLED and (line := _passes(batches, done, steps)):
                meter.say(line)
            due, owed = measures(done), owed or done % config.save_every == 0
            if owed:
                meter.settle(_counts(batches))
            # Before it is measured: that takes long, and may be ended.
            if done == steps or due or (owed and not meter.bad):
                save(learner, batches, checkpoints, done, meter)
                owed = False
            elif owed:
                meter.say(f"step {done} moved nothing: the next one that does is saved instead")
            if stop.agreed(done):
                break
            if due:
                due = not score(evaluate, meter, stop, checkpoints, done)
        if stop.signal is not None and done:
            save(learner, batches, checkpoints, done, meter)
        if checkpoints is not None:  # a signal that comes meanwhile waits for it, too
            checkpoints.wait()
    return None if done == steps and not due else stop.signal


def _measures(config: LoopConfig, step: int, steps: int) -> bool:
    if step == 0:
        return config.evaluate_first
    return step == steps or step % config.evaluate_every == 0


def _counts(batches: Any) -> dict[str, Any]:
    return getattr(batches, "counts", {})


def _passes(batches: Any, done: int, steps: int) -> str | None:
    """How often all steps will read the rows that they read most often, if more than once."""
    passes = getattr(batches, "passes", dict)()
    part = max(passes, key=passes.get, default=None)
    if part is None or (times := passes[part] * steps / done) < 1:
        return None
    return f"{steps} steps will read {part} about {times:.1f} times"


def score(
    evaluate: Callable[[], dict[str, float]],
    meter: Meter,
    stop: Interruption,
    checkpoints: Checkpoints | None,
    done: int,
) -> bool:
    """Measures the learner, unless a signal says that the run is to end: there is little time.

    Returns:
      Whether it was measured. What was is put beside the step's checkpoint, if there is one.
    """
    meter.flush()
    if stop.signal is not None:
        return False
    try:
        with stop.at_once():
            scores = evaluate()
    except Interrupted:
        return False
    meter.scored(done, scores)
    if checkpoints is not None:
        checkpoints.add_scores(done, scores)
    return True


def resume(learner: Learner, batches: Iterator[Any], checkpoints: Checkpoints | None) -> int:
    """Puts a learner and its batches where the last good checkpoint was; gives its step."""
    if checkpoints is None:
        return 0
    stays, began = learner.stays, learner.began
    if not checkpoints.agreed():
        return 0
    restored = checkpoints.restore(learner.release())
    known = restored.data[0]
    if None not in (began, known.get("began")) and known["began"] != began:
        what = "--model" if learner.adapters is None else "--lora.start"
        raise ValueError(
            f"{checkpoints.folder} is of a run that began with other parameters than {what} has "
            "now: wanted the same, wherever it lies, or another --out"
        )
    if known["stays"] != stays:
        raise ValueError(
            f"{checkpoints.folder} was made beside other parameters than --model has now: those "
            "that do not train differ"
        )
    if restored.step > learner.optimizer.steps:
        raise ValueError(
            f"{checkpoints.folder} is of {restored.step} steps: wanted optimizer.steps of at least "
            f"as many, got {learner.optimizer.steps}"
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
) -> None:
    """Saves all that the run needs to go on.

    Also after steps that moved nothing: the state is that of the last one that did.

    Raises:
      FloatingPointError: the last step was one too many without a finite gradient.
    """
    meter.settle(_counts(batches))
    if checkpoints is not None:
        data = {"batches": batches.get_state(), "stays": learner.stays, "began": learner.began}
        checkpoints.save(done, learner.state, data)


@contextlib.contextmanager
def _trace(folder: pathlib.Path) -> Iterator[None]:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # it would hook into every thread, of batches and checkpoints
    jax.profiler.start_trace(str(folder), profiler_options=options)
    try:
        yield
    finally:
        jax.profiler.stop_trace()


def _traced(numbers: range, window: tuple[int, int] | None, meter: Meter) -> Iterator[int]:
    """The same numbers; what happens from step to step of the window is traced, or what is left
    of it."""
    first, last = window or (0, 0)
    if window is not None and last <= numbers.start:
        meter.say(
            f"no profile: steps {first} to {last} are past, it goes on behind {numbers.start}"
        )
    first = max(first, numbers.start + 1)
    with contextlib.ExitStack() as traces:
        for number in numbers:
            if number + 1 == first <= last:
                meter.flush()
                traces.enter_context(_trace((meter.log.folder or pathlib.Path()) / "profile"))
            yield number
            if number + 1 == last:
                meter.flush()
                traces.close()
