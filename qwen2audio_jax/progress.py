"""How far something is: a bar where somebody watches, a plain line now and then in a log."""

import sys
import time
from collections.abc import Mapping

import tqdm

EVERY = 30.0  # seconds between lines
LINE = "{desc}: {n_fmt}/{total_fmt}{unit}{postfix}, {elapsed} elapsed, {remaining} left"


class Progress:
    """Counts up to `total`, and shows it on stderr.

    Args:
      unit: of what is counted; a blank at its start parts it from the number.
      initial: what an earlier process has counted.
      scale: say 1.2G rather than 1200000000.
      shown: whether to show anything.
    """

    def __init__(
        self,
        total: int,
        *,
        desc: str,
        unit: str,
        initial: int = 0,
        scale: bool = False,
        shown: bool = True,
    ):
        self._lines = shown and not sys.stderr.isatty()
        self._how = {"total": total, "initial": initial, "unit": unit, "unit_scale": scale}
        self._bar = tqdm.tqdm(
            desc=desc, **self._how, mininterval=0.5, disable=self._lines or not shown
        )
        self._desc, self._done, self._told = desc, initial, None
        self._figures, self._rate = "", None
        self._begin = self._last = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(
        self,
        count: int = 1,
        figures: Mapping[str, str] | None = None,
        *,
        rate: float | None = None,
        now: bool = False,
    ) -> None:
        """Counts on.

        Args:
          figures: to be shown beside the count.
          rate: counts a second to foretell the end from; None: the mean since the beginning.
          now: write a line, whenever the last one was.
        """
        self._done += count
        if figures:
            self._figures, self._rate = ", ".join(f"{k} {v}" for k, v in figures.items()), rate
            self._bar.set_postfix_str(self._figures, refresh=False)
        self._bar.update(count)
        if self._lines and (now or time.monotonic() - self._last >= EVERY):
            self._tell()

    def write(self, text: str) -> None:
        """Says something beside it: on stdout under a bar, else among the lines."""
        if self._lines:
            print(text, file=sys.stderr, flush=True)
        elif not self._bar.disable:
            self._bar.write(text)

    def close(self) -> None:
        if self._lines and self._told != self._done:
            self._tell()
        self._bar.close()

    def _tell(self) -> None:
        self._last, self._told = time.monotonic(), self._done
        line = tqdm.tqdm.format_meter(
            self._done,
            elapsed=self._last - self._begin,
            prefix=self._desc,
            postfix=self._figures,
            rate=self._rate,
            bar_format=LINE,
            **self._how,
        )
        print(line, file=sys.stderr, flush=True)
