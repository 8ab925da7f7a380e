"""config.json and generation_config.json <-> Config.

A key that a file lacks has the value that transformers gives it: `Qwen2Config`'s and
`Qwen2AudioEncoderConfig`'s defaults, which are not all Qwen2-Audio-7B's sizes.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from qwen2audio_jax.config import Config, DecoderConfig, EncoderConfig

# What these fields must say where they are there: nothing else is implemented.
ONLY = {
    "audio_config": {"activation_function": "gelu", "scale_embedding": False},
    "text_config": {"hidden_act": "silu", "use_sliding_window": False, "use_mrope": False},
}


def read(folder: pathlib.Path) -> Config:
    """The sizes and token ids of the checkpoint in `folder`.

    Raises:
      ValueError: there is no config.json, it is no Qwen2-Audio's, or it asks for something that
        is not implemented; the message names the field and its value.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"wanted a checkpoint in {folder}, got a folder without config.json")
    generation = folder / "generation_config.json"
    try:
        return parse(_json(path), _json(generation) if generation.is_file() else {})
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def parse(config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> Config:
    """Reads the contents of config.json and generation_config.json."""
    if (kind := config.get("model_type")) != "qwen2_audio":
        raise ValueError(f"wanted model_type 'qwen2_audio' in config.json, got {kind!r}")
    for section, only in ONLY.items():
        for field, wanted in only.items():
            if (value := _section(config, section).get(field, wanted)) != wanted:
                raise ValueError(
                    f"{section}.{field} {value!r} is not implemented, only {wanted!r} is"
                )
    text, generation = _section(config, "text_config"), generation or {}
    for kind in text.get("layer_types") or ():
        if kind != "full_attention":
            raise ValueError(f"text_config.layer_types {kind!r} is not implemented")
    decoder = _decoder(text, bool(config.get("tie_word_embeddings")))
    end = _first("eos_token_id", generation, text, config)
    ends = tuple(end) if isinstance(end, list) else () if end is None else (end,)
    # the published config.json names no pad token, which is also the one that begins a text
    pad = _first("pad_token_id", generation, text, {"pad_token_id": text.get("bos_token_id", 0)})
    audio = _first("audio_token_index", config, {"audio_token_index": config.get("audio_token_id")})
    return Config(
        encoder=_encoder(_section(config, "audio_config")),
        decoder=decoder,
        audio_token=151_646 if audio is None else audio,
        pad_token=0 if pad is None else pad,
        end_tokens=ends,
    )


def _encoder(audio: Mapping[str, Any]) -> EncoderConfig:
    return EncoderConfig(
        layers=audio.get("encoder_layers", 32),
        width=audio.get("d_model", 1280),
        heads=audio.get("encoder_attention_heads", 20),
        hidden=audio.get("encoder_ffn_dim", 5120),
        mels=audio.get("num_mel_bins", 128),
        positions=audio.get("max_source_positions", 1500),
    )


def _decoder(text: Mapping[str, Any], tied: bool) -> DecoderConfig:
    width, heads = text.get("hidden_size", 4096), text.get("num_attention_heads", 32)
    return DecoderConfig(
        layers=text.get("num_hidden_layers", 32),
        width=width,
        heads=heads,
        # absent is 32 there, null is "as many as query heads"
        kv_heads=text.get("num_key_value_heads", 32) or heads,
        head_width=text.get("head_dim") or width // heads,
        hidden=text.get("intermediate_size", 22016),
        vocabulary=text.get("vocab_size", 151_936),
        positions=text.get("max_position_embeddings", 32_768),
        rope_theta=_theta(text),
        norm_eps=text.get("rms_norm_eps", 1e-6),
        tied=tied or bool(text.get("tie_word_embeddings", False)),
    )


def _theta(text: Mapping[str, Any]) -> float:
    """transformers 5 keeps it within `rope_parameters`, earlier ones beside `rope_scaling`."""
    for field in ("rope_scaling", "rope_parameters"):
        rope = text.get(field) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ValueError(
                f"text_config.{field} of type {kind!r} is not implemented, only 'default' is"
            )
        if "rope_theta" in rope:
            return float(rope["rope_theta"])
    return float(text.get("rope_theta", 10_000.0))


def describe(config: Config, dtype: str = "float32") -> dict[str, Any]:
    """The contents of a config.json that transformers, old and new, reads as `config`."""
    e, d = config.encoder, config.decoder
    return {
        "architectures": ["Qwen2AudioForConditionalGeneration"],
        "model_type": "qwen2_audio",
        "audio_token_index": config.audio_token,
        "torch_dtype": dtype,
        "audio_config": {
            "model_type": "qwen2_audio_encoder",
            "encoder_layers": e.layers,
            "d_model": e.width,
            "encoder_attention_heads": e.heads,
            "encoder_ffn_dim": e.hidden,
            "num_mel_bins": e.mels,
            "max_source_positions": e.positions,
            **ONLY["audio_config"],
        },
        "text_config": {
            "model_type": "qwen2",
            "num_hidden_layers": d.layers,
            "hidden_size": d.width,
            "num_attention_heads": d.heads,
            "num_key_value_heads": d.kv_heads,
            "head_dim": d.head_width,
            "intermediate_size": d.hidden,
            "vocab_size": d.vocabulary,
            "max_position_embeddings": d.positions,
            "rope_theta": d.rope_theta,
            "rms_norm_eps": d.norm_eps,
            "tie_word_embeddings": d.tied,
            "pad_token_id": config.pad_token,
            "hidden_act": "silu",
            "use_sliding_window": False,
        },
    }


def write(config: Config, folder: pathlib.Path, dtype: str = "float32") -> None:
    """Writes config.json and generation_config.json."""
    generation = {"eos_token_id": list(config.end_tokens), "pad_token_id": config.pad_token}
    contents = {"config": describe(config, dtype), "generation_config": generation}
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return config.get(name) or {}


def _first(field: str, *places: Mapping[str, Any]) -> Any:
    return next((p[field] for p in places if p.get(field) is not None), None)


def _json(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path.name} is not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"wanted an object in {path.name}, got {type(content).__name__}")
    return content
