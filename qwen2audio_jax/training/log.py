"""Where a run's figures go: log.jsonl, TensorBoard, Weights & Biases."""

import contextlib
import json
import logging
import math
import os
import pathlib
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

LOG = "log.jsonl"

Row = Mapping[str, int | float]

_logger = logging.getLogger(__name__)


class Log:
    """A run's figures by step; a resumed run writes on behind its checkpoint's step.

    Args:
      folder: the run's; None: figures are only kept in memory.
      tensorboard: write events into its `tensorboard/` too.
      wandb: a project at Weights & Biases; None: none.
      settings: that Weights & Biases shows.

    Attributes:
      rows: everything written, by this process and by those before it.
    """

    def __init__(
        self,
        folder: pathlib.Path | None,
        *,
        tensorboard: bool = False,
        wandb: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ):
        self.folder, self.rows = folder, []
        self._options = tensorboard, wandb, settings
        self._file = self._events = self._project = None

    def begin(self, step: int, *, again: bool = False) -> None:
        """Opens everything, without what was written behind `step` by a run that was killed.

        Args:
          again: whether `step` is measured again, so that what was measured then is void, too.

        Raises:
          ImportError: as `check_packages`.
          ValueError: Weights & Biases lets nobody in; a run that goes on does so without.
        """
        if self.folder is None or jax.process_index():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / LOG
        self.rows = read(path, step)
        if again:
            measured = lambda row: any(name.startswith("eval/") for name in row)
            self.rows = [row for row in self.rows if row["step"] < step or not measured(row)]
        partial = path.with_name(f".{LOG}.partial")
        partial.write_text("".join(map(_line, self.rows)), "utf-8")
        os.replace(partial, path)
        self._file = path.open("a", encoding="utf-8", buffering=1)
        tensorboard, wandb, settings = self._options
        if tensorboard:
            self._events = _Events(self.folder / "tensorboard", step)
        if wandb is not None:
            self._project = _Project(self.folder, wandb, settings, first=step == 0)

    def write(self, step: int, values: Row) -> None:
        row = {"step": step, **values}
        self.rows.append(row)
        if self._file is not None:
            self._file.write(_line(row))
        if self._events is not None:
            self._events.write(step, values)
        if self._project is not None:
            self._project.write(step, values)

    def close(self) -> None:
        with contextlib.ExitStack() as stack:  # all, also where the disk is full
            for each in (self._project, self._events, self._file):
                if each is not None:
                    stack.callback(each.close)
        self._file = self._events = self._project = None


def check_packages(*, tensorboard: bool, wandb: str | None) -> None:
    """Refuses what a log could not be written to, before all that takes long.

    Raises:
      ImportError: a package is not installed; the message says how to.
    """
    if jax.process_index() == 0:  # which alone writes
        if tensorboard:
            _tensorboard()
        if wandb is not None:
            _wandb()


def read(path: pathlib.Path, last: int | None = None) -> list[dict[str, int | float]]:
    """The rows of a log up to a step; the last line may have been cut short by a kill."""
    rows = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if last is None or row["step"] <= last:
            rows.append({k: math.nan if v is None else v for k, v in row.items()})
    return rows


def _line(row: Row) -> str:
    # JSON has neither NaN nor infinity
    return json.dumps({k: v if math.isfinite(v) else None for k, v in row.items()}) + "\n"


def _tensorboard() -> Any:
    try:
        from tensorboardX import event_file_writer, proto, summary
    except ImportError as error:
        raise ImportError(
            "TensorBoard's events want tensorboardX: pip install 'qwen2audio_jax[train]', "
            "or --no-tensorboard"
        ) from error
    return event_file_writer, proto, summary


def _wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ImportError(
            "--wandb wants Weights & Biases: pip install 'qwen2audio_jax[wandb]'"
        ) from error
    return wandb


class _Events:
    """TensorBoard's events, written in this thread: tensorboardX's own dies of a full disk, and
    then whoever writes waits for it forever."""

    def __init__(self, folder: pathlib.Path, step: int):
        event_file_writer, proto, summary = _tensorboard()
        folder.mkdir(exist_ok=True)
        self._proto, self._summary = proto.event_pb2, summary
        self._file = event_file_writer.EventsWriter(str(folder / "events"))
        # what an earlier start wrote behind it is void
        begun = self._proto.SessionLog(status=self._proto.SessionLog.START)
        self._add(step + 1, session_log=begun)

    def write(self, step: int, values: Row) -> None:
        for name, value in values.items():
            self._add(step, summary=self._summary.scalar(name, value))
        self._file.flush()

    def _add(self, step: int, **what: Any) -> None:
        self._file.write_event(self._proto.Event(step=step, wall_time=time.time(), **what))

    def close(self) -> None:
        self._file.close()


class _Project:
    """A run at Weights & Biases. What it does not take once the training is going on is told, and
    no more is sent: log.jsonl has it."""

    def __init__(
        self,
        folder: pathlib.Path,
        project: str,
        settings: Mapping[str, Any] | None,
        *,
        first: bool,
    ):
        self._run = None
        known = folder / "wandb-id"  # other runs have folders of the same name
        if not known.exists():
            known.write_text(secrets.token_hex(4))
        try:
            self._run = _wandb().init(
                project=project,
                dir=folder,
                id=known.read_text(),
                name=folder.resolve().name,
                resume="allow",
                config=dict(settings or {}),
            )
            # its own count of steps only grows: what a start repeats it would not take
            self._run.define_metric("*", step_metric="step")
        except Exception as error:  # its own have no base class that its client's share
            if not first:
                _give_up(error)
                return
            raise ValueError(
                f"--wandb {project}: {_line_of(error)}; wanted a `wandb login` and a network, "
                "WANDB_MODE=offline, or no --wandb"
            ) from error

    def write(self, step: int, values: Row) -> None:
        self._ask(lambda: self._run.log({"step": step, **values}))

    def close(self) -> None:
        self._ask(lambda: self._run.finish())
        self._run = None

    def _ask(self, act: Callable[[], Any]) -> None:
        if self._run is None:
            return
        try:
            act()
        except Exception as error:  # likewise
            _give_up(error)
            self._run = None


def _give_up(error: Exception) -> None:
    _logger.warning("Weights & Biases gets no more figures, which %s has: %s", LOG, _line_of(error))


def _line_of(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
