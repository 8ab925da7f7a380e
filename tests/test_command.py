"""What is wrong with a command is one line, whichever program it is."""

import re
import sys

import pytest

from train import command, compile, demo, launch, pods, shard


@pytest.mark.parametrize(
    ("program", "settings", "args", "message"),
    [
        ("train.shard", shard.Settings, ["--wat"], "Missing value for argument 'manifest'"),
        (
            "train.shard",
            shard.Settings,
            ["rows.jsonl", "x", "--row", "3"],
            "Unrecognized options: --row, 3; perhaps --rows",
        ),
        ("train.demo", demo.Demo, ["--nonsense"], "Unrecognized options: --nonsense;"),
        ("train.demo", demo.Demo, ["--seed", "one"], "Error parsing --seed: .*'one'"),
        ("train.pods", pods.Options, ["pods.md", "more"], "Unrecognized options: more"),
        ("train.compile", compile.Compile, ["--stage", "none"], "'none' .*'pretrain', 'sft'"),
    ],
)
def test_a_mistaken_flag_is_one_line(monkeypatch, capsys, program, settings, args, message):
    monkeypatch.setattr(sys, "argv", ["x", *args])
    with pytest.raises(SystemExit) as ended:
        command.run(pytest.fail, settings, program, "about")
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.count("\n") == 1 and error.startswith(f"{program}: error: ")
    assert error.endswith("; --help teaches\n") and not set(error) & set("│╭╰─")
    assert re.search(message, error)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["tiny", "--optimizer.steps", "1"], "Error parsing --optimizer: wanted fewer warm-up st"),
        (["tiny", "--changing", "seed"], "Error parsing Settings: wanted changing of optimizer.l"),
        (["none"], "Unrecognized options: none; Available subcommands: "),
    ],
)
def test_a_mistake_within_a_preset_names_the_flag(monkeypatch, args, message):
    """Not what tyro calls the settings that a preset begins with."""
    monkeypatch.setattr(sys, "argv", ["x", *args])
    with pytest.raises(ValueError) as caught:
        launch._parse("sft", "about")
    assert str(caught.value).startswith(message) and "tyro" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "status", "line"),
    [
        (0, 0, ""),
        (143, 143, ""),
        (ValueError("wanted a,\n got b"), 2, "x.y: error: wanted a, got b\n"),
        (FileNotFoundError("no a"), 2, "x.y: error: no a\n"),
        (ModuleNotFoundError("No a"), 2, "x.y: error: No a; pip install 'qwen2audio_jax[demo]'\n"),
        (OSError(28, "No space left"), 1, "x.y: error: [Errno 28] No space left\n"),
        (FloatingPointError("not finite"), 1, "x.y: error: not finite\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_the_exit_status_says_whose_fault_it_was(monkeypatch, capsys, given, status, line):
    """2: what was given; 1: the run, or the disk."""

    def main(options):
        if isinstance(given, BaseException):
            raise given
        return given

    monkeypatch.setattr(sys, "argv", ["x", "pods.md"])
    with pytest.raises(SystemExit) as ended:
        command.run(main, pods.Options, "x.y", "about", extra="demo")
    assert ended.value.code == status
    assert capsys.readouterr().err == line


def test_who_asks_is_told_where_it_failed(monkeypatch, capsys):
    def main(options):
        raise ValueError("wanted a, got b")

    monkeypatch.setattr(sys, "argv", ["x", "pods.md"])
    monkeypatch.setenv("QWEN2AUDIO_TRACEBACK", "1")
    with pytest.raises(SystemExit):
        command.run(main, pods.Options, "x.y", "about")
    *trace, line = capsys.readouterr().err.splitlines()
    assert line == "x.y: error: wanted a, got b" and "in main" in "".join(trace)


def test_what_nobody_foresaw_keeps_its_trace(monkeypatch):
    def main(options):
        raise RuntimeError("a bug")

    monkeypatch.setattr(sys, "argv", ["x", "pods.md"])
    with pytest.raises(RuntimeError, match="a bug"):
        command.run(main, pods.Options, "x.y", "about")


@pytest.mark.parametrize(
    ("error", "status"), [(KeyError("unforeseen"), 1), (KeyboardInterrupt(), 130)]
)
def test_who_has_met_others_waits_for_none_of_them(monkeypatch, capsys, error, status):
    """To leave in order would be to meet them once more."""

    class Ended(BaseException):
        pass

    def end(status):
        raise Ended(status)

    monkeypatch.setattr(command.hosts, "joined", lambda: True)
    monkeypatch.setattr(command.os, "_exit", end)
    with pytest.raises(Ended) as ended, command.guard("train.sft"):
        raise error
    assert ended.value.args == (status,)
    assert ("KeyError: 'unforeseen'" in capsys.readouterr().err) == (status == 1)
