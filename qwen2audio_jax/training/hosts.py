"""Several processes as one: how they meet, and how they end when one of them is lost."""

import atexit
import contextlib
import ctypes
import functools
import itertools
import json
import os
import pickle
import platform
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import jax
import numpy as np
from jax._src import distributed  # the service's store has no public name; orbax asks here too
from jax.experimental import multihost_utils

from qwen2audio_jax import compilation_cache

if TYPE_CHECKING:
    from qwen2audio_jax.training.settings import HostsConfig

STARTED = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")  # by srun, by mpirun: how many
BLOCK = 4096  # bytes that what they tell each other is a multiple of
PARCEL = 2**26  # bytes of it at a time
BEAT = 2  # seconds between signs of life
SLACK = 30  # seconds that a busy machine may be late with them
MISSED = 4  # so many in a row: once something has failed, the process is lost
LEFT = "left"  # the last sign of a process that ends in order
# What processes tell the service.
NAMES, LIFE, LOST, MARK, SEES = (
    f"qwen2audio_jax/{what}" for what in ("names", "life", "lost", "mark", "sees")
)
_ENDING = threading.Lock()
_HANDLERS: list[Any] = []  # C has no other hold on them


def join(config: "HostsConfig") -> None:
    """Meets the other processes; to be called before anything is computed.

    Raises:
      ValueError: nobody says where they are, or they did not come.
    """
    try:
        jax.distributed.initialize(
            coordinator_address=config.coordinator,
            num_processes=config.count,
            process_id=config.number,
            # jax may take half of it; the watch, which names the lost one, has to be first
            heartbeat_timeout_seconds=2 * (config.timeout + SLACK),
            initialization_timeout=config.meeting,
            **_gpus(config),
        )
    except ValueError as error:
        raise ValueError(
            "distributed: no cluster says where the other processes are; wanted "
            f"--hosts.coordinator HOST:PORT, --hosts.count and --hosts.number ({error})"
        ) from error
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"distributed: the processes did not meet: {reason}") from error
    _all_used()
    _tell(NAMES, here())
    watch = Watch(config.timeout)
    watch.start()
    if jax.process_index():
        client = distributed.global_state.client
        first = client.blocking_key_value_get(f"{NAMES}/0", config.meeting * 1000)
        _say_when_aborted(first, watch)
    atexit.register(watch.leave)  # before jax, which leaves the service
    _share_programs(config.meeting)


def _gpus(config: "HostsConfig") -> dict[str, Any]:
    """What jax would not find out about the GPUs of this process.

    Of Open MPI 5 it knows none of it (or wants mpi4py), so that each process would have all GPUs of
    its machine; within a job of SLURM's it would take what that says of the one process, mpirun.
    Where SLURM shows each task its own GPU alone, it would look for as many as there are tasks.
    """
    told = "JAX_LOCAL_DEVICE_IDS" in os.environ  # jax reads that itself
    local = os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK")
    if config.coordinator is not None and local is not None:
        ids = None if told else [int(local)]  # of GPUs; others are not shared out so
        return {"local_device_ids": ids, "cluster_detection_method": "deactivate"}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if "SLURM_LOCALID" in os.environ and not told and visible and "," not in visible:
        return {"local_device_ids": [0]}
    return {}


def _all_used() -> None:
    """Refuses to leave GPUs idle that SLURM has given this machine's tasks: jax takes one a task.

    Raises:
      ValueError: the message says how many there are, and what to ask for.
    """
    given = os.environ.get("SLURM_GPUS_ON_NODE")
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE")  # as 8(x2) or 4,3
    told = "JAX_LOCAL_DEVICE_IDS" in os.environ
    if not given or not tasks or told or jax.default_backend() != "gpu":
        return
    each = [
        int(count)
        for part in tasks.split(",")
        for count, _, times in [part.rstrip(")").partition("(x")]
        for _ in range(int(times or 1))
    ]
    here = each[min(int(os.environ.get("SLURM_NODEID") or 0), len(each) - 1)]
    if (used := here * jax.local_device_count()) < int(given):
        raise ValueError(
            f"distributed: {platform.node()} has {given} GPUs for {here} tasks, which would use "
            f"{used}: wanted a task for each (srun --ntasks-per-node {given}), or "
            f"JAX_LOCAL_DEVICE_IDS={','.join(map(str, range(int(given))))}"
        )


def _share_programs(meeting: int) -> None:
    """Has jax keep programs only where all processes find those of the first, which alone writes.

    Else that one would find a program, and the others compile it. On GPUs processes tune what they
    compile together, and would wait for its share, for a day; elsewhere it would wait for them, so
    that nothing is gained. They ask by the service: a program that asks would be one, too.
    """
    client, first = distributed.global_state.client, jax.process_index() == 0
    if first:
        mark = compilation_cache.mark()
        _tell(MARK, mark)
    else:
        mark = client.blocking_key_value_get(f"{MARK}/0", meeting * 1000)
    _tell(SEES, str(int(compilation_cache.sees(mark))))
    client.wait_at_barrier(SEES, meeting * 1000)
    folder = compilation_cache.kept()
    if first:
        compilation_cache.unmark(mark)
    blind = [number for number, sees in sorted(_told(SEES).items()) if sees == "0"]
    if not blind:
        return
    compilation_cache.stop()
    if first and folder is not None:
        print(
            f"compiled programs are not kept: {_named(blind[:1])} does not see those in {folder}; "
            "wanted QWEN2AUDIO_CACHE on a disk that all see",
            file=sys.stderr,
            flush=True,
        )


def alone() -> None:
    """Refuses to train as if alone in one of several processes, which would write over each other.

    Raises:
      ValueError: the message says who has started several.
    """
    for variable in STARTED:
        if int(os.environ.get(variable) or 1) > 1:
            raise ValueError(
                f"this is one of {os.environ[variable]} processes ({variable}): wanted "
                "--distributed, or that variable unset for runs of their own"
            )
    if jax.process_count() > 1:
        raise ValueError(
            f"these devices are of {jax.process_count()} hosts: wanted --distributed, on all"
        )


def joined() -> bool:
    """Whether this process has met others."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def gathered(value: Any) -> list[Any]:
    """What every process has, in their order; all have to ask at once.

    Args:
      value: anything that JSON can hold.
    """
    if jax.process_count() == 1:
        return [value]
    content = json.dumps(value).encode()
    longest = multihost_utils.process_allgather(np.array(len(content))).max()
    # JSON ignores blanks; few lengths are few programs to compile.
    content = content.ljust(-(-int(longest) // BLOCK) * BLOCK)
    every = multihost_utils.process_allgather(np.frombuffer(content, np.uint8))
    return [json.loads(bytes(each)) for each in every]


def by_first(make: Callable[[], Any]) -> Any:
    """What the first process makes, in all of them; all have to ask at once.

    What a process reads for itself may be what another cannot read.

    Args:
      make: called by the first alone; it gives what pickle can hold.

    Raises:
      Exception: what `make` raises, in all of them.
    """
    if jax.process_count() == 1:
        return make()
    content, failed = b"", None
    if jax.process_index() == 0:
        try:
            content = pickle.dumps((make(), None))
        except Exception as error:
            failed = error
            content = pickle.dumps((None, f"{error}"))
    # few lengths are few programs to compile; each parcel is on every device on its way
    blocks = multihost_utils.broadcast_one_to_all(np.array(-(-len(content) // BLOCK), np.int32))
    content, told = content.ljust(int(blocks) * BLOCK), []
    for start in range(0, len(content), PARCEL):
        part = np.frombuffer(content[start : start + PARCEL], np.uint8)
        told.append(np.asarray(multihost_utils.broadcast_one_to_all(part)).tobytes())
    if failed is not None:
        raise failed
    value, said = pickle.loads(b"".join(told))
    if said is not None:
        raise ValueError(said)
    return value


def each_by_first(items: Iterator[Any]) -> Iterator[Any]:
    """One after the other, what the first process has; nobody else asks `items` for anything.

    Args:
      items: none of them is None.
    """
    while (item := by_first(lambda: next(items, None))) is not None:
        yield item


def counted(
    counts: Mapping[str, Mapping[str, Any]], groups: Sequence[Sequence[int]]
) -> list[Mapping[str, Mapping[str, Any]]]:
    """What each group of processes has counted; all have to ask at once.

    Args:
      counts: as `batches.Batches` has them; those of a group count the same samples.

    Raises:
      ValueError: some of a group have not: what one could not read it has left out alone, and since
        then they have not learned from the same rows.
    """
    every = gathered(counts)
    for group in groups:
        sums = {i: _sums(every[i]) for i in group}
        if any(each != sums[group[0]] for each in sums.values()):
            left = (f"{sum(p['bad'] for p in sums[i].values())} by process {i}" for i in group)
            raise ValueError(
                "wanted the same samples in all processes that share rows, but some could not be "
                f"read by all (left out: {', '.join(left)}); what was saved before is whole: run "
                "it again to go on from there"
            )
    return [every[group[0]] for group in groups]


def _sums(counts: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Counts without why something was left out, which may differ."""
    bad = lambda reasons: sum(count for count, _ in reasons.values())
    return {name: {**part, "bad": bad(part["bad"])} for name, part in counts.items()}


def here() -> str:
    """Which of the processes this is, for messages."""
    return f"process {jax.process_index()} of {jax.process_count()} on {platform.node()}"


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Ends this process if what it does with the others fails, without waiting for any of them."""
    try:
        yield
    except Exception as error:
        if not joined() or "RESOURCE_EXHAUSTED" in str(error):
            raise
        lost = _lost()
        if not lost and not isinstance(error, jax.errors.JaxRuntimeError):
            raise  # it is this process's own, which can be told in order
        _end((str(error).splitlines() or [type(error).__name__])[0], lost)


class Watch(threading.Thread):
    """Gives signs of life, and ends this process once another is lost: the main thread may be
    waiting for that one.

    The first process notices who is silent for `timeout` seconds; the others learn it from there.
    """

    def __init__(self, timeout: int):
        super().__init__(daemon=True)
        self.timeout = timeout
        self._leaves = threading.Event()
        self.answered = time.monotonic()  # when the service took a sign of life last
        self._last: dict[int, tuple[str, float]] = {}  # each one's last sign, and since when

    def run(self) -> None:
        for number in itertools.count():
            # what the service does not take now it may take later; if it is gone, jax makes an end
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                _tell(LIFE, str(number))
                self.answered = time.monotonic()
                if lost := self.lost(time.monotonic()):
                    _end("no sign of life", lost)
            if self._leaves.wait(BEAT):
                return

    def lost(self, now: float) -> str:
        """Which processes are lost, if any: as one of them says, or as the first one notices."""
        if said := _said():
            return said
        if jax.process_index():
            return ""
        for number, sign in _told(LIFE).items():
            if self._last.get(number, ("",))[0] != sign:
                self._last[number] = sign, now
        return _named(
            number
            for number, (sign, since) in self._last.items()
            if sign != LEFT and now - since > self.timeout
        )

    def leave(self) -> None:
        """Lets this process end in order, however long it then waits for the others."""
        self._leaves.set()
        self.join()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _tell(LIFE, LEFT)


def _say_when_aborted(first: str, watch: Watch) -> None:
    """Names the first process where jax aborts this one because the service went with it.

    That comes at once, from a thread of jax's own, before one of Python's could notice; Python's
    handlers run when the signal's own has returned, which is too late.

    Args:
      first: its name.
    """

    def aborted(number: int) -> None:
        if _is_gone() or time.monotonic() - watch.answered > watch.timeout:
            said = f"{here()}: lost {first}, where all report"
            print(f"train: error: {said}", file=sys.stderr, flush=True)
            os._exit(1)
        signal_of(number, None)  # it is something else: as without

    signal_of = ctypes.CDLL(None).signal
    signal_of.argtypes = [ctypes.c_int, ctypes.c_void_p]
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)
    _HANDLERS.append(handler)
    signal_of(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))


def _is_gone() -> bool:
    """Whether nothing listens where the service was."""
    host, _, port = distributed.global_state.coordinator_address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=BEAT).close()
    except OSError:
        return True
    return False


def _end(reason: str, lost: str) -> NoReturn:
    """Says which process is lost, if one is, and ends this one.

    What was computed together cannot go on. The first process, which has the service, stays until
    the others have learnt of it.
    """
    with _ENDING:  # for ever: the main thread and the watch may both notice
        if lost:
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                _tell(LOST, lost)
        said = f"{here()}: lost {lost}: {reason}" if lost else f"{here()}: {reason}"
        print(f"train: error: {said}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        if lost and jax.process_index() == 0:
            time.sleep(2 * BEAT)
        os._exit(1)


@functools.cache
def _lost() -> str:
    """Which processes are lost, if any, now that something has failed.

    Looked for once: an error that ends this process may pass through `together` twice.
    """
    try:
        return _said() or _named(_silent())
    except jax.errors.JaxRuntimeError:
        return "process 0, where all report"


def _said() -> str:
    """Which processes are lost as one says that has noticed: it will be missed itself, too."""
    return next(iter(_told(LOST).values()), "")


def _silent() -> list[int]:
    """Who gives no sign of life while this process, which may be slow itself, gives `MISSED`."""
    mine, before = jax.process_index(), _told(LIFE)
    wanted = int(before.get(mine, 0)) + MISSED
    while int((now := _told(LIFE)).get(mine, 0)) < wanted:
        time.sleep(BEAT / 4)
    return [number for number, sign in now.items() if LEFT != sign == before.get(number)]


def _named(numbers: Iterable[int]) -> str:
    names = _told(NAMES)
    return "; ".join(names[number] for number in sorted(numbers))


def _tell(what: str, value: str) -> None:
    client = distributed.global_state.client
    client.key_value_set(f"{what}/{jax.process_index()}", value, allow_overwrite=True)


def _told(what: str) -> dict[int, str]:
    """What each process has told, if it has."""
    entries = distributed.global_state.client.key_value_dir_get(what)
    return {int(key.rpartition("/")[2]): value for key, value in entries}
