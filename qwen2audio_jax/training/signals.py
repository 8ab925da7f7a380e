"""SIGTERM and SIGINT as a question that a loop asks once a step."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(BaseException):
    """A signal met what need not be finished."""


class Interruption:
    """A context in which signals are noted; a second one does what it always did.

    Attributes:
      signal: that was noted; None: there was none.
    """

    def __init__(self):
        self.signal: int | None = None
        self._at_once = self._watches_others = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interruption":
        # Of several hosts, jax itself watches for SIGTERM; elsewhere than in the main thread,
        # Python takes no handlers.
        self._watches_others = jax.process_count() > 1
        watched = (signal.SIGINT,) if self._watches_others else SIGNALS
        if threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, self._note) for each in watched}
        return self

    def __exit__(self, *_: object) -> None:
        for each, before in self._before.items():
            signal.signal(each, before)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._watches_others:  # all have to end after the same step, as jax arranges for SIGTERM
            self.__exit__()
            signal.raise_signal(signal.SIGTERM)
            return
        if self.signal is None:
            self.signal = number
            if self._at_once:
                raise Interrupted
            return
        self.__exit__()
        signal.raise_signal(number)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """A context that a signal ends, by `Interrupted`; not where several hosts have to agree."""
        self._at_once = jax.process_count() == 1
        try:
            yield
        finally:
            self._at_once = False

    def agreed(self, step: int) -> bool:
        """Whether all hosts end after this step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signal = signal.SIGTERM
        return self.signal is not None
