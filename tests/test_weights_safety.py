"""Nothing wrong is saved, read or replaced in silence, and what was there is not lost."""

import dataclasses
import functools
import json
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import small
from flax import nnx

from convert import from_hf
from qwen2audio_jax import sharding, weights
from qwen2audio_jax.weights import folder, huggingface, settings

BIAS = "multi_modal_projector.linear.bias"


CONFIG = dataclasses.replace(
    small.CONFIG,
    encoder=dataclasses.replace(small.ENCODER, layers=1),
    decoder=dataclasses.replace(small.DECODER, layers=1),
)


@functools.cache
def model_of(value, scan_layers=False):
    """A model of one value."""

    def read(keys, shape, dtype, place):
        part = lambda index: np.full(shape, value, dtype)[index]
        return [jax.make_array_from_callback(shape, place, part) for _ in keys]

    how = {"dtype": np.float32, "mesh": None, "scan_layers": scan_layers, "progress": False}
    return weights.fill(CONFIG, read, **how)


def value_in(path):
    assert settings.read(path) == CONFIG
    return float(huggingface.find(path, CONFIG)[BIAS].read()[0])


@pytest.fixture
def saved(tmp_path):
    model_of(1).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def ours(saved, tmp_path):
    """What is known of a folder of ours before its weights are looked at."""
    (tmp_path / "ours" / "checkpoint").mkdir(parents=True)
    shutil.copy(saved / "config.json", tmp_path / "ours")
    return tmp_path / "ours"


# Saving over something


def test_old_shards_do_not_outlive_a_save(tmp_path, monkeypatch):
    """Many files, then one, then many again: what was saved last is read; other files stay."""
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 10_000)
    model_of(1).save_pretrained(tmp_path)
    many = {file.name for file in tmp_path.iterdir()}
    assert len(many) > 5
    for name in ("tokenizer.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text("{}")
    monkeypatch.undo()
    model_of(2).save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "adapter_model.safetensors"),
    }
    assert value_in(tmp_path) == 2
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 10_000)
    model_of(3).save_pretrained(tmp_path)
    assert not (tmp_path / huggingface.SINGLE).exists()
    assert value_in(tmp_path) == 3


def test_a_single_file_wins_over_an_index(saved, tmp_path, monkeypatch):
    """As in transformers; a conversion carries the same file."""
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 10_000)
    model_of(2).save_pretrained(tmp_path / "both")
    (tmp_path / "both" / huggingface.SINGLE).write_bytes((saved / huggingface.SINGLE).read_bytes())
    assert value_in(tmp_path / "both") == 1
    layout = huggingface.layout(tmp_path / "both")
    assert list(layout.headers) == [huggingface.SINGLE] and layout.index is None


def test_a_folder_of_ours_is_not_saved_into(ours):
    with pytest.raises(ValueError, match=r"is a folder of ours.*name another"):
        model_of(2).save_pretrained(ours)
    assert not (ours / huggingface.SINGLE).exists()


def test_a_failed_save_leaves_the_old_model(saved, monkeypatch):
    before = {file.name: file.read_bytes() for file in saved.iterdir()}

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left"):
        model_of(2).save_pretrained(saved)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before


@pytest.mark.parametrize("moves", range(3))
def test_a_save_that_is_killed_is_new_or_refused(saved, moves, monkeypatch):
    """Killed after so many files have moved up, it is no mixture; the next save mends it."""
    replace, left = pathlib.Path.replace, [moves]

    def killed(self, target):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return replace(self, target)

    monkeypatch.setattr(pathlib.Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        model_of(2).save_pretrained(saved)
    with pytest.raises(ValueError, match=r"without config.json"):
        weights.load(saved)
    monkeypatch.undo()
    model_of(3).save_pretrained(saved)
    assert value_in(saved) == 3 and not (saved / ".partial").exists()


@pytest.mark.parametrize("scan_layers", [True, False])
def test_parameters_of_several_types_keep_their_bits(scan_layers, tmp_path):
    """Each is stored in its own type, whatever the others are."""
    model = nnx.clone(model_of(1, scan_layers))
    kernel = model.projector.kernel
    kernel.set_value(kernel.get_value().astype(jnp.bfloat16))
    model.save_pretrained(tmp_path)
    found = huggingface.find(tmp_path, CONFIG)
    stored = found["multi_modal_projector.linear.weight"]
    assert stored.dtype == ml_dtypes.bfloat16 and found[BIAS].dtype == np.float32
    np.testing.assert_array_equal(stored.read().T, np.asarray(kernel.get_value()))
    kernel.set_value(kernel.get_value().astype(jnp.int8))
    with pytest.raises(ValueError, match=r"float32, got .*projector.linear.weight of int8"):
        model.save_pretrained(tmp_path)


def test_a_tensor_that_differs_from_its_header_is_not_written(tmp_path):
    layout = huggingface.plan([(BIAS, np.dtype(np.float32), (2,))])
    for wrong in (np.zeros(2, np.float16), np.zeros(3, np.float32)):
        with pytest.raises(ValueError, match=rf"{BIAS}: wanted \('F32', \(2,\)\) as in the header"):
            huggingface.write(tmp_path, layout, lambda name, wrong=wrong: wrong, lambda n: None)


# Reading


def test_bytes_that_belong_to_no_tensor_or_two_are_refused(saved):
    file = saved / huggingface.SINGLE
    whole, (raw, header) = file.read_bytes(), huggingface.header(file)
    file.write_bytes(whole + b"more")
    with pytest.raises(ValueError, match=r"has 4 bytes of data that belong to no tensor"):
        weights.load(saved)

    def moved(begin, end):
        header[BIAS]["data_offsets"] = [begin, end]
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + whole[len(raw) :])

    begin, end = header[BIAS]["data_offsets"]
    moved(begin - 4, end - 4)
    with pytest.raises(ValueError, match=r"4 bytes of data that belong to two tensors") as error:
        weights.load(saved)
    assert "4 bytes of data that belong to no tensor" in str(error.value)
    moved(-4, end)
    with pytest.raises(ValueError, match=rf"damaged header: .*{BIAS} has shape"):
        weights.load(saved)


@pytest.mark.parametrize(
    "dtype", ["bf16", "int32", "float8_e4m3fn", jnp.float8_e5m2, float, 3, object()]
)
def test_a_type_that_models_do_not_have_is_one_line(saved, dtype):
    with pytest.raises(ValueError, match=r"wanted dtype bfloat16 or float16 or float32, got"):
        weights.load(saved, dtype=dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", np.float16, jnp.dtype("float32"), jnp.bfloat16])
def test_types_go_by_any_name(saved, dtype):
    assert weights.load(saved, dtype=dtype).dtype == jnp.dtype(dtype)


def test_a_mesh_that_cannot_hold_the_model_is_refused(saved, monkeypatch):
    """Before anything is read."""
    monkeypatch.setattr(weights, "_theirs", None)
    auto, explicit = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit
    for shape, names, kind, message in (
        ((2, 4), ("fsdp", "tensor"), explicit, r"wanted a mesh of AxisType.Auto.*sharding.mesh"),
        ((2, 4), ("data", "model"), auto, r"no mesh axis model; there are data, fsdp"),
        ((1, 8), ("fsdp", "tensor"), auto, r"dimension of 2 does not divide by the 8 devices"),
    ):
        mesh = jax.make_mesh(shape, names, axis_types=(kind,) * 2)
        with pytest.raises(ValueError, match=message):
            weights.load(saved, mesh=mesh)


def test_key_value_heads_that_do_not_divide_are_on_every_device():
    mesh = sharding.mesh(fsdp=2, tensor=4)
    spec = lambda *shape: tuple(sharding.spec("decoder.blocks.attention.key.kernel", shape, mesh))
    assert spec(12, 2, 6) == ("fsdp", None, None)
    assert spec(12, 4, 6) == ("fsdp", "tensor", None)


# Converting over something


def convert(capsys, program, *args):
    """What a program that has to fail says, in one line."""
    assert program.main([*map(str, args), "--quiet"]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1
    return text


def test_a_source_is_never_overwritten(saved, ours, tmp_path, capsys):
    """By itself, by what is in it or around it, or through a link."""
    (tmp_path / "link").symlink_to(saved)
    for target in (saved, saved / "inside", tmp_path, tmp_path / "link"):
        assert "apart from" in convert(capsys, from_hf, saved, target, "--overwrite")
    assert value_in(saved) == 1 and weights.is_ours(ours)


def test_what_cannot_be_replaced_is_known_before_the_work(saved, ours, monkeypatch, capsys):
    monkeypatch.setattr(os.path, "ismount", lambda path: path == ours)
    assert "is a mount point" in convert(capsys, from_hf, saved, ours, "--overwrite")
    monkeypatch.undo()
    mkdir = pathlib.Path.mkdir

    def refuse(self, *args, **kwargs):
        if self.name == ".ours.partial":
            raise PermissionError(13, "Permission denied", str(self))
        mkdir(self, *args, **kwargs)

    monkeypatch.setattr(pathlib.Path, "mkdir", refuse)
    line = convert(capsys, from_hf, saved, ours, "--overwrite")
    assert "cannot write beside" in line and "Permission denied" in line
    assert weights.is_ours(ours)


def test_a_failed_renaming_puts_the_old_folder_back(tmp_path, monkeypatch):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "old").touch()
    rename = pathlib.Path.rename

    def refuse(self, target):
        if self.name == ".target.partial":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", refuse)
    with (
        pytest.raises(OSError, match=r"Input/output"),
        folder.fresh(tmp_path / "target", 1, source=tmp_path / "source", overwrite=True),
    ):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["target"]
    assert (tmp_path / "target" / "old").exists()


def test_a_run_that_was_killed_between_two_renames_loses_nothing(tmp_path):
    """The next one puts the old folder back before it looks at anything else."""
    (tmp_path / ".target.old").mkdir()
    (tmp_path / ".target.old" / "old").touch()
    with (
        pytest.raises(ValueError, match=r"target is not empty"),
        folder.fresh(tmp_path / "target", 1, source=tmp_path / "source", overwrite=False),
    ):
        pass
    assert (tmp_path / "target" / "old").exists()
