"""What a loop shows while it runs: the bar, the log, and whether gradients are still finite."""

import collections
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from qwen2audio_jax.progress import Progress
from qwen2audio_jax.training import flops, hosts, placement
from qwen2audio_jax.training.checkpoint import Checkpoints
from qwen2audio_jax.training.log import Log

RECENT = 20  # steps that rates are means over


class Meter:
    """Reads a step's figures while the device is at the next, so that it never waits.

    Args:
      again: whether the step that the run begins with is measured, now or once more.

    Attributes:
      bad: steps in a row, up to the last that was read, that moved nothing.
    """

    def __init__(
        self,
        learner: Any,
        config: Any,
        log: Log,
        checkpoints: Checkpoints | None,
        *,
        done: int,
        again: bool = False,
        dtype: str = "float32",
    ):
        self.log, self.bad = log, 0
        self._learner, self._most, self._checkpoints = learner, config.bad_steps, checkpoints
        self._best = config.best
        self._schedules = {
            name: learner.optimizer.schedule(name.removesuffix("_learning_rate"))
            for name in learner.optimizer.rates
        }
        self._host = _host()
        self._peak = 1e12 * (config.peak_tflops or 0) or flops.peak(dtype)
        self._waiting: tuple[int, dict[str, float], Any] | None = None
        self._wait: dict[str, float] = {}
        self._told: set[tuple[str, str]] = set()
        self._others: list[Mapping[str, Any]] = []  # what other hosts have counted
        self._recent: collections.deque = collections.deque(maxlen=RECENT)
        self._last, self._first, self._compiling = time.perf_counter(), True, True
        self._progress = Progress(
            learner.optimizer.steps,
            desc="training",
            unit=" steps",
            initial=done,
            shown=jax.process_index() == 0,
        )
        log.begin(done, again=again)

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.flush()
        self._progress.close()

    def batch_came(self, asked: float) -> None:
        """Notes for how long the device has waited for a batch at most, if it is done by now.

        The first of a start is told apart: nothing could be made ahead of it.

        Args:
          asked: when the batch was asked for, by `time.perf_counter`.
        """
        metrics = self._waiting[2] if self._waiting else {}
        seconds = time.perf_counter() - asked
        self._wait = {"waited": seconds if all(x.is_ready() for x in metrics.values()) else 0.0}
        if self._first:
            self._first, self._wait = False, {"waited": 0.0, "first_batch": seconds}

    def add(
        self,
        number: int,
        batch: Mapping[str, Any],
        metrics: Mapping[str, Any],
        counts: Mapping[str, Any] | None = None,
    ) -> None:
        """Notes a step that was started, and reads the one before it.

        Args:
          counts: as `batches.Batches` has them: what could not be used is told when it begins.
        """
        sizes = _sizes(self._learner, batch) | {"wait": self._wait}
        sizes["bad"] = self._tell_bad(counts or {})
        before, self._waiting = self._waiting, (number, sizes, metrics)
        self._read(before)

    def _tell_bad(self, counts: Mapping[str, Any]) -> dict[str, int]:
        """Says of each part and each reason that it was met; gives how often, by reason.

        What other hosts met is known as of the last `gather`.
        """
        total: dict[str, int] = collections.defaultdict(int)
        for part, count in (item for each in (counts, *self._others) for item in each.items()):
            for reason, (number, message) in count["bad"].items():
                total[f"bad/{reason}"] += number
                if (part, reason) not in self._told:
                    self._told.add((part, reason))
                    self.say(f"{part}: left out, {reason}: {message}; more are counted in the log")
        return dict(total)

    def gather(self, counts: Mapping[str, Any]) -> None:
        """Learns what the other hosts have counted; all have to ask at once.

        Raises:
          ValueError: as in `hosts.counted`.
        """
        own, _ = placement.share(self._learner.mesh)
        every = hosts.counted(counts, placement.groups(self._learner.mesh))
        self._others = [each for i, each in enumerate(every) if i != own]

    def settle(self, counts: Mapping[str, Any]) -> None:
        """As `flush`, with what all hosts have counted up to the step; all have to ask at once.

        Args:
          counts: as for `add`.
        """
        if self._waiting is not None and jax.process_count() > 1:
            self.gather(counts)
            self._waiting[1]["bad"] = self._tell_bad(counts)
        self.flush()

    def say(self, line: str) -> None:
        """Says something beside the bar."""
        self._progress.write(line)

    def flush(self) -> None:
        """Reads the step that was started last.

        Raises:
          FloatingPointError: it was one too many without a finite gradient.
        """
        before, self._waiting = self._waiting, None
        self._read(before)

    def scored(self, number: int, scores: Mapping[str, float]) -> None:
        """Logs an evaluation, whose time is not the steps'."""
        self.flush()
        self.log.write(number, {f"eval/{name}": value for name, value in scores.items()})
        told = ", ".join(f"{name} {value:.4g}" for name, value in scores.items() if "/" not in name)
        self.say(f"step {number}: {told}")
        if self._best not in scores:
            known = ", ".join(scores)
            self.say(f"no checkpoint is kept as the best: no {self._best!r} among {known}")
        self._last = time.perf_counter()
        self._recent.clear()

    def _read(self, waiting: tuple[int, dict[str, float], Any] | None) -> None:
        if waiting is None:
            return
        number, sizes, metrics = waiting
        wait, bad = sizes.pop("wait"), sizes.pop("bad")
        row = {name: float(x) for name, x in jax.device_get(metrics).items()}
        now = time.perf_counter()
        # The schedule counts steps that moved something: those before this one.
        moved = number - int(row["skipped"]) - math.isfinite(row["grad_norm"])
        with jax.default_device(self._host):
            row |= {name: float(rate(moved)) for name, rate in self._schedules.items()}
        row |= {"seconds": now - self._last, **wait}
        self._last = now
        if not self._compiling:
            self._recent.append({**sizes, "seconds": row["seconds"]})
        self._compiling = False
        rates = self._rates() if self._recent else {}
        self.log.write(number, row | rates | bad)
        self._show(row["loss"], rates)
        self._count(number, row)

    def _show(self, loss: float, rates: Mapping[str, float]) -> None:
        seconds = sum(each["seconds"] for each in self._recent)
        pace = len(self._recent) / seconds if seconds else None
        # At once where rates are known anew: the step behind compilation, or an evaluation.
        self._progress.update(1, _figures(loss, rates), rate=pace, now=len(self._recent) == 1)

    def _rates(self) -> dict[str, float]:
        total = {k: sum(each[k] for each in self._recent) for k in self._recent[0]}
        seconds, groups = total.pop("seconds"), len(placement.groups(self._learner.mesh))
        rates = {f"{name}_per_second": groups * x / seconds for name, x in total.items()}
        work = rates.pop("flops_per_second")
        return rates | ({"mfu": work / self._peak} if self._peak else {})

    def _count(self, number: int, row: Mapping[str, float]) -> None:
        moved = math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])
        self.bad = 0 if moved else self.bad + 1
        if self.bad >= self._most:
            raise FloatingPointError(
                f"the loss is {row['loss']} and the gradient's norm {row['grad_norm']} at step "
                f"{number}, the {self.bad}. in a row that moved nothing; {self._last_good()}"
            )

    def _last_good(self) -> str:
        if self._checkpoints is None or not self._checkpoints.steps:
            return "there is no checkpoint to go on from"
        self._checkpoints.wait()
        step, rates = self._checkpoints.steps[-1], self._learner.optimizer.rates
        return (
            f"the last good checkpoint is {self._checkpoints.folder / str(step)}, and --changing "
            f"{' '.join(f'optimizer.{name}' for name in rates)} lets the run go on from there with "
            f"{'another one' if len(rates) == 1 else 'others'}"
        )


def _host() -> jax.Device | None:
    """Where a sum is done at once, rather than behind the step that the device is at."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names accelerators alone
        return None


def _sizes(learner: Any, batch: Mapping[str, Any]) -> dict[str, float]:
    """This host's valid tokens, seconds of sound, and operations of a batch."""
    frames = np.asarray(batch.get("feature_attention_mask", 0)).sum()
    masks = [np.asarray(x).sum() for k, x in batch.items() if k.endswith("attention_mask")]
    return {
        "tokens": float(sum(masks) - frames),
        "audio_seconds": float(frames) / 100,
        "flops": learner.flops(batch),
    }


def _figures(loss: float, rates: Mapping[str, float]) -> dict[str, str]:
    forms = {
        "tokens_per_second": ("tokens/s", ",.0f"),
        "audio_seconds_per_second": ("audio s/s", ".1f"),
        "mfu": ("MFU", ".1%"),
    }
    known = {label: f"{rates[k]:{form}}" for k, (label, form) in forms.items() if k in rates}
    return {"loss": f"{loss:.3f}", **known}
