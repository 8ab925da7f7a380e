"""Programs teach their use, refuse mistakes in one line, and the demonstration leaves a model."""

import json
import pathlib
import runpy
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROGRAMS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in ("convert", "train", "benchmarks")
    for path in (ROOT / folder).glob("*.py")
    if '__name__ == "__main__"' in path.read_text("utf-8")
)


# another test has imported the program already
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")


def run(monkeypatch, program, *args):
    """Runs a program in this process; its exit status."""
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # some programs set it: this undoes that
    monkeypatch.setattr(sys, "argv", [program, *map(str, args)])
    with pytest.raises(SystemExit) as exit:
        runpy.run_module(program, run_name="__main__")
    return exit.value.code


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_explains_itself(program, monkeypatch, capsys):
    """`--help` exits 0, and says how to call it."""
    assert run(monkeypatch, program, "--help") == 0
    assert "usage:" in capsys.readouterr().out.lower()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--manifest", "absent.jsonl"], "no manifest at absent.jsonl"),
        (["--manifest", "one.jsonl", "--leave-out", "nobody"], "no speaker nobody"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, args, message):
    """Before anything is trained or written, with exit status 2."""
    row = {"audio": "a.wav", "text": "one", "speaker": "theo", "split": "train"}
    (tmp_path / "one.jsonl").write_text(json.dumps(row))
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "train.demo", *args, "--out", "out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("train.demo: error: ") and message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_demonstration_leaves_a_model(tmp_path):
    """Six steps from nothing: a folder that transformers loads, a card, pictures and a history."""
    import torch
    import transformers

    from qwen2audio_jax import Qwen2Audio

    out = tmp_path / "demo"
    command = [sys.executable, "-m", "train.demo", "--steps=6", "--clips=6", f"--out={out}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "held-out voices" in done.stdout and f"transcribe --model {out}" in done.stdout
    assert len(json.loads((out / "history.json").read_text())) == 6
    assert "| held-out voices | 6 |" in (out / "README.md").read_text("utf-8")
    assert all((out / name).stat().st_size > 10_000 for name in ("loss.png", "heard.png"))
    theirs = transformers.Qwen2AudioForConditionalGeneration.from_pretrained(
        out, dtype=torch.float32
    )
    ours = Qwen2Audio.from_pretrained(out, dtype="float32")
    ids = np.array([[1, 20, 30, 40]])
    wanted = theirs(input_ids=torch.tensor(ids)).logits.detach().numpy()
    np.testing.assert_allclose(ours(ids), wanted, atol=1e-4)
    processor = transformers.AutoProcessor.from_pretrained(out)
    assert processor.tokenizer.convert_tokens_to_ids("<|AUDIO|>") == ours.config.audio_token
