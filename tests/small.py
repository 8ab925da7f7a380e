"""Models smaller than `tiny`, and prompts for them, for tests of what is inside of a model."""

import dataclasses

import numpy as np
from flax import nnx

from qwen2audio_jax import Config, DecoderConfig, EncoderConfig, look, mel

ENCODER = EncoderConfig(layers=2, width=16, heads=2, hidden=24, mels=8)
DECODER = DecoderConfig(
    layers=2, width=12, heads=4, kv_heads=2, head_width=6, hidden=20, vocabulary=64, positions=256
)
CONFIG = Config(encoder=ENCODER, decoder=DECODER, audio_token=3, pad_token=0, end_tokens=(0, 2))

# the same with widths that eight devices divide
EVEN = dataclasses.replace(
    CONFIG, decoder=dataclasses.replace(DECODER, width=16, head_width=8, hidden=32)
)


def shaken(module: nnx.Module, seed: int = 0) -> nnx.Module:
    """The same module with every parameter random: biases that are zero would hide mistakes."""
    rng = np.random.default_rng(seed)
    for _, parameter in nnx.iter_graph(module):
        if isinstance(parameter, nnx.Param):
            noise = 0.2 * rng.standard_normal(parameter.shape)
            parameter.set_value(parameter.get_value() + noise.astype(parameter.dtype))
    return module


def listed(module: nnx.Module) -> nnx.Module:
    """A copy of a tower, or of a model, that holds its blocks as a list."""
    module = nnx.clone(module)
    for tower in (module.encoder, module.decoder) if hasattr(module, "decoder") else (module,):
        tower.blocks = nnx.List(look.blocks_of(tower.blocks))
    if hasattr(module, "scan_layers"):
        module.scan_layers = False
    return module


def inputs(frames: list[int], *, total: int = 40, length: int = 24, left: bool = False) -> dict:
    """One clip a row, of so many frames out of `total`, amid a few words; `length` tokens a row."""
    words = lambda n: np.random.default_rng(n).integers(6, 64, 2 + n % 3)
    rows = [[5, *[CONFIG.audio_token] * mel.audio_tokens(n), *words(n)] for n in frames]
    batch = {
        "input_ids": np.zeros((len(rows), length), np.int32),
        "attention_mask": np.zeros((len(rows), length), np.int32),
        "input_features": np.full((len(rows), ENCODER.mels, total), -1.0, np.float32),
        "feature_attention_mask": np.zeros((len(rows), total), np.int32),
    }
    for b, (row, n) in enumerate(zip(rows, frames, strict=True)):
        place = slice(length - len(row), None) if left else slice(len(row))
        batch["input_ids"][b, place] = row
        batch["attention_mask"][b, place] = 1
        clip = np.random.default_rng(n).standard_normal((ENCODER.mels, n))
        batch["input_features"][b, :, :n] = clip
        batch["feature_attention_mask"][b, :n] = 1
    return batch
