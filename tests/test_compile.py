"""`train.compile` as a program: what it prints, searches, writes, and refuses."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import tyro

from qwen2audio_jax import sharding
from qwen2audio_jax.training import compiled, saved, topology
from qwen2audio_jax.training.chips import CHIPS
from train import command, compile

DEVICES = 4
WORK = ("--batch", "4", "--tokens", "32", "--frames", "40")
FIGURES = ("hbm_peak_bytes", "hbm_bytes", "flops", "model_flops", "mfu_bound", "compile_s")


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the program for CPUs of this process, which have no links; gives what it printed."""

    def describe(name, *, slices=1):
        return topology.Topology(name, CHIPS["v5e"], (2, 2), jax.devices()[:DEVICES])

    monkeypatch.setattr(topology, "describe", describe)
    monkeypatch.setattr(compiled, "_exchange", lambda found, *_: 1e-9 * len(list(found)))
    monkeypatch.setattr(compile.config, "preset", lambda name: small.EVEN)

    def program(*args):
        compile.main(told(*args))
        return capsys.readouterr()

    return program


@pytest.fixture
def lowered(monkeypatch):
    """What is compiled, in its order."""
    seen, lower = [], compile.lower
    monkeypatch.setattr(compile, "lower", lambda *a: seen.append(lower(*a)) or seen[-1])
    return seen


def told(*args):
    return tyro.cli(compile.Compile, args=[*args, *WORK])


def nothing(x, place):
    """An array as a program wants it."""
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.device_put(jax.random.key(0), place)
    return jax.device_put(jnp.zeros(x.shape, x.dtype), place)


def test_a_step_is_told_written_and_runs_again(run, lowered, tmp_path):
    """One object of figures, beside a table of the devices; the program's text, and itself, which
    another process runs without compiling it."""
    hlo, kept = tmp_path / "step.txt", tmp_path / "step"
    run("--json")  # a program that jax keeps, and would find
    out, err = run("--json", "--mesh.show", "--hlo", str(hlo), "--save", str(kept))
    report = json.loads(out)
    assert all(report[name] > 0 for name in FIGURES), report
    assert report["fits"] and report["devices"] == DEVICES and report["advice"] == []
    assert report["collectives"]["all-gather"]["count"] > 0
    assert report["given"]["stage"] == "sft" and report["given"]["batch"] == 4
    assert report["given"]["mesh"] == {"data": 1, "fsdp": DEVICES, "tensor": 1, "context": 1}
    assert "bytes a device" in err and f"{kept}: " in err
    assert hlo.read_text().startswith("HloModule")
    program = saved.load(kept, sharding.mesh(devices=jax.devices()[:DEVICES], fsdp=DEVICES))
    *_, one = lowered
    args, how = jax.tree.map(nothing, one.program.args_info, program.input_shardings)
    made = program(*args, **how)
    values = [x for x in jax.tree.leaves(made) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert values and all(np.isfinite(x).all() for x in values)


def test_a_token_is_told_in_words(run):
    out, err = run("--stage", "decode")
    assert out.startswith("decode of qwen2-audio-7b on v5e:4x4, 4 rows of 32 tokens; of each of 4")
    assert "  memory " in out and "MFU" in out and err == ""


def test_a_search_tells_each_program_and_the_best(run, lowered, monkeypatch):
    """Rows are doubled until there is no room; no policy is tried where nothing goes backward."""

    def full(lowered, where, options):
        rows = lowered.held["cache"].segments.shape[0]
        more = {"fits": rows <= 8, "step_s": 1.0, "mfu_bound": 0.5, "limit": "memory"}
        known = {"argument_bytes": 1, "compile_s": 0.0, "compile_cpu_s": 0.0, "held": {}}
        return compiled.Report(
            devices=DEVICES, hbm_peak_bytes=rows, hbm_chip_bytes=8, model_flops=1.0,
            process_peak_bytes=1, **known, **more,
        ), None  # fmt: skip

    monkeypatch.setattr(compiled, "compile", full)
    out, err = run("--stage", "decode", "--search", "--json")
    given = json.loads(out)["given"]
    assert given["batch"] == 8 and given["remat_policy"] == "full"
    trials = err.splitlines()
    assert trials[0].startswith("batch     4  full") and "minimal" not in err
    assert any("16 " in line and "does not fit" in line for line in trials)


@pytest.mark.parametrize(
    ("args", "r", "dtype"),
    [
        (("lora-sft", "--lora.r", "64"), 64, "bfloat16"),
        (("lora-sft",), 8, "bfloat16"),
        (("lora-sft", "--lora.lora-dropout", "0.1", "--lora.r", "4"), 4, "bfloat16"),
        (("dpo", "--lora.r", "16", "--weight-dtype", "float32"), 16, "float32"),
        (("dpo",), 0, "float32"),
        (("sft",), 0, "float32"),
    ],
    ids=str,
)
def test_adapters_are_those_that_are_asked_for(run, monkeypatch, args, r, dtype):
    """From the flags to the settings; lora-sft has some without being told."""
    seen = []

    def lower(stage, sizes, work, settings, mesh):
        seen.append(settings)
        raise InterruptedError

    monkeypatch.setattr(topology, "lower", lower)
    with pytest.raises(InterruptedError):
        run("--stage", *args)
    [settings] = seen
    assert (settings.lora.r, settings.weight_dtype) == (r, dtype)
    assert (settings.lora.config is None) == (r == 0)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("sft", "--lora.r", "8"), "sft has no adapters: wanted lora with lora-sft, dpo, dpo-prec"),
        (("decode", "--lora.r", "8"), "decode has no adapters: wanted lora with lora-sft, "),
        (("prefill", "--remat-policy", "minimal"), "training with --remat-policy, got prefill"),
        (("decode", "--gradient-accumulation-steps", "2"), "--gradient-accumulation-steps, got d"),
        (("decode", "--optimizer.mu-dtype", "bfloat16"), "with --optimizer, got decode"),
        (("prefill", "--ctc", "1", "--weight-dtype", "float32"), "with --ctc, --weight-dtype, got"),
    ],
)
def test_what_a_stage_would_ignore_is_refused(run, monkeypatch, capsys, args, message):
    """In one line."""
    monkeypatch.setattr(sys, "argv", ["x", "--stage", *args, *WORK])
    with pytest.raises(SystemExit) as ended:
        command.run(compile.main, compile.Compile, "train.compile", "about")
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    assert error.startswith("train.compile: error: ") and message in error
