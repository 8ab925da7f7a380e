"""Settings are read as transformers reads them, or refused in one line that names the field."""

import json

import pytest
import small

from qwen2audio_jax import Config, Sampling
from qwen2audio_jax.weights import settings

SUGGESTED = {  # what the published checkpoint says, and a field that we have no use for
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.5,
    "repetition_penalty": 1.1,
    "transformers_version": "4.38.1",
}


def parse(field, value, generation=None):
    """Reads a config.json with one thing in it, at `section.field`."""
    config = {"model_type": "qwen2_audio"}
    section, _, name = field.rpartition(".")
    (config.setdefault(section, {}) if section else config)[name] = value
    return settings.parse(config, generation)


def write(folder, **generation):
    (folder / "generation_config.json").write_text(json.dumps(generation))


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("text_config", ["x", 3, [], True]),
        ("audio_config", ["x", [1]]),
        ("text_config.num_attention_heads", [0, -1, None, "32", [32], 32.0, True, {}]),
        ("text_config.num_key_value_heads", [0, -2, "2", 1.5]),
        ("text_config.num_hidden_layers", [0, None, "4"]),
        ("text_config.hidden_size", [None, "4096", -4096, 16]),
        ("text_config.head_dim", [0, 1, "64", -8]),
        ("text_config.intermediate_size", [0, None]),
        ("text_config.vocab_size", [None, "512", 0]),
        ("text_config.max_position_embeddings", [None, 0, "8192"]),
        ("text_config.rms_norm_eps", ["1e-6", None, 0, -1e-6, float("nan"), [1e-6]]),
        ("text_config.rope_theta", [None, "10000", 0, float("inf")]),
        ("text_config.rope_scaling", ["x", 3, ["yarn"]]),
        ("text_config.rope_parameters", ["x", 3]),
        ("text_config.layer_types", ["x", 3, [["full_attention"]]]),
        ("text_config.tie_word_embeddings", ["yes", 1]),
        ("tie_word_embeddings", ["no", 0]),
        ("audio_config.d_model", [2, None, "1280"]),
        ("audio_config.encoder_attention_heads", [0, None, "20"]),
        ("audio_config.encoder_layers", [0, None]),
        ("audio_config.encoder_ffn_dim", ["5120", -1]),
        ("audio_config.num_mel_bins", [0, None, [128]]),
        ("audio_config.max_source_positions", [0, None]),
        ("audio_token_index", ["3", -1, 1.5, [3]]),
        ("text_config.pad_token_id", ["0", -1]),
        ("text_config.eos_token_id", ["2", [1, "2"], -1, {}]),
    ],
)
def test_a_value_that_cannot_be_is_one_line(field, values):
    """With the field, and the value as it was."""
    for value in values:
        with pytest.raises(ValueError, match=field.rpartition(".")[2]) as error:
            parse(field, value)
        message = str(error.value)
        assert field.partition(".")[0] in message and "\n" not in message
        assert repr(value) in message


@pytest.mark.parametrize("value", [None, "1e4", 0])
def test_an_object_within_an_object_is_named(value):
    with pytest.raises(ValueError, match=rf"rope_parameters.rope_theta: .*got {value!r}"):
        parse("text_config.rope_parameters", {"rope_theta": value})


def test_a_file_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_audio", "text_config": "x"}')
    with pytest.raises(ValueError, match=r"config.json: text_config: wanted an object, got 'x'"):
        settings.read(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_audio"}')
    write(tmp_path, eos_token_id="end")
    with pytest.raises(ValueError, match=r"generation_config.json.eos_token_id: wanted a token id"):
        settings.read(tmp_path)


def test_null_has_the_meaning_that_transformers_gives_it():
    for field in ("text_config", "audio_config", "text_config.rope_scaling", "audio_token_index"):
        assert parse(field, None) == settings.parse({"model_type": "qwen2_audio"})
    config = {"num_attention_heads": 16, "num_key_value_heads": None, "head_dim": None}
    decoder = settings.parse({"model_type": "qwen2_audio", "text_config": config}).decoder
    assert (decoder.kv_heads, decoder.head_width) == (16, 256)


def test_answers_always_have_an_end():
    """Where no file names an end token the published ones hold, if the vocabulary has them."""
    assert settings.parse({"model_type": "qwen2_audio"}).end_tokens == Config().end_tokens
    assert parse("eos_token_id", 7, {"eos_token_id": []}).end_tokens == (7,)
    with pytest.raises(ValueError, match=r"wanted an eos_token_id in generation_config.json or"):
        settings.parse({"model_type": "qwen2_audio", "text_config": {"vocab_size": 512}})


def test_what_a_checkpoint_suggests_survives(tmp_path):
    """Every field of generation_config.json is there after reading and writing."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    settings.write(small.CONFIG, tmp_path / "a")
    ends = {"eos_token_id": [0, 2], "pad_token_id": 0}
    write(tmp_path / "a", **SUGGESTED, **ends)
    settings.write(settings.read(tmp_path / "a"), tmp_path / "b")
    assert json.loads((tmp_path / "b" / "generation_config.json").read_text()) == SUGGESTED | ends


def test_what_a_checkpoint_suggests_can_be_used(tmp_path):
    """With transformers' defaults for what is left out: greedy, and 50 best tokens if sampled."""
    suggested = lambda **how: (write(tmp_path, **how), Sampling.from_pretrained(tmp_path))[1]
    assert suggested(**SUGGESTED) == Sampling(
        temperature=0.7, top_k=20, top_p=0.5, repetition_penalty=1.1
    )
    greedy = suggested(**SUGGESTED | {"do_sample": False})
    assert greedy == Sampling(temperature=0.0, repetition_penalty=1.1)
    assert suggested() == Sampling(temperature=0.0)
    assert suggested(do_sample=True, top_p=None) == Sampling(top_k=50, top_p=1.0)
    assert suggested(do_sample=True, top_k=0) == Sampling(top_k=None, top_p=1.0)
    with pytest.raises(ValueError, match=r"generation_config.json.temperature: .*got 'hot'"):
        suggested(do_sample=True, temperature="hot")
    with pytest.raises(ValueError, match=r"top_p must be .* at most 1, got 2.0"):
        suggested(do_sample=True, top_p=2)
