"""Checkpoints go to our format and back in identical files, and mistakes cost one line."""

import errno
import filecmp
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import reference
from jax.sharding import NamedSharding
from safetensors.numpy import load_file

from convert import from_hf, to_hf, verify
from qwen2audio_jax import sharding, weights
from qwen2audio_jax.training import lora, peft
from qwen2audio_jax.training.lora import LoraConfig
from qwen2audio_jax.weights import folder, huggingface, orbax, settings, table

ROOT = pathlib.Path(__file__).resolve().parent.parent
SETTINGS = {  # not what json.dumps writes, so that a rewritten file is seen
    "tokenizer.json": b'{"version":"1.0"  }',
    "vocab.json": b"{}\n\n",
    "README.md": "Größe\r\n".encode(),
    "chat_template.jinja": b"{{ messages }}",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A sharded checkpoint with tokenizer files."""
    path = tmp_path_factory.mktemp("source")
    reference.save(reference.build(reference.SHAPES["one_layer"]), path, max_shard_size="150KB")
    for name, content in SETTINGS.items():
        (path / name).write_bytes(content)
    return path


def assert_same_files(a, b):
    names = sorted(file.name for file in a.iterdir())
    assert names == sorted(file.name for file in b.iterdir())
    assert filecmp.cmpfiles(a, b, names, shallow=False)[0] == names


def convert(program, *args):
    return program.main([*map(str, args), "--quiet"])


def one_line(capsys):
    """The error that was printed, which has to be one line."""
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1
    return text


def test_the_round_trip_gives_identical_files(source, tmp_path):
    """Shards, index, config, tokenizer and all: byte for byte; and ours is whole."""
    ours, back = tmp_path / "ours", tmp_path / "back"
    assert convert(from_hf, source, ours) == 0
    for name in (*SETTINGS, "config.json", "generation_config.json"):
        assert filecmp.cmp(source / name, ours / name, shallow=False)
    assert convert(to_hf, ours, back) == 0
    assert len(huggingface.shards(back)) > 2
    assert_same_files(source, back)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["back", "ours"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shape", ["tied", "odd_widths"])
def test_every_type_and_a_tied_head_come_back(shape, dtype, tmp_path):
    """Single files of each type, with a head that is stored twice."""
    config = reference.SHAPES[shape]
    reference.save(reference.build(config), tmp_path / "wide")
    weights.load(tmp_path / "wide", dtype=from_hf.DTYPES[dtype]).save_pretrained(tmp_path / "a")
    assert convert(from_hf, tmp_path / "a", tmp_path / "ours") == 0
    assert convert(to_hf, tmp_path / "ours", tmp_path / "b") == 0
    assert_same_files(tmp_path / "a", tmp_path / "b")


def test_shards_are_stored_as_devices_hold_them(source, tmp_path, capsys):
    """Each parameter in the mesh's parts, every bit kept; a mesh that does not fit is refused."""
    ours, back = tmp_path / "ours", tmp_path / "back"
    assert convert(from_hf, source, ours, "--shards", 4) == 0
    mesh = sharding.mesh(devices=jax.devices()[:4], fsdp=4)
    stored = orbax.ocp.metadata(ours / folder.CHECKPOINT).metadata
    rows = list(table.entries(settings.read(source)))
    place = lambda row: NamedSharding(mesh, sharding.spec(row.path, row.our_shape, mesh))
    parts = {row.key: place(row).shard_shape(row.our_shape) for row in rows}
    assert {key: x.storage_metadata.chunk_shape for key, x in stored.items()} == parts
    assert sum(parts[row.key] != row.our_shape for row in rows) > len(rows) / 2
    assert convert(to_hf, ours, back) == 0
    assert_same_files(source, back)

    for shards, tensor, message in (
        (4, 2, "599 does not divide by the 2 devices of mesh axis 'tensor'"),
        (0, 1, "got 0 and 1"),
        (4, 3, "got 4 and 3"),
        (99, 1, "wanted at least 99 devices for --shards, got 8"),
    ):
        how = ("--shards", shards, "--mesh.ici-tensor-parallelism", tensor)
        assert convert(from_hf, source, tmp_path / "x", *how) == 2
        assert message in one_line(capsys)
    assert not (tmp_path / "x").exists()


def test_dtype_stores_another_type(source, tmp_path):
    """--dtype rounds what is stored; config.json says so; the way back has a layout of its own."""
    ours, back = tmp_path / "ours", tmp_path / "back"
    assert convert(from_hf, source, ours, "--dtype", "bfloat16") == 0
    assert convert(to_hf, ours, back) == 0
    assert json.loads((back / "config.json").read_text())["dtype"] == "bfloat16"
    config = reference.SHAPES["one_layer"]
    exact, rounded = (huggingface.find(path, config) for path in (source, back))
    for name, tensor in rounded.items():
        expected = exact[name].read().astype(from_hf.DTYPES["bfloat16"])
        np.testing.assert_array_equal(tensor.read(), expected)


def test_a_folder_with_content_needs_overwrite(source, tmp_path, capsys):
    """It stays as it was until then."""
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "precious").write_text("x")
    assert convert(from_hf, source, tmp_path / "ours") == 2
    assert "is not empty; --overwrite replaces it" in one_line(capsys)
    assert [file.name for file in (tmp_path / "ours").iterdir()] == ["precious"]
    assert convert(from_hf, source, tmp_path / "ours", "--overwrite") == 0
    assert not (tmp_path / "ours" / "precious").exists()
    assert convert(to_hf, tmp_path / "ours", tmp_path / "ours" / "config.json") == 2
    assert "wanted a folder to write to" in one_line(capsys)


def test_the_wrong_kind_of_folder_is_refused(source, tmp_path, capsys):
    assert convert(to_hf, source, tmp_path / "x") == 2
    assert "wanted a folder of ours" in one_line(capsys)
    assert convert(from_hf, source, tmp_path / "ours") == 0
    assert convert(from_hf, tmp_path / "ours", tmp_path / "x") == 2
    assert "is a folder of ours already" in one_line(capsys)
    assert convert(from_hf, tmp_path / "nothing", tmp_path / "x") == 2
    assert "nothing" in one_line(capsys)
    assert verify.main([str(tmp_path / "ours")]) == 2
    assert "transformers needs convert.to_hf's" in one_line(capsys)
    assert not (tmp_path / "x").exists()


def test_damage_is_named_before_anything_is_written(source, tmp_path, capsys):
    damaged = shutil.copytree(source, tmp_path / "damaged")
    file = huggingface.shards(damaged)[0]
    os.truncate(file, file.stat().st_size - 8)
    assert convert(from_hf, damaged, tmp_path / "ours") == 2
    assert "is truncated: it ends at byte" in one_line(capsys)
    assert not (tmp_path / "ours").exists()


def test_too_little_room_is_said_with_both_numbers(source, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: usage)
    assert convert(from_hf, source, tmp_path / "ours") == 2
    assert "needs 0.001 GB, its disk has 0.000 GB free" in one_line(capsys)


def test_a_folder_that_cannot_be_made_is_one_line(source, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    assert convert(from_hf, source, tmp_path / "file" / "ours") == 2
    assert "file" in one_line(capsys)

    def refuse(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(pathlib.Path, "mkdir", refuse)
    assert convert(from_hf, source, tmp_path / "ours") == 2
    assert "Permission denied" in one_line(capsys)


def test_a_full_disk_leaves_nothing_behind(source, tmp_path):
    """The system refuses to write on: one line each way, and no half folder."""
    ours = tmp_path / "ours"
    assert convert(from_hf, source, ours) == 0

    full = "trap '' XFSZ; ulimit -f 50; exec \"$@\""  # files of at most 50 KiB
    for program, start in (("convert.from_hf", source), ("convert.to_hf", ours)):
        arguments = [sys.executable, "-m", program, start, tmp_path / "more", "--quiet"]
        command = ["bash", "-c", full, "bash", *arguments]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 2 and run.stdout == ""
        assert len(run.stderr.splitlines()) == 1 and "File too large" in run.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["ours"]


def test_a_killed_conversion_leaves_nothing_that_loads(source, tmp_path):
    """What it had written is hidden, is no model, and the next run clears it away."""
    script = (
        "import sys, time; from convert import from_hf; from qwen2audio_jax.weights import orbax; "
        "write = orbax.write_layout; "
        "orbax.write_layout = lambda *a: (print('written', flush=True), time.sleep(600)); "
        "from_hf.main(sys.argv[1:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, source, tmp_path / "ours", "--quiet"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "written\n"
    process.kill()
    process.communicate()
    assert [file.name for file in tmp_path.iterdir()] == [".ours.partial"]
    with pytest.raises(ValueError, match=r"without config.json"):
        weights.load(tmp_path / ".ours.partial")
    assert convert(from_hf, source, tmp_path / "ours") == 0
    assert [file.name for file in tmp_path.iterdir()] == ["ours"]


def test_large_checkpoints_pass_in_groups(source, tmp_path, monkeypatch):
    """Never more than a group of tensors is held, and all of them arrive."""
    monkeypatch.setattr(orbax, "GROUP_BYTES", 40_000)
    held = []
    save = orbax.ocp.partial.save
    monkeypatch.setattr(
        orbax.ocp.partial,
        "save",
        lambda path, group: (held.append([x.nbytes for x in group.values()]), save(path, group)),
    )
    assert convert(from_hf, source, tmp_path / "ours") == 0
    assert len(held) > 5
    assert all(sum(sizes) <= 40_000 or len(sizes) == 1 for sizes in held)
    assert convert(to_hf, tmp_path / "ours", tmp_path / "back") == 0
    assert_same_files(source, tmp_path / "back")


def test_verify_compares_every_stage(tmp_path, capsys):
    """Equal weights pass; a tolerance that nothing meets gives exit status 1 and says where."""
    config = reference.SHAPES["one_layer"]
    reference.save(reference.build(config), tmp_path)
    assert verify.main([str(tmp_path), "--tokens", "4"]) == 0
    out = capsys.readouterr().out
    for stage in ("conv stem", "encoder layer 0", "pooled states", "decoder layer 0", "logits"):
        assert stage in out
    assert "greedy tokens: equal" in out
    assert verify.main([str(tmp_path), "--tokens", "4", "--tolerance", "0"]) == 1
    assert "OVER 0" in capsys.readouterr().out


def test_verify_says_what_it_lacks(tmp_path, capsys, monkeypatch):
    reference.save(reference.build(reference.SHAPES["one_layer"]), tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert verify.main([str(tmp_path)]) == 2
    assert "pip install -e '.[test]'" in one_line(capsys)


@pytest.fixture(scope="module")
def adapter(source, tmp_path_factory):
    """Of every linear layer, as PEFT writes it: alpha / r is 3."""
    path, model = tmp_path_factory.mktemp("adapter"), weights.load(source)
    config = LoraConfig(r=2, lora_alpha=6, target_modules="all-linear")
    fresh = lora.init(config, model, key=jax.random.key(0))
    noise = lambda x: 0.3 * jax.random.normal(jax.random.key(x.size), x.shape)
    peft.save(path, jax.tree.map(noise, fresh), config, model)
    return path


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_an_adapter_is_added_to_its_base(source, adapter, tmp_path, dtype):
    """W + alpha / r * B A, rounded once; the rest stays, to the bit, and so do names of files. From
    our format it is the same."""
    ours, merged, again = tmp_path / "ours", tmp_path / "merged", tmp_path / "again"
    assert convert(from_hf, source, ours, *(["--dtype", dtype] if dtype else [])) == 0
    base = source
    if dtype:
        base = tmp_path / "base"
        assert convert(to_hf, ours, base) == 0
    for start, end in ((base, merged), (ours, again)):
        assert convert(to_hf, start, end, "--adapter", adapter) == 0
    assert_same_files(merged, again)
    added = load_file(adapter / peft.WEIGHTS)
    matrices = {}
    for key, matrix in added.items():
        name, _, kind = key.removeprefix(peft.PREFIX).partition(".lora_")
        matrices.setdefault(table.on_disk(f"{name}.weight"), {})[kind[0]] = matrix
    sizes = settings.read(base)
    before, after = (huggingface.find(path, sizes) for path in (base, merged))
    assert len(matrices) == 7 + 6 + 1 and before.keys() == after.keys()
    for name, tensor in before.items():
        wanted, got = tensor.read(), after[name].read()
        if name not in matrices:
            np.testing.assert_array_equal(got.view(np.uint8), wanted.view(np.uint8))
            continue
        more = 3 * matrices[name]["B"] @ matrices[name]["A"]
        exact = wanted.astype(np.float32) + more
        assert got.dtype == wanted.dtype and abs(more).max() > 0.1
        bound = {"rtol": 2**-8} if dtype else {"rtol": 1e-6, "atol": 1e-6}
        np.testing.assert_allclose(got.astype(np.float32), exact, **bound)
    names = {file.name for file in base.iterdir()}
    assert names == {file.name for file in merged.iterdir()} and set(SETTINGS) <= names


def test_an_adapter_that_is_none_is_one_line(source, adapter, tmp_path, capsys):
    """And so is one in the place of its base."""
    target = tmp_path / "merged"
    for base, added, told in (
        (source, source, "wanted an adapter in"),
        (source, tmp_path / "absent", "wanted 'tiny', a folder or a hub id"),
        (adapter, adapter, f"wanted a model, got the adapter {adapter}: convert.to_hf BASE DST"),
        ("tiny", adapter, "has no adapters of this model"),
    ):
        assert convert(to_hf, base, target, "--adapter", added) == 2
        assert told in one_line(capsys)
    assert not target.exists()


def test_conversions_need_no_extras():
    """None of what training does."""
    script = (
        "import sys; sys.modules.update(dict.fromkeys(['grain', 'matplotlib', 'tensorboardX'])); "
        "from convert import from_hf, to_hf, verify"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


@pytest.mark.parametrize("program", ["from_hf", "to_hf", "verify"])
def test_help_teaches(program, capsys):
    """A sentence, an example, every option."""
    with pytest.raises(SystemExit) as stop:
        {"from_hf": from_hf, "to_hf": to_hf, "verify": verify}[program].main(["--help"])
    assert stop.value.code == 0
    assert f"python -m convert.{program} " in capsys.readouterr().out


@pytest.mark.slow
def test_the_benchmark_runs_small(tmp_path):
    """Both programs in processes of their own, the bits compared, the files deleted."""
    start = time.perf_counter()
    figures = tmp_path / "figures.json"
    subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.checkpoint", "--preset", "tiny"),
            *("--shards", "4", "--folder", tmp_path, "--json", figures),
        ],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    got = json.loads(figures.read_text())
    assert got["tensors"] == 107 and got["different_tensors"] == [] and got["same_layout"]
    for program in ("from_hf", "to_hf"):
        assert 0 < got[program]["seconds"] < time.perf_counter() - start
        assert 0.05 < got[program]["peak_gib"] < 4
    assert sorted(tmp_path.iterdir()) == [figures, figures.with_suffix(".md")]
