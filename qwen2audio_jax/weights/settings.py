"""config.json and generation_config.json <-> Config.

A key that a file lacks has the value that transformers gives it: `Qwen2Config`'s and
`Qwen2AudioEncoderConfig`'s defaults, which are not all Qwen2-Audio-7B's sizes.
"""

import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from qwen2audio_jax.config import Config, DecoderConfig, EncoderConfig

PATTERNS = ("config.json", "generation_config.json")
ADAPTER = "adapter_config.json"  # which a folder of PEFT's has in their place

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
    if not path.is_file() and (folder / ADAPTER).is_file():
        raise ValueError(
            f"wanted a model, got the adapter {folder}: convert.to_hf BASE DST --adapter {folder} "
            "makes one of it and its base, and training begins with it by --lora.start"
        )
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
        content = _Fields(config.get(section), f"config.json: {section}").content
        for field, wanted in only.items():
            if (value := content.get(field, wanted)) != wanted:
                raise ValueError(
                    f"{section}.{field} {value!r} is not implemented, only {wanted!r} is"
                )
    text = _Fields(config.get("text_config"), "config.json: text_config")
    top, generation = _Fields(config, "config.json"), generation or {}
    decoder = _decoder(text, top.flag("tie_word_embeddings"))
    kinds = text.content.get("layer_types")
    if kinds not in (None, ["full_attention"] * decoder.layers):
        raise ValueError(
            f"text_config.layer_types {kinds!r} is not implemented, only {decoder.layers} times "
            "'full_attention' is"
        )
    told = _Fields(generation, "generation_config.json")
    ends = told.tokens("eos_token_id") or text.tokens("eos_token_id") or top.tokens("eos_token_id")
    if not ends and decoder.vocabulary <= max(Config().end_tokens):
        raise ValueError(
            "wanted an eos_token_id in generation_config.json or config.json, got none in either"
        )
    # the published config.json names no pad token, which is also the one that begins a text
    pads = (told.token("pad_token_id"), text.token("pad_token_id"), text.token("bos_token_id"), 0)
    audio = (top.token("audio_token_index"), top.token("audio_token_id"), 151_646)
    return Config(
        encoder=_encoder(_Fields(config.get("audio_config"), "config.json: audio_config")),
        decoder=decoder,
        audio_token=next(token for token in audio if token is not None),
        pad_token=next(token for token in pads if token is not None),
        end_tokens=ends or Config().end_tokens,
        generation=generation,
    )


class _Fields:
    """The fields of an object, each of the type that it has to have.

    Args:
      content: the object; null has no fields.
      where: the file, and the object's name within it, for messages.
    """

    def __init__(self, content: Any, where: str):
        if not isinstance(content, Mapping | None):
            raise ValueError(f"{where}: wanted an object, got {content!r}")
        self.content, self.where = content or {}, where

    def count(self, field: str, default: int, least: int = 1) -> int:
        return self._get(
            field, default, lambda x: type(x) is int and x >= least, f"{least} or more"
        )

    def number(self, field: str, default: float) -> float:
        good = lambda x: type(x) in (int, float) and 0 < x < math.inf
        return float(self._get(field, default, good, "a number above 0"))

    def flag(self, field: str, default: bool = False) -> bool:
        good = lambda x: x is None or isinstance(x, bool)
        return bool(self._get(field, default, good, "true or false"))

    def token(self, field: str) -> int | None:
        good = lambda x: x is None or (type(x) is int and x >= 0)
        return self._get(field, None, good, "a token id")

    def tokens(self, field: str) -> tuple[int, ...]:
        listed = lambda x: x if isinstance(x, list) else [] if x is None else [x]
        good = lambda x: all(type(token) is int and token >= 0 for token in listed(x))
        return tuple(listed(self._get(field, None, good, "a token id or a list of them")))

    def optional(self, field: str, default: float) -> float:
        return self.number(field, default) if self.given(field) else default

    def given(self, field: str) -> bool:
        """Whether the field is there and not null, where null means that it is not."""
        return self.content.get(field) is not None

    def _get(self, field: str, default: Any, good: Callable[[Any], bool], wanted: str) -> Any:
        if not good(value := self.content.get(field, default)):
            raise ValueError(f"{self.where}.{field}: wanted {wanted}, got {value!r}")
        return value


def _encoder(audio: _Fields) -> EncoderConfig:
    return EncoderConfig(
        layers=audio.count("encoder_layers", 32),
        width=audio.count("d_model", 1280, least=4),  # two wavelengths of sine and cosine
        heads=audio.count("encoder_attention_heads", 20),
        hidden=audio.count("encoder_ffn_dim", 5120),
        mels=audio.count("num_mel_bins", 128),
        positions=audio.count("max_source_positions", 1500),
    )


def _decoder(text: _Fields, tied: bool) -> DecoderConfig:
    width, heads = text.count("hidden_size", 4096), text.count("num_attention_heads", 32)
    stated = text.given("head_dim")
    if not stated and width < 2 * heads:
        raise ValueError(f"{text.where}: hidden_size {width} is too little for {heads} heads")
    # absent is 32 there, null is "as many as query heads"
    all_heads = "num_key_value_heads" in text.content and not text.given("num_key_value_heads")
    return DecoderConfig(
        layers=text.count("num_hidden_layers", 32),
        width=width,
        heads=heads,
        kv_heads=heads if all_heads else text.count("num_key_value_heads", 32),
        head_width=text.count("head_dim", 128, least=2) if stated else width // heads,
        hidden=text.count("intermediate_size", 22016),
        vocabulary=text.count("vocab_size", 151_936),
        positions=text.count("max_position_embeddings", 32_768),
        rope_theta=_theta(text),
        norm_eps=text.number("rms_norm_eps", 1e-6),
        tied=text.flag("tie_word_embeddings", tied) or tied,
    )


def _theta(text: _Fields) -> float:
    """transformers 5 keeps it within `rope_parameters`, earlier ones beside `rope_scaling`."""
    for field in ("rope_scaling", "rope_parameters"):
        rope = _Fields(text.content.get(field), f"{text.where}.{field}")
        kind = rope.content.get("rope_type", rope.content.get("type", "default"))
        if kind != "default":
            raise ValueError(
                f"text_config.{field} of type {kind!r} is not implemented, only 'default' is"
            )
        if "rope_theta" in rope.content:
            return rope.number("rope_theta", 10_000.0)
    return text.number("rope_theta", 10_000.0)


def sampling(folder: pathlib.Path) -> dict[str, Any]:
    """The way to choose tokens that a checkpoint's generation_config.json suggests.

    Returns:
      arguments of `Sampling`; what the file leaves out has the value that transformers gives it.

    Raises:
      ValueError: the file is damaged; the message names the field and its value.
    """
    path = folder / "generation_config.json"
    try:
        told = _Fields(_json(path) if path.is_file() else {}, path.name)
        penalty = told.optional("repetition_penalty", 1.0)
        if not told.flag("do_sample"):
            return {"temperature": 0.0, "repetition_penalty": penalty}
        top_k = told.count("top_k", 50, least=0) if told.given("top_k") else 50
        return {
            "temperature": told.optional("temperature", 1.0),
            "top_k": top_k or None,
            "top_p": told.optional("top_p", 1.0),
            "repetition_penalty": penalty,
        }
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


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
    generation = {
        **config.generation,
        "eos_token_id": list(config.end_tokens),
        "pad_token_id": config.pad_token,
    }
    contents = {"config": describe(config, dtype), "generation_config": generation}
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def _json(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path.name} is not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"wanted an object in {path.name}, got {type(content).__name__}")
    return content
