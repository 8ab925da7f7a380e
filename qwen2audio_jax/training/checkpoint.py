"""Checkpoints of a run, whole: parameters, optimizer, the data iterators' state.

One appears at once or not at all, and is not believed before its checksums agree.
"""

import contextlib
import gc
import json
import logging
import math
import os
import sys
import time
import zlib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from qwen2audio_jax.training import checksum, hosts
from qwen2audio_jax.weights.orbax import quietly

CHECKPOINTS = "checkpoints"  # the folder within a run's
TORN = ".orbax-checkpoint-tmp"  # in the names of those that are not whole yet
LATE = 90  # seconds that a shared disk may take to show what another host wrote; NFS's usual is 60
SCORES = "metrics/metrics"  # within a checkpoint: where Orbax writes and reads what was measured

_HOST = "host-"  # begins the names of their files

_log = logging.getLogger(__name__)


class Restored(NamedTuple):
    """What a checkpoint held; `data` is of every host that saved it, in their order."""

    step: int
    state: Any
    data: list[Any]


class Checkpoints:
    """The checkpoints of a run, saved while training goes on.

    Args:
      folder: the run's.
      keep: how many of the latest stay.
      best: a metric of `add_scores`; the checkpoint that is best in it stays too.
      mode: whether the least or the greatest is best.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        keep: int = 3,
        best: str | None = None,
        mode: Literal["min", "max"] = "min",
    ):
        self.folder = epath.Path(folder).resolve() / CHECKPOINTS
        self._keep, self._best, self._sign = keep, best, 1 if mode == "max" else -1
        self._saving: int | None = None
        self._late: dict[int, dict[str, float]] = {}  # by step: measured, and not written yet
        self._check_scores()
        self._orbax: ocp.training.Checkpointer | None = self._open()

    def _open(self, *, clear: bool = True) -> ocp.training.Checkpointer:
        policies = ocp.training.preservation_policies
        kept = [policies.LatestN(self._keep)]
        if self._best is not None:
            kept.append(
                policies.BestN(
                    get_metric_fn=self._merit, n=1, keep_checkpoints_without_metrics=False
                )
            )
        return ocp.training.Checkpointer(
            self.folder,
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=clear,  # of a process that was killed
        )

    def _merit(self, metrics: Mapping[str, Any] | None) -> float:
        value = float((metrics or {}).get(self._best, math.nan))
        return -math.inf if math.isnan(value) else self._sign * value

    @property
    def steps(self) -> list[int]:
        """The steps that there are checkpoints of, as this host sees it."""
        return [info.step for info in self._orbax.checkpoints]

    def agreed(self) -> list[int]:
        """As `steps`, as the first host sees it; all have to ask at once.

        Another may see late what lies on a disk that they share, as NFS is by a minute.
        """
        return hosts.by_first(lambda: self.steps)

    @property
    def best(self) -> int | None:
        """The step of the best checkpoint; None if none was measured. All have to ask at once."""
        return hosts.by_first(self._find_best)

    def _find_best(self) -> int | None:
        merits = [(self._merit(info.metrics), info.step) for info in self._orbax.checkpoints]
        merit, step = max(merits, default=(-math.inf, None))
        return None if merit == -math.inf else step

    def measured(self, step: int) -> bool:
        """Whether there is a checkpoint of the step with what was measured then; all have to ask
        at once."""
        return hosts.by_first(
            lambda: any(info.step == step and info.metrics for info in self._orbax.checkpoints)
        )

    def save(self, step: int, state: Any, data: Any) -> None:
        """Starts to save; when this returns, `state` may be donated to the next step.

        A step that is there already stays as it is.

        Args:
          state: a pytree of arrays.
          data: what this host's data iterator has to know, as JSON can hold it.

        Raises:
          OSError: this or the last save failed; what was saved before it is still there.
        """
        self.wait()
        if step in self.agreed():
            return
        arrays = _flat(state)
        leaves = _describe(arrays, jax.device_get(checksum.sums(arrays)))
        self._saving = step
        try:
            self._orbax.save_checkpointables_async(
                step,
                {"state": arrays, "data": _HostFiles(data)},
                force=True,  # when to save is the loop's business
                custom_metadata={
                    "leaves": leaves,
                    "crc32": _crc(leaves),
                    "hosts": jax.process_count(),
                },
            )
        except Exception as error:  # whatever Orbax and TensorStore raise
            raise self._failure(error) from error

    def add_scores(self, step: int, metrics: Mapping[str, float]) -> None:
        """Puts beside a checkpoint what was measured, without waiting for its `save`.

        The next `save` or `wait` writes it, where nothing is known yet. Of a process that is killed
        before, nobody knows that the step was measured; of a step that is not saved, nobody needs
        to.
        """
        self._late[step] = {name: float(value) for name, value in metrics.items()}

    def _add_scores(self, step: int, scores: Mapping[str, float]) -> None:
        """Saves what was measured late; to save all anew would be to delete all first."""
        if step not in self.agreed() or self.measured(step):
            return
        path = self.folder / str(step) / SCORES
        try:
            if jax.process_index() == 0:
                path.parent.mkdir(exist_ok=True)
                put(path, json.dumps(scores).encode())
        except OSError as error:
            why = f"{_line(error)}; step {step} is still there"
            raise OSError(f"cannot save what was measured to {path.parent}: {why}") from error
        multihost_utils.sync_global_devices("what was measured late is saved")
        self._orbax.reload()

    def _check_scores(self) -> None:
        """Sets aside what was measured and cannot be read, which Orbax would not open."""
        if jax.process_index() == 0 and self.folder.is_dir():
            for path in self.folder.iterdir():
                scores = path / SCORES
                if not path.name.isdigit() or not scores.exists():
                    continue
                try:
                    [float(value) for value in json.loads(scores.read_bytes()).values()]
                except (AttributeError, TypeError, ValueError) as error:
                    aside = scores.with_name(f"{scores.name}.damaged")
                    _log.warning("%s is damaged, now called %s: %s", scores, aside.name, error)
                    scores.replace(aside)
        multihost_utils.sync_global_devices("damaged scores are set aside")

    def wait(self) -> None:
        """Returns when what is being saved is on disk, with what was measured since.

        Raises:
          OSError: it could not be saved.
        """
        try:
            with quietly():
                self._orbax.wait()
        except Exception as error:
            raise self._failure(error) from error
        self._saving = None
        while self._late:
            self._add_scores(*self._late.popitem())

    def _failure(self, error: Exception) -> OSError:
        step, self._saving = self._saving, None
        if hosts.joined():  # the others are amid this save: whatever asked them now would wait
            self._orbax = None
        else:
            with contextlib.suppress(Exception), quietly():  # the same one again
                self._orbax.close()
            self._free()
            self._orbax = self._open(clear=False)
        steps = []
        with contextlib.suppress(OSError):  # the disk may be gone
            steps = [int(path.name) for path in self.folder.iterdir() if path.name.isdigit()]
        last = f"step {max(steps)} is still there" if steps else "there is none before it"
        return OSError(f"cannot save step {step} to {self.folder}: {_line(error)}; {last}")

    def _free(self) -> None:
        """Removes what a failed save had written, where other threads may be about to fail too."""
        for _ in range(20):
            torn = [path for path in self.folder.iterdir() if TORN in path.name]
            if not torn:
                break
            for path in torn:
                with contextlib.suppress(OSError):
                    path.rmtree()
            time.sleep(0.1)

    def close(self) -> None:
        """As `wait`, and lets go of the folder.

        Of several hosts one may come here alone, after an error: what was measured late, which all
        have to agree on, is then only written by a `wait` before.
        """
        if self._orbax is None:  # a save has failed here, which ends all
            return
        if jax.process_count() > 1:
            self._late.clear()
        self.wait()
        self._orbax.close()

    def restore(self, abstract: Any, step: int | None = None) -> Restored | None:
        """Reads the last good checkpoint; damaged ones are named in the log and set aside.

        Args:
          abstract: the state's `jax.ShapeDtypeStruct`s, with the shardings to restore to.
          step: this one and no other; it is set aside, too, if it is damaged.

        Returns:
          None: there is no checkpoint.

        Raises:
          ValueError: all are damaged, or hold another state; the message says what is wrong.
        """
        damaged: dict[int, str] = {}
        for number in reversed(self.agreed() if step is None else [step]):
            self._catch_up(number)
            try:
                restored = self._read(number, abstract)
            except _OtherState as error:
                raise ValueError(f"{self.folder / str(number)} {error}") from error
            except Exception as error:
                damaged[number] = _line(error)
            else:
                self._set_aside(damaged)
                return restored
        if damaged:
            if step is not None:
                self._set_aside(damaged)
            lines = "; ".join(f"step {number}: {why}" for number, why in damaged.items())
            raise ValueError(f"{self.folder} holds no checkpoint that is whole: {lines}")
        return None

    def _catch_up(self, step: int) -> None:
        """Waits until this host, too, sees a checkpoint that the first one sees."""
        until = time.monotonic() + LATE
        while hosts.joined() and step not in self.steps and time.monotonic() < until:
            time.sleep(1)
            self._orbax.reload()

    def _read(self, step: int, abstract: Any) -> Restored:
        wanted, files, failure = _flat(abstract), _HostFiles(), None
        try:
            with quietly():
                kept = self._orbax.metadata(step).custom_metadata
            if _crc(leaves := kept["leaves"]) != kept["crc32"]:
                raise ValueError("its metadata do not match their checksum")
            _check(leaves, wanted)
            arrays = self._load(step, {"state": wanted, "data": files})["state"]
            data = files.data(kept["hosts"])
        except Exception as error:
            failure = error
        # every host goes back to the same checkpoint
        if np.any(multihost_utils.process_allgather(np.array(failure is not None))):
            raise failure or ValueError("another host cannot read it")
        for path, total in jax.device_get(checksum.sums(arrays)).items():
            if int(total) != leaves[path][2]:
                raise ValueError(f"{path} does not match its checksum")
        tree = jax.tree.structure(abstract)
        return Restored(step, jax.tree.unflatten(tree, [arrays[path] for path in wanted]), data)

    def _load(self, step: int, wanted: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._orbax.load_checkpointables(step, wanted)
        except Exception as error:
            failure = ValueError(_line(error))
        # Orbax gives up the reads beside one that failed, and each complains as it is let go
        hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
        try:
            gc.collect()
        finally:
            sys.unraisablehook = hook
        raise failure

    def _set_aside(self, damaged: Mapping[int, str]) -> None:
        for step, why in damaged.items():
            path = self.folder / str(step)
            aside = self.folder / f"{step}.damaged"
            _log.warning("%s is damaged, now called %s: %s", path, aside.name, why)
            if jax.process_index() == 0:
                if aside.exists():
                    aside.rmtree()
                path.rename(aside)
        if damaged:
            multihost_utils.sync_global_devices("damaged checkpoints are set aside")
            self._orbax.reload()


class _OtherState(Exception):
    """A checkpoint is whole, but of something else."""


class _HostFiles:
    """A file of every host, with its checksum in front; read are those of all.

    They are small, and a run that goes on with other hosts deals them anew.
    """

    def __init__(self, content: Any = None):
        body = json.dumps(content).encode()
        self._content = b"json %08x\n" % zlib.crc32(body) + body
        self._read: dict[int, bytes] = {}

    def data(self, hosts: int) -> list[Any]:
        if missing := set(range(hosts)) - set(self._read):
            raise ValueError(f"it has no data iterator's state of host {min(missing)}")
        return [self._parse(self._read[host]) for host in sorted(self._read)]

    def _parse(self, content: bytes) -> Any:
        head, _, body = content.partition(b"\n")
        if head != b"json %08x" % zlib.crc32(body):
            raise ValueError("the data iterator's state does not match its checksum")
        return json.loads(body)

    async def save(self, directory: Any) -> Any:
        async def write() -> None:
            path = await directory.await_creation() / f"{_HOST}{jax.process_index()}"
            path.write_bytes(self._content)

        return write()

    async def load(self, directory: epath.Path) -> Any:
        async def read() -> None:  # Orbax loses track of what it reads beside this if it raises
            for file in directory.iterdir() if directory.exists() else ():
                number = file.name.removeprefix(_HOST)
                if number.isdigit():
                    self._read[int(number)] = file.read_bytes()

        return read()


def put(path: epath.Path, content: bytes) -> None:
    """Writes a file that is there whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def _flat(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(p, simple=True, separator="."): leaf for p, leaf in leaves}


def _describe(arrays: Mapping[str, Any], sums: Mapping[str, Any]) -> dict[str, list]:
    return {
        path: [list(x.shape), np.dtype(x.dtype).name, int(sums[path])] for path, x in arrays.items()
    }


def _crc(leaves: Any) -> int:
    return zlib.crc32(json.dumps(leaves, sort_keys=True).encode())


def _check(found: Mapping[str, list], wanted: Mapping[str, Any]) -> None:
    problems = [f"{path} is unknown" for path in found if path not in wanted]
    problems += [f"{path} is missing" for path in wanted if path not in found]
    for path, leaf in wanted.items():
        got, need = found.get(path, [None])[:2], [list(leaf.shape), np.dtype(leaf.dtype).name]
        if path in found and got != need:
            problems.append(f"{path} is {got[1]}{got[0]}, wanted {need[1]}{need[0]}")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise _OtherState(f"holds another state: {'; '.join(problems[:5])}{more}")


def _line(error: BaseException) -> str:
    """What went wrong at the bottom, without the files that TensorStore lists before it."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    words = " ".join(str(error).split()).partition(" [tensorstore_spec=")[0]
    words = words.rpartition('": ')[2][:300]
    return words if " " in words else f"{type(error).__name__} {words}".strip()
