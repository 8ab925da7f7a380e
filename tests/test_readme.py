"""What the README tells people to run, runs."""

import importlib.util
import json
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def blocks(*languages):
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language in languages]


def test_python_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    """One after another, in a folder that holds the clip they listen to."""
    soundfile = pytest.importorskip("soundfile")
    pytest.importorskip("espeakng_loader")
    from qwen2audio_jax.data import synth

    soundfile.write(tmp_path / "clip.wav", synth.speak("seven two", voice="en-us"), 16_000)
    recordings = tmp_path / "free-spoken-digit-dataset" / "recordings"
    recordings.mkdir(parents=True)
    for name in ("7_jackson_4.wav", "7_jackson_5.wav"):
        (recordings / name).write_bytes((tmp_path / "clip.wav").read_bytes())
    monkeypatch.chdir(tmp_path)
    programs, names = blocks("python"), {"__name__": "readme"}
    assert programs
    for program in programs:
        exec(compile(program, "README.md", "exec"), names)
    assert "seven" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "digits.jsonl").read_text().splitlines()]
    assert [row["split"] for row in rows] == ["test", "train"]
    assert {row["text"] for row in rows} == {"seven"}
    assert all((tmp_path / row["audio"]).exists() for row in rows)


def test_programs_in_shell_blocks_exist(monkeypatch):
    """Modules after `python -m`, and commands of `qwen2audio`."""
    from qwen2audio_jax import cli

    monkeypatch.syspath_prepend(ROOT)
    shell = "\n".join(blocks("bash", "console"))
    modules = set(re.findall(r"python3? -m ([\w.]+)", shell))
    assert "train.demo" in modules
    assert not [module for module in modules if not importlib.util.find_spec(module)]
    commands = set(re.findall(r"(?:^|[$/] ?)qwen2audio (\w+)", shell, re.MULTILINE))
    assert commands and commands <= set(re.findall(r"qwen2audio (\w+) ", cli.MAIN))
