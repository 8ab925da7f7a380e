"""The table of pods is made of what was compiled, and goes on where it was stopped."""

import json

import pytest

from qwen2audio_jax.training.chips import GIB
from train import pods


@pytest.fixture
def asked(monkeypatch):
    """What is compiled, by a compiler that knows at once: every second thing does not fit."""
    seen = []

    def compiled(step):
        seen.append(step.command)
        return {
            "fits": len(seen) % 2 == 1,
            "hbm_peak_bytes": 15 * GIB,
            "hbm_chip_bytes": 16 * GIB,
            "flops_ratio": 1.3,
            "step_s": 0.5,
            "mfu_bound": 0.6,
            "limit": "links",
            "compile_cpu_s": 100.0,
        }

    monkeypatch.setattr(pods, "compiled", compiled)
    return seen


def test_every_step_is_compiled_once(asked, tmp_path):
    out = tmp_path / "docs" / "pods.md"
    pods.main(pods.Options(out))
    assert len(asked) == len(set(asked)) == len(out.read_text("utf-8").splitlines()) - 2
    assert set(asked) == set(json.loads(out.with_suffix(".json").read_text("utf-8")))
    assert "| sft | v5e:4x4 | `--batch 64` | 15.00 of 16.00 GiB | 1.300 | links, 500 ms |" in (
        out.read_text("utf-8")
    )
    assert "**15.00 of 16.00 GiB** | | does not fit" in out.read_text("utf-8")
    assert out.with_suffix(".png").stat().st_size > 10_000
    before, everything = out.read_text("utf-8"), len(asked)
    pods.main(pods.Options(out))
    assert len(asked) == everything and out.read_text("utf-8") == before
    pods.main(pods.Options(out, only="lora"))
    assert asked[everything:] == ["--stage lora-sft --topology v5e:2x4 --batch 16"]


def test_what_ends_badly_loses_nothing(asked, tmp_path, monkeypatch):
    """Those before it are in the store, and are not asked for again."""
    given, compiled = [], pods.compiled

    def breaks(step):
        if len(given) == 3:
            raise SystemExit(f"train.pods: error: {step.command} ended with 2")
        given.append(step)
        return compiled(step)

    monkeypatch.setattr(pods, "compiled", breaks)
    with pytest.raises(SystemExit, match="ended with 2"):
        pods.main(pods.Options(tmp_path / "pods.md"))
    assert len(json.loads((tmp_path / "pods.json").read_text("utf-8"))) == 3
    monkeypatch.setattr(pods, "compiled", compiled)
    pods.main(pods.Options(tmp_path / "pods.md"))
    assert len(asked) == len(set(asked))


def test_slices_are_counted():
    step = pods.Step("sft", "v5e:16x16", "--batch 4096", slices=4)
    assert step.count == 1024 and step.command.endswith("--slices 4 --mesh.dcn-data-parallelism 4")
