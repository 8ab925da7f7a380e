"""A small random model in a folder, for tests of what is built around a model."""

import dataclasses
import pathlib

from flax import nnx

from qwen2audio_jax import DecoderConfig, EncoderConfig, Processor, Qwen2Audio, preset
from qwen2audio_jax.data.world import World


def save(folder: pathlib.Path) -> pathlib.Path:
    """Writes a checkpoint whose answers mean nothing; its token ids are those of `tiny`."""
    config = dataclasses.replace(
        preset("tiny"),
        encoder=EncoderConfig(layers=1, width=32, heads=2, hidden=64),
        decoder=DecoderConfig(
            layers=1,
            width=32,
            heads=2,
            kv_heads=1,
            head_width=16,
            hidden=64,
            vocabulary=512,
            positions=2048,
        ),
    )
    World.named("small").write_tokenizer(folder, vocabulary=512)
    Qwen2Audio(config, rngs=nnx.Rngs(0)).save_pretrained(folder)
    Processor.from_pretrained(folder).save_pretrained(folder)
    return folder
