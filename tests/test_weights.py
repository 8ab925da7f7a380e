"""Checkpoints are read whole or refused by name, and come back bit for bit."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference
import safetensors.numpy
import torch
import transformers
from flax import nnx

from qwen2audio_jax import weights
from qwen2audio_jax.config import PRESETS, preset
from qwen2audio_jax.model import Qwen2Audio
from qwen2audio_jax.weights import conversion, huggingface, settings, table

SHAPE = reference.SHAPES["one_layer"]
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """torch's model, and the folder that transformers wrote it to."""
    model = reference.build(SHAPE)
    return model, reference.save(model, tmp_path_factory.mktemp("saved"))


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of that folder, to be damaged."""
    return shutil.copytree(saved[1], tmp_path / "copy")


def tensors_of(folder):
    return safetensors.numpy.load_file(folder / huggingface.SINGLE)


def rewrite(folder, tensors):
    safetensors.numpy.save_file(tensors, folder / huggingface.SINGLE, {"format": "pt"})


def bits_of(model):
    """Every parameter's bits by its key, however the layers are held."""
    result = {}
    for path, x in jax.tree_util.tree_flatten_with_path(nnx.state(model, nnx.Param))[0]:
        name, layer = table.split(path)
        stacked = "blocks" in name and layer is None
        for i, each in enumerate(x) if stacked else [(layer, x)]:
            result[table.key(name, i)] = np.asarray(each).tobytes()
    return result


# The table


def shapes_of(config, **how):
    model = nnx.eval_shape(lambda: Qwen2Audio(config, rngs=nnx.Rngs(0), **how))
    leaves = jax.tree_util.tree_flatten_with_path(nnx.state(model))[0]
    return {table.key(*table.split(path)): leaf.shape for path, leaf in leaves}


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_the_table_has_every_parameter_once(name):
    """Each parameter of a scanned model has its rows, whose right-hand axes give its shape."""
    config, rows = preset(name), list(table.entries(preset(name)))
    layers = {"encoder": config.encoder.layers, "decoder": config.decoder.layers}
    stacked = lambda row: () if row.layer is None else (layers[row.path.partition(".")[0]],)
    assert {row.path: stacked(row) + row.our_shape for row in rows} == shapes_of(config)
    assert len({row.name for row in rows}) == len(rows)


@pytest.mark.parametrize("shape", reference.SHAPES)
def test_the_table_has_every_layer_once(shape):
    """A list of blocks has one parameter for each row."""
    rows = list(table.entries(reference.SHAPES[shape]))
    ours = shapes_of(reference.SHAPES[shape], scan_layers=False)
    assert {row.key: row.our_shape for row in rows} == ours
    assert len({row.name for row in rows}) == len(rows) == len(ours)


def test_the_table_has_the_published_names_and_shapes(shared_data):
    """876 tensors, 8 397 094 912 parameters, as in the checkpoint's own index."""
    text = (shared_data / "qwen2_audio_configs" / "tensor_shapes.json").read_text()
    rows = list(table.entries(preset("qwen2-audio-7b")))
    assert {row.name: list(row.their_shape) for row in rows} == json.loads(text)
    assert (len(rows), sum(row.count for row in rows)) == (876, 8_397_094_912)


@pytest.mark.parametrize("shape", reference.SHAPES)
def test_rows_read_backwards_undo_themselves(shape):
    """Import then export gives the same numbers in the same places."""
    for row in table.entries(reference.SHAPES[shape]):
        x = np.arange(row.count).reshape(row.their_shape)
        assert row.to_ours(x).shape == row.our_shape
        np.testing.assert_array_equal(row.to_theirs(row.to_ours(x)), x)


# Settings


def test_the_published_config_is_the_preset(shared_data):
    """Absent keys have transformers' defaults; generation_config gives pad and end."""
    configs = shared_data / "qwen2_audio_configs"
    read = lambda name: json.loads((configs / name).read_text())
    got = settings.parse(read("config.json"), read("generation_config.partial.json"))
    assert got == preset("qwen2-audio-7b")


@pytest.mark.parametrize("shape", reference.SHAPES)
def test_transformers_reads_the_config_as_we_do(shape):
    """What we describe, read and written again by transformers, is what we meant."""
    config = reference.SHAPES[shape]
    theirs = transformers.Qwen2AudioConfig(**settings.describe(config)).to_dict()
    assert "rope_parameters" in theirs["text_config"]
    generation = {"eos_token_id": list(config.end_tokens)}
    assert settings.parse(theirs, generation) == config


def test_an_empty_config_is_transformers_default():
    """Nothing stated: Qwen2Config's and Qwen2AudioEncoderConfig's own sizes."""
    config = settings.parse({"model_type": "qwen2_audio"})
    text, audio = transformers.Qwen2Config(), transformers.Qwen2AudioConfig().audio_config
    d, e = config.decoder, config.encoder
    assert (d.width, d.layers, d.heads, d.kv_heads) == (
        text.hidden_size,
        text.num_hidden_layers,
        text.num_attention_heads,
        text.num_key_value_heads,
    )
    assert (d.hidden, d.vocabulary) == (text.intermediate_size, text.vocab_size)
    assert (d.positions, d.norm_eps) == (text.max_position_embeddings, text.rms_norm_eps)
    assert d.rope_theta == text.rope_parameters["rope_theta"]
    assert (e.layers, e.width, e.hidden) == (
        audio.encoder_layers,
        audio.d_model,
        audio.encoder_ffn_dim,
    )


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("text_config", "use_sliding_window", True),
        ("text_config", "hidden_act", "gelu"),
        ("text_config", "rope_scaling", {"type": "yarn", "factor": 4.0}),
        ("text_config", "rope_parameters", {"rope_type": "dynamic", "rope_theta": 1e4}),
        ("text_config", "layer_types", ["full_attention", "sliding_attention"]),
        ("audio_config", "activation_function", "relu"),
        ("audio_config", "scale_embedding", True),
    ],
)
def test_what_is_not_implemented_is_refused(section, field, value):
    """One line that names the field and its value."""
    with pytest.raises(ValueError, match=rf"{section}.{field}.*not implemented") as error:
        settings.parse({"model_type": "qwen2_audio", section: {field: value}})
    assert "\n" not in str(error.value)


def test_another_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"without config.json"):
        settings.read(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"wanted model_type 'qwen2_audio'.*got 'llama'"):
        settings.read(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match=r"not readable as JSON"):
        settings.read(tmp_path)


# Reading and writing


@pytest.mark.parametrize("shape", ["one_layer", "tied", "six_layers"])
def test_transformers_loads_what_is_saved(shape, tmp_path):
    """Every tensor that transformers then has is the one it had before."""
    theirs = reference.build(reference.SHAPES[shape])
    reference.save(theirs, tmp_path / "a")
    weights.load(tmp_path / "a", scan_layers=True).save_pretrained(tmp_path / "b")
    again, info = type(theirs).from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not any(info.values())
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert again.generation_config.eos_token_id == list(reference.SHAPES[shape].end_tokens)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scan_layers", [True, False])
def test_saving_and_loading_keep_every_bit(saved, dtype, scan_layers, tmp_path):
    """In each type, from either form to either form."""
    model = weights.load(saved[1], dtype=DTYPES[dtype], scan_layers=scan_layers)
    assert model.dtype == DTYPES[dtype]
    model.save_pretrained(tmp_path)
    again = weights.load(tmp_path, dtype=DTYPES[dtype], scan_layers=not scan_layers)
    assert bits_of(again) == bits_of(model)


def test_names_in_memory_and_shards_are_read(saved, tmp_path):
    """transformers 5's own names, and an index with shards, give the same model."""
    expected = bits_of(weights.load(saved[1]))
    for file in ("config.json", "generation_config.json"):
        shutil.copy(saved[1] / file, tmp_path)
    rewrite(tmp_path, {name: t.numpy() for name, t in saved[0].state_dict().items()})
    assert "lm_head.weight" in tensors_of(tmp_path)
    assert bits_of(weights.load(tmp_path)) == expected
    sharded = reference.save(saved[0], tmp_path / "sharded", max_shard_size="100KB")
    assert len(huggingface.shards(sharded)) > 2
    assert bits_of(weights.load(sharded)) == expected


def test_a_large_model_is_saved_in_shards(saved, tmp_path, monkeypatch):
    """Over the limit there is an index, which transformers reads; the published size has five."""
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 100_000)
    weights.load(saved[1]).save_pretrained(tmp_path, progress=True)
    assert (tmp_path / huggingface.INDEX).is_file()
    again = type(saved[0]).from_pretrained(tmp_path)
    for name, tensor in saved[0].state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    monkeypatch.undo()
    rows = table.entries(preset("qwen2-audio-7b"))
    half = np.dtype(ml_dtypes.bfloat16)
    assert len(huggingface.plan((row.name, half, row.their_shape) for row in rows).headers) == 5


def test_the_default_type_on_a_cpu_is_float32(saved, tmp_path):
    weights.load(saved[1], dtype=jnp.bfloat16).save_pretrained(tmp_path)
    assert weights.load(tmp_path).dtype == jnp.float32


def test_a_tied_head_may_be_stored_if_it_is_the_embedding(tmp_path):
    """It may be absent, as in Qwen2's own checkpoints, but it may not differ."""
    reference.save(reference.build(reference.SHAPES["tied"]), tmp_path)
    expected = bits_of(weights.load(tmp_path))
    tensors = tensors_of(tmp_path)
    rewrite(tmp_path, {name: x for name, x in tensors.items() if name != table.HEAD})
    assert bits_of(weights.load(tmp_path)) == expected
    rewrite(tmp_path, tensors | {table.HEAD: tensors[table.HEAD] + 1})
    with pytest.raises(ValueError, match=r"ties .*lm_head.* but they differ"):
        weights.load(tmp_path)


# What is refused


def test_one_error_names_all_that_is_wrong(folder):
    """Unknown, missing, mis-shaped, mistyped and truncated tensors at once."""
    tensors = tensors_of(folder)
    tensors["audio_tower.surplus"] = np.zeros(3, np.float32)
    tensors["zebra"] = np.zeros(3, np.int32)
    del tensors["audio_tower.conv1.bias"]
    norm = "language_model.model.norm.weight"
    tensors[norm] = tensors[norm][:-1].copy()
    rewrite(folder, tensors)
    file = folder / huggingface.SINGLE
    _, header = huggingface.header(file)
    last = max((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
    with file.open("r+b") as f:
        f.truncate(file.stat().st_size - 4)
    with pytest.raises(ValueError, match=r"is no whole model") as error:
        weights.load(folder)
    message = str(error.value)
    assert "audio_tower.surplus is unknown" in message
    assert "zebra is I32, wanted one of BF16, F16, F32" in message
    assert "audio_tower.conv1.bias is missing" in message
    assert f"{norm} has shape (55,), wanted (56,)" in message
    assert f"{last} is truncated" in message
    assert "\n" not in message


def test_damaged_headers_and_indices_are_refused(saved, folder, tmp_path):
    file = folder / huggingface.SINGLE
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"truncated or no safetensors file: 100 bytes"):
        weights.load(folder)
    file.write_bytes((8).to_bytes(8, "little") + b"{nothing" + bytes(64))
    with pytest.raises(ValueError, match=r"damaged header"):
        weights.load(folder)
    file.unlink()
    with pytest.raises(ValueError, match=r"wanted model.safetensors or .*got neither"):
        weights.load(folder)
    sharded = reference.save(saved[0], tmp_path / "sharded", max_shard_size="100KB")
    gone = huggingface.shards(sharded)[1]
    gone.unlink()
    with pytest.raises(ValueError, match=rf"shards that are not there: {gone.name}"):
        weights.load(sharded)
    (sharded / huggingface.INDEX).write_text('{"weight_map": 3}')
    with pytest.raises(ValueError, match=r"damaged index"):
        weights.load(sharded)


# Our own folders


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_our_folder_gives_the_same_model(saved, scan_layers, dtype, tmp_path):
    """Loaded from Orbax or from safetensors, in either type and form."""
    conversion.from_huggingface(saved[1], tmp_path / "ours")
    how = {"dtype": dtype, "scan_layers": scan_layers}
    assert bits_of(weights.load(tmp_path / "ours", **how)) == bits_of(weights.load(saved[1], **how))


def test_a_damaged_folder_of_ours_is_refused(saved, tmp_path):
    """Other sizes than the config's, or a checkpoint with a file gone: one line, no stack trace."""
    ours = tmp_path / "ours"
    conversion.from_huggingface(saved[1], ours)
    config = json.loads((ours / "config.json").read_text())
    config["text_config"]["intermediate_size"] += 2
    config["audio_config"]["encoder_layers"] += 1
    text = (ours / "config.json").read_text()
    (ours / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"is no whole model") as error:
        weights.load(ours)
    assert "encoder.blocks.1.up.kernel is missing" in str(error.value)
    assert "mlp.down.kernel has shape (88, 56), wanted (90, 56)" in str(error.value)
    (ours / "config.json").write_text(text)
    (ours / "checkpoint" / "state" / "_METADATA").unlink()
    with pytest.raises(ValueError, match=r"damaged checkpoint"):
        weights.load(ours)
