"""Figures go where they are to, or it is said at once that they cannot."""

import contextlib
import json
import sys
import types

import pytest

from qwen2audio_jax.training import log
from qwen2audio_jax.training.log import Log


class Refused(Exception):
    """As wandb.Error is one that nothing else is."""


class Board:
    """What `wandb` is to a log: it takes figures, until it does not; of a step that is behind the
    last it takes none."""

    def __init__(self, *, lets_in=True, takes=9):
        self.lets_in, self.takes, self.told, self.rows, self.ended = lets_in, takes, [], [], 0
        self.last = 0

    def init(self, **told):
        if not self.lets_in:
            raise Refused("api_key not configured (no-tty).\n call wandb.login")
        self.told.append(told)
        return self

    def define_metric(self, name, *, step_metric):
        assert (name, step_metric) == ("*", "step")

    def log(self, values, *, step=None):
        if len(self.rows) == self.takes:
            raise Refused("the service\n is gone")
        if step is None or step > self.last:
            self.last = self.last + 1 if step is None else step
            self.rows.append(dict(values))

    def finish(self):
        self.ended += 1


@pytest.fixture
def board(monkeypatch):
    def make(**how):
        board = Board(**how)
        monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=board.init))
        return board

    return make


def written(folder, steps, board=None, *, begin=0):
    project = None if board is None else "speech"
    with contextlib.closing(Log(folder, wandb=project, settings={"seed": 3})) as one:
        one.begin(begin)
        for step in steps:
            one.write(step, {"loss": 1.0 / step})
    return [row["step"] for row in log.read(folder / log.LOG)]


def test_weights_and_biases_have_the_run_under_one_name(tmp_path, board):
    """All of its starts: the project, the settings, and each figure by its step."""
    one = board()
    for _ in range(2):
        assert written(tmp_path / "run", [1, 2], one) == [1, 2]
    first, second = one.told
    assert first == second and first["id"] and first["resume"] == "allow"
    assert (first["project"], first["name"], first["config"]) == ("speech", "run", {"seed": 3})
    wanted = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]
    assert one.rows == wanted * 2 and one.ended == 2  # also what the second start did anew
    assert written(tmp_path / "other" / "run", [1], one) and one.told[-1]["id"] != first["id"]


def test_who_is_not_let_in_is_told_in_one_line(tmp_path, board):
    with pytest.raises(ValueError) as caught:
        written(tmp_path, [1], board(lets_in=False))
    told = "--wandb speech: api_key not configured (no-tty). call wandb.login; wanted a "
    assert str(caught.value).startswith(told) and "\n" not in str(caught.value)


def test_a_run_goes_on_where_weights_and_biases_let_nobody_in(tmp_path, board, caplog):
    """Nobody is there to log in when a job is begun again; the file has all."""
    assert written(tmp_path, [3], board(lets_in=False), begin=2) == [3]
    assert caplog.text.count("gets no more figures, which log.jsonl has: api_key not config") == 1


def test_all_is_closed_on_a_full_disk(tmp_path, board):
    one = board()
    opened = Log(tmp_path, wandb="speech")
    opened.begin(0)

    class Full:
        def close(self):
            raise OSError("No space left on device")

    opened._file, kept = Full(), opened._file
    kept.close()
    with pytest.raises(OSError, match="No space"):
        opened.close()
    assert one.ended == 1


def test_a_night_s_run_outlives_weights_and_biases(tmp_path, board, caplog):
    """Once it takes no more, that is told once; the file has all."""
    one = board(takes=1)
    assert written(tmp_path, [1, 2, 3], one) == [1, 2, 3]
    assert [row["step"] for row in one.rows] == [1] and not one.ended
    assert [each.getMessage() for each in caplog.records] == [
        "Weights & Biases gets no more figures, which log.jsonl has: the service is gone"
    ]
    assert json.loads((tmp_path / log.LOG).read_text().splitlines()[-1])["step"] == 3


@pytest.mark.parametrize(
    ("package", "asked", "told"),
    [
        (
            "wandb",
            {"tensorboard": False, "wandb": "x"},
            r"--wandb wants .*'qwen2audio_jax\[wandb\]'",
        ),
        ("tensorboardX", {"tensorboard": True, "wandb": None}, "or --no-tensorboard"),
    ],
)
def test_what_is_not_installed_is_told_of_beforehand(monkeypatch, package, asked, told):
    log.check_packages(tensorboard=False, wandb=None)
    monkeypatch.setitem(sys.modules, package, None)
    log.check_packages(tensorboard=False, wandb=None)
    with pytest.raises(ImportError, match=told):
        log.check_packages(**asked)
