"""The oracle: tiny random Qwen2-Audio models of transformers, no download.

`SHAPES` are the sizes that parity is shown on; `build` makes torch's model of one of them and
`save` writes it as transformers writes it.
"""

import pathlib

import numpy as np
import torch
import transformers

from qwen2audio_jax.config import Config, DecoderConfig, EncoderConfig

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def _shape(encoder: tuple, decoder: tuple, *, ids: tuple = (3, 0, 2), **more) -> Config:
    """Sizes in the table's order; `ids` are those of <|AUDIO|>, of padding and of <|im_end|>."""
    names = ("layers", "width", "heads", "hidden", "mels")
    encoder = EncoderConfig(**dict(zip(names, encoder, strict=True)))
    names = ("layers", "width", "heads", "kv_heads", "head_width", "hidden", "vocabulary")
    sizes = dict(zip(names, decoder, strict=True))
    decoder = DecoderConfig(**sizes, positions=2048, **more)
    audio, pad, end = ids
    return Config(
        encoder=encoder,
        decoder=decoder,
        audio_token=audio,
        pad_token=pad,
        end_tokens=(pad, end),
    )


# fmt: off
SHAPES = {
    # encoder: layers width heads hidden mels; decoder: layers width heads kv head hidden vocabulary
    "one_kv_head":  _shape((2, 32, 2, 64, 128), (2, 48, 4, 1, 12, 96, 256)),
    "two_kv_heads": _shape((2, 48, 4, 96, 80), (3, 64, 4, 2, 16, 96, 320), rope_theta=1e6),
    "multi_head":   _shape((3, 64, 4, 128, 128), (2, 64, 4, 4, 16, 112, 512)),
    "tied":         _shape((2, 32, 4, 64, 80), (2, 32, 2, 2, 16, 64, 300), tied=True),
    "odd_widths":   _shape((2, 36, 3, 52, 128), (2, 30, 3, 1, 10, 70, 211), rope_theta=5000.0),
    "one_layer":    _shape((1, 40, 2, 80, 128), (1, 56, 7, 7, 8, 88, 599), ids=(590, 597, 598)),
    "six_layers":   _shape((6, 32, 2, 48, 80), (6, 48, 6, 2, 8, 64, 256)),
    "wide_heads":   _shape((2, 32, 1, 64, 128), (2, 36, 6, 3, 20, 60, 400), norm_eps=1e-6),
}
# fmt: on


def build(
    config: Config, *, seed: int = 0, scale: float = 0.2
) -> transformers.Qwen2AudioForConditionalGeneration:
    """transformers' model of these sizes, in float32, every parameter random.

    Args:
      scale: of the weights' standard deviation: large enough for every mistake to show.
    """
    e, d = config.encoder, config.decoder
    settings = transformers.Qwen2AudioConfig(
        audio_config={
            "model_type": "qwen2_audio_encoder",
            "encoder_layers": e.layers,
            "d_model": e.width,
            "encoder_attention_heads": e.heads,
            "encoder_ffn_dim": e.hidden,
            "num_mel_bins": e.mels,
            "max_source_positions": e.positions,
        },
        text_config={
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
        },
        audio_token_index=config.audio_token,
    )
    model = transformers.Qwen2AudioForConditionalGeneration(settings).eval()
    model.generation_config.eos_token_id = list(config.end_tokens)
    model.generation_config.pad_token_id = config.pad_token
    generator = torch.Generator().manual_seed(seed)
    random = lambda parameter: torch.randn(parameter.shape, generator=generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "norm" in name and name.endswith("weight")
            parameter.copy_(scale * random(parameter) + (1 if norm else 0))
        positions = model.model.audio_tower.embed_positions.weight
        # not quite the sinusoids, so that a file's own are seen to be read
        positions.copy_(_sinusoids(e.positions, e.width) + 0.05 * random(positions))
    if d.tied:  # transformers 5 ties no Qwen2-Audio by itself
        model.lm_head.weight = model.model.language_model.embed_tokens.weight
    return model


def save(model: transformers.Qwen2AudioForConditionalGeneration, folder: pathlib.Path, **how):
    """Writes `model` as transformers does; `how` goes to its `save_pretrained`."""
    # copies, since it refuses a tied head
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=tensors, **how)
    return folder


def _sinusoids(positions: int, width: int) -> torch.Tensor:
    frequencies = np.exp(-np.log(10_000) / (width // 2 - 1) * np.arange(width // 2))
    angles = np.arange(positions)[:, None] * frequencies
    return torch.tensor(np.concatenate([np.sin(angles), np.cos(angles)], 1), dtype=torch.float32)
