"""The table of pods is made of what was compiled, and goes on where it was stopped."""

import functools
import json
import pathlib
import subprocess
import types

import pytest

from qwen2audio_jax.training.chips import GIB
from train import pods

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOUND = {
    "fits": True,
    "hbm_peak_bytes": 15 * GIB,
    "hbm_chip_bytes": 15.75 * GIB,
    "flops_ratio": 1.3,
    "step_s": 0.5,
    "mfu_bound": 0.6,
    "serial_s": 1.0,
    "serial_mfu": 0.3,
    "limit": "links",
    "compile_s": 100.0,
    "process_peak_bytes": 3 * GIB,
    "by": "a jax, a libtpu",
    "at": "2026-11-30 abc",
}


@pytest.fixture
def asked(monkeypatch):
    """What is compiled, by a compiler that knows at once."""
    seen = []
    monkeypatch.setattr(pods, "compiled", lambda step: seen.append(step.command) or FOUND)
    return seen


def test_every_step_is_compiled_once(asked, tmp_path, monkeypatch):
    out = tmp_path / "docs" / "pods.md"
    assert pods.main(pods.Options(out)) == 0
    *table, _, by = out.read_text("utf-8").splitlines()
    assert len(asked) == len(set(asked)) == len(table) - 2
    assert by == "Compiled by a jax, a libtpu."
    assert set(asked) == set(json.loads(out.with_suffix(".json").read_text("utf-8")))
    assert (
        "| pretrain, sft | v5e:4x4 | `--batch 16 --tokens 4096 --clips 5` | 15.00 of 15.75 GiB "
        "| 1.300 | links, 500 ms | 60% | 1000 ms, 30% | 100 s | 3.0 GiB | 2026-11-30 abc |"
    ) in out.read_text("utf-8")
    assert "**" not in out.read_text("utf-8")
    assert out.with_suffix(".png").stat().st_size > 10_000
    monkeypatch.setattr(pods, "draw", lambda known, path: None)
    before, everything = out.read_text("utf-8"), len(asked)
    pods.main(pods.Options(out))
    assert len(asked) == everything and out.read_text("utf-8") == before
    pods.main(pods.Options(out, only="lora"))
    assert asked[everything:] == [
        "--stage lora-sft --topology v5e:2x4 --batch 32 --tokens 4096 --clips 5"
    ]


@pytest.mark.parametrize(
    ("differs", "bold"),
    [
        ({"mfu_bound": 0.59}, "**59%**"),
        ({"flops_ratio": 1.36}, "**1.360**"),
        ({"compile_s": 121.0}, "**121 s**"),
        ({"process_peak_bytes": 7 * GIB}, "**7.0 GiB**"),
        ({"fits": False, "hbm_peak_bytes": 17 * GIB}, "**17.00 of 15.75 GiB**"),
        ({"fits": False, "hbm_peak_bytes": 17 * GIB}, "**lacks 1.25 GiB**"),
    ],
)
def test_what_misses_its_aim_is_bold(differs, bold):
    """Of a step that has these aims; one that generates has none but to fit."""
    aimed = pods.line(pods.TABLE[0], FOUND | differs)
    assert bold in aimed and aimed.count("|") == pods.HEAD[0].count("|")
    if differs.keys() & {"mfu_bound", "flops_ratio", "compile_s", "process_peak_bytes"}:
        assert aimed.count("**") == 2
        assert "**" not in pods.line(pods.Step("decode", "v5e:1x2", "--batch 4"), FOUND | differs)


def test_what_cannot_be_compiled_has_a_row_and_is_tried_again(asked, tmp_path, monkeypatch):
    """All others are compiled, and the exit status says it."""
    knows, ends = pods.compiled, "train.compile: error: no such pod\n"
    refused = types.SimpleNamespace(returncode=2, stdout="", stderr=f"a warning\n{ends}")
    monkeypatch.undo()
    monkeypatch.setattr(subprocess, "run", lambda *args, **how: refused)
    wrong = pods.compiled(pods.TABLE[0])
    assert wrong == {"error": "no such pod"}
    some = lambda step: wrong if step.stage == "dpo" else knows(step)
    monkeypatch.setattr(pods, "compiled", some)
    monkeypatch.setattr(pods, "draw", lambda known, path: None)
    out = tmp_path / "pods.md"
    assert pods.main(pods.Options(out)) == 1
    (row,) = [row for row in out.read_text("utf-8").splitlines() if "no such pod" in row]
    assert row.startswith("| dpo | v5e:4x8 |") and "**no such pod**" in row
    before = len(asked)
    monkeypatch.setattr(pods, "compiled", knows)
    assert pods.main(pods.Options(out)) == 0
    assert asked[before:] == [f"--stage dpo --topology v5e:4x8 --batch 128{pods.WHOLE}"]
    assert "no such pod" not in out.read_text("utf-8")


@functools.cache
def documented():
    """What docs/ and README say was compiled."""
    known = json.loads((ROOT / "docs" / "pods.json").read_text("utf-8"))
    steps = {*pods.TABLE, *pods.CHIPS_GROW, *pods.SOUND_GROWS}
    return {step: known[step.command] for step in steps}


def test_every_step_that_is_documented_was_compiled_and_fits():
    """Where an aim is missed the table's row says so in bold; of those with an aim for MFU none."""
    told = (ROOT / "docs" / "pods.md").read_text("utf-8")
    for step, found in documented().items():
        assert pods.line(step, found) in told
        assert found["fits"] and found["process_peak_bytes"] <= pods.LARGEST * GIB
        if step.mfu:
            assert found["mfu_bound"] >= step.mfu and found["flops_ratio"] <= pods.MOST_AGAIN


def test_readme_has_what_was_compiled():
    readme = (ROOT / "README.md").read_text("utf-8")
    aimed = {step: found for step, found in documented().items() if step.mfu}
    assert len(aimed) == 6
    for step, found in aimed.items():
        kind, rows = step.chips.partition(":")[0], step.told.split()[1]
        needs, has = found["hbm_peak_bytes"] / GIB, found["hbm_chip_bytes"] / GIB
        parts = f"{found['flops_ratio']:.2f} | {100 * found['mfu_bound']:.0f} %"
        row = f"| {step.count} {kind} | {rows} | {needs:.1f} of {has:.4g} | {parts} "
        assert f"{row}| {100 * found['serial_mfu']:.0f} % |" in readme


def test_slices_are_counted():
    step = pods.Step("sft", "v5e:16x16", "--batch 4096", slices=4)
    assert step.count == 1024 and step.command.endswith("--slices 4 --mesh.dcn-data-parallelism 4")
