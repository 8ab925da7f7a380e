"""A bar where somebody watches; in a log plain lines, few of them, with the same figures."""

import io
import sys

import pytest

from qwen2audio_jax import progress
from qwen2audio_jax.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """A list whose only item is the time."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_now_and_then(clock, capsys):
    """When it is asked for, every half a minute, and at the end; what else is said, between."""
    with Progress(1000, desc="training", unit=" steps", initial=100) as shown:
        for step in range(60):
            clock[0] += 2
            figures = {"loss": f"{6 - step / 10:.3f}", "tokens/s": "1,234"}
            shown.update(1, figures, rate=0.5, now=step == 1)
        shown.write("step 160: wer 0.5")
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines() == [
        "training: 102/1000 steps, loss 5.900, tokens/s 1,234, 00:04 elapsed, 29:56 left",
        "training: 117/1000 steps, loss 4.400, tokens/s 1,234, 00:34 elapsed, 29:26 left",
        "training: 132/1000 steps, loss 2.900, tokens/s 1,234, 01:04 elapsed, 28:56 left",
        "training: 147/1000 steps, loss 1.400, tokens/s 1,234, 01:34 elapsed, 28:26 left",
        "step 160: wer 0.5",
        "training: 160/1000 steps, loss 0.100, tokens/s 1,234, 02:00 elapsed, 28:00 left",
    ]


def test_what_is_short_is_a_line(clock, capsys):
    """The end's, and nothing where nothing is to be shown."""
    for shown in (True, False):
        with Progress(4_700_000, desc="saving", unit="B", scale=True, shown=shown) as bar:
            clock[0] += 5
            bar.update(2_000_000)
            bar.update(2_700_000)
    assert capsys.readouterr().err == "saving: 4.70M/4.70MB, 00:05 elapsed, 00:00 left\n"


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    class Terminal(io.StringIO):
        isatty = lambda self: True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress(2, desc="training", unit=" steps") as shown:
        shown.update(1, {"loss": "1.5"}, rate=1.0, now=True)
        shown.update(1, {"loss": "1.25"}, rate=1.0)
        shown.write("half")
    text = sys.stderr.getvalue()
    assert "\r" in text and "2/2" in text and "loss 1.25" in text
    assert capsys.readouterr().out == "half\n"
