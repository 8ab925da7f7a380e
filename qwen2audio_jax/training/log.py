"""Where a run's figures go: log.jsonl, TensorBoard, Weights & Biases."""

import json
import math
import os
import pathlib
import secrets
import time
from collections.abc import Mapping
from typing import Any

import jax

LOG = "log.jsonl"

Row = Mapping[str, int | float]


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
          ImportError: what is to be written to is not installed; the message says how to.
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
            self._project = _wandb(self.folder, wandb, settings)

    def write(self, step: int, values: Row) -> None:
        row = {"step": step, **values}
        self.rows.append(row)
        if self._file is not None:
            self._file.write(_line(row))
        if self._events is not None:
            self._events.write(step, values)
        if self._project is not None:
            self._project.log(dict(values), step=step)

    def close(self) -> None:
        for each in (self._file, self._events):
            if each is not None:
                each.close()
        if self._project is not None:
            self._project.finish()
        self._file = self._events = self._project = None


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


class _Events:
    """TensorBoard's events, written in this thread: tensorboardX's own dies of a full disk, and
    then whoever writes waits for it forever."""

    def __init__(self, folder: pathlib.Path, step: int):
        try:
            from tensorboardX import event_file_writer, proto, summary
        except ImportError as error:
            raise ImportError(
                "TensorBoard's events want tensorboardX: pip install 'qwen2audio_jax[train]', "
                "or --no-tensorboard"
            ) from error
        folder.mkdir(exist_ok=True)
        self._proto, self._summary = proto.event_pb2, summary
        self._file = event_file_writer.EventsWriter(str(folder / "events"))
        if step:  # what was written behind it is void
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


def _wandb(folder: pathlib.Path, project: str, settings: Mapping[str, Any] | None) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ImportError(
            "--wandb wants Weights & Biases: pip install 'qwen2audio_jax[wandb]'"
        ) from error
    known = folder / "wandb-id"  # other runs have folders of the same name
    if not known.exists():
        known.write_text(secrets.token_hex(4))
    return wandb.init(
        project=project,
        dir=folder,
        id=known.read_text(),
        name=folder.resolve().name,
        resume="allow",
        config=dict(settings or {}),
    )
