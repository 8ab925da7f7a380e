"""What a step that does not fit is told depends on what it was given and on what is largest."""

import dataclasses

import pytest

from qwen2audio_jax import preset, sharding
from qwen2audio_jax.training.advice import advice
from qwen2audio_jax.training.chips import GIB
from qwen2audio_jax.training.compiled import Report
from qwen2audio_jax.training.settings import MeshConfig, OptimizerConfig
from train.compile import Compile, as_json, told


def report(*, held=6.3, needs=20.0, has=15.75):
    parts = {"trained": int(held / 3 * GIB), "optimizer": int(held / 1.5 * GIB), "batch": 0}
    return Report(
        fits=needs <= has,
        devices=8,
        hbm_peak_bytes=int(needs * GIB),
        hbm_chip_bytes=int(has * GIB),
        argument_bytes=sum(parts.values()),
        held=parts,
        model_flops=1e15,
        compile_s=60.0,
        compile_cpu_s=100.0,
        process_peak_bytes=2 * GIB,
        largest=("4.00G: f32[4,8]{1,0} jit(step)/dot",),
    )


def flags(given, found, **sizes):
    return [each.split(":")[0] for each in advice(given, found, sharding.mesh(**sizes))]


def test_what_takes_most_comes_first():
    """Rows, of which two in three have to go; or what is held, however few they are."""
    given = Compile(batch=32)
    assert flags(given, report(needs=30.0), fsdp=8) == [
        "--gradient-accumulation-steps 4",  # one of four rows a device: 6.3 + 23.7 / 4
        "--batch 8",
        "--optimizer.mu-dtype bfloat16",
        "--topology of 16 devices",
    ]
    given = Compile(batch=32, mesh=MeshConfig(ici_data_parallelism=2))
    (first, second, *_) = flags(given, report(held=14.0), data=2, fsdp=4)
    assert first == "--optimizer.mu-dtype bfloat16"
    assert second == "--mesh.ici-data-parallelism 1"


@pytest.mark.parametrize(
    ("given", "sizes", "wanted", "not_wanted"),
    [
        (Compile(batch=8), {"fsdp": 8}, "--mesh.ici-context-parallelism 2 --batch 4", "--batch 8"),
        (Compile(batch=8, remat_policy="minimal"), {"fsdp": 8}, "--remat-policy full", "--stage"),
        (Compile(batch=8, attention="dot_product"), {"fsdp": 8}, "--attention flash", "--batch 8"),
        (
            Compile(batch=8, attention="flash"),
            {"fsdp": 8},
            "--tokens 512 --frames 1500",
            "--attention flash",
        ),
        (Compile(batch=8, stage="dpo"), {"fsdp": 8}, "--stage dpo-precomputed", "--stage lora-sft"),
        (
            Compile(batch=8, optimizer=OptimizerConfig(mu_dtype="bfloat16")),
            {"fsdp": 8},
            "--topology of 16 devices",
            "--optimizer.mu-dtype bfloat16",
        ),
        (
            Compile(batch=8, stage="decode", tokens=2048),
            {"fsdp": 8},
            "--mesh.ici-tensor-parallelism 2",
            "--gradient-accumulation-steps 2",
        ),
        (
            Compile(
                batch=4,
                stage="decode",
                tokens=2048,
                mesh=MeshConfig(ici_tensor_parallelism=4),  # heads: 32 and 20
            ),
            {"fsdp": 2, "tensor": 4},
            "--tokens 1024",
            "--mesh.ici-tensor-parallelism 8",
        ),
        (
            Compile(batch=16, slices=2, mesh=MeshConfig(dcn_data_parallelism=2)),
            {"data": 2, "fsdp": 4},
            "--topology of 16 devices",
            "--mesh.ici-data-parallelism 1",
        ),
    ],
)
def test_nothing_is_advised_that_is_so_already(given, sizes, wanted, not_wanted):
    said = flags(given, report(), **sizes)
    assert wanted in said and not_wanted not in said


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (Compile(batch=8), "--tokens 512 --frames 1500"),
        (Compile(batch=8, tokens=2048), "--tokens 1024"),
        (Compile(batch=8, tokens=4096, clips=5), "--tokens 2048 --clips 2"),
        (Compile(batch=8, stage="prefill"), "--tokens 512 --frames 1500"),
        (Compile(batch=8, stage="decode"), "--tokens 512"),
    ],
)
def test_shorter_rows_still_hold_what_they_hear(given, wanted):
    """What is advised is taken by the same program."""
    assert wanted in flags(given, report(), fsdp=8)
    words = wanted.replace("--", "").split()
    less = dict(zip(words[::2], map(int, words[1::2]), strict=True))
    if given.stage != "decode":  # which hears nothing
        dataclasses.replace(given, **less).arrays(preset(given.model), given.stage)


def test_a_mesh_that_is_advised_is_one():
    """Where all its sizes were told; of copies alone, too."""
    told = MeshConfig(ici_fsdp_parallelism=8)
    said = flags(Compile(batch=8, mesh=told), report(), fsdp=8)
    assert "--mesh.ici-context-parallelism 2 --mesh.ici-fsdp-parallelism -1 --batch 4" in said
    told = MeshConfig(ici_data_parallelism=8, ici_fsdp_parallelism=1)
    said = flags(Compile(batch=8, mesh=told), report(), data=8)
    assert "--mesh.ici-data-parallelism 1 --mesh.ici-fsdp-parallelism -1" in said
    assert "--mesh.ici-context-parallelism 2 --mesh.ici-data-parallelism 4 --batch 4" in said


def test_an_object_says_what_it_is_of():
    """Also where it fits, and then there is nothing to advise."""
    given, mesh = Compile(batch=8, mesh=MeshConfig()), sharding.mesh(fsdp=8)
    found = as_json(given, report(needs=12.0), mesh)
    assert found["advice"] == [] and found["given"]["batch"] == 8
    assert found["given"]["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1, "context": 1}
    assert as_json(given, report(), mesh)["advice"]
    words = told(given, report(), mesh)
    assert words[1].split() == ["needs", "20.00", "GiB", "of", "15.75", "GiB"]
    assert words[2].split() == ["lacks", "4.25", "GiB"]
    assert any("--mesh.ici-context-parallelism 2" in line for line in words)
    with pytest.raises(ValueError, match=r"--save .* wanted them without --search"):
        Compile(search=True, save="program")
