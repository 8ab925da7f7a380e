"""Sizes of both towers, the presets, and the one alphabet that every shape is written in.

    B batch            S samples          M mel bands        T mel frames (10 ms)
    P encoder positions (20 ms)           A audio states (40 ms)
    L tokens           D decoder width    E encoder width    V vocabulary
    N query heads      K key/value heads  H head width       F hidden width
    X experts          C clips

A size that no letter names (kernel taps, cache slots) is spelled out where it occurs.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Sizes of the audio encoder; the defaults are Qwen2-Audio-7B's (Whisper large-v3)."""

    layers: int = 32
    width: int = 1280  # E
    heads: int = 20  # N
    hidden: int = 5120  # F
    mels: int = 128  # M
    positions: int = 1500  # P at 30 s
    norm_eps: float = 1e-5

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"encoder width {self.width} does not split into {self.heads} heads")
        if self.width % 2:
            raise ValueError(f"encoder width must be even for sinusoids, got {self.width}")

    @property
    def head_width(self) -> int:
        return self.width // self.heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes of the text decoder; the defaults are Qwen2-Audio-7B's (Qwen-7B in Qwen2's code)."""

    layers: int = 32
    width: int = 4096  # D
    heads: int = 32  # N
    kv_heads: int = 32  # K
    head_width: int = 128  # H
    hidden: int = 11008  # F
    vocabulary: int = 156_032  # V
    positions: int = 8192  # the longest context, in tokens
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tied: bool = False  # the output head is the embedding

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(
                f"{self.heads} query heads do not split over {self.kv_heads} key/value heads"
            )
        if self.head_width % 2:
            raise ValueError(f"head width must be even for rotary angles, got {self.head_width}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A whole model: both towers and the token ids that join them."""

    encoder: EncoderConfig = EncoderConfig()
    decoder: DecoderConfig = DecoderConfig()
    audio_token: int = 151_646  # <|AUDIO|>: one per audio state
    pad_token: int = 151_643  # <|endoftext|>
    end_tokens: tuple[int, ...] = (151_643, 151_645)  # <|endoftext|>, <|im_end|>
    # the rest of generation_config.json, carried along; the model does not depend on it
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def __post_init__(self):
        named = {"audio_token": self.audio_token, "pad_token": self.pad_token}
        for name, token in [*named.items(), *(("end_tokens", t) for t in self.end_tokens)]:
            if not 0 <= token < self.decoder.vocabulary:
                raise ValueError(
                    f"{name} {token} is outside the vocabulary of {self.decoder.vocabulary}"
                )


def _qwen2(layers, width, heads, kv_heads, hidden, *, tied=False):
    return DecoderConfig(
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_width=width // heads,
        hidden=hidden,
        vocabulary=156_032,  # Qwen2's own is smaller: Qwen2-Audio adds tokens
        positions=32_768,
        rope_theta=1e6,
        norm_eps=1e-6,
        tied=tied,
    )


# fmt: off
DECODERS = {
    #                     layers width heads kv  hidden
    "qwen2-0.5b": _qwen2(24,    896,  14,   2,  4864,  tied=True),
    "qwen2-1.5b": _qwen2(28,    1536, 12,   2,  8960,  tied=True),
    "qwen2-7b":   _qwen2(28,    3584, 28,   4,  18944),
    "qwen2-72b":  _qwen2(80,    8192, 64,   8,  29568),
}
# fmt: on

PRESETS = {
    "qwen2-audio-7b": Config(),
    # token ids are those of the tokenizer under assets/tiny
    "tiny": Config(
        encoder=EncoderConfig(layers=4, width=144, heads=4, hidden=576),
        decoder=DecoderConfig(
            layers=3,
            width=144,
            heads=4,
            kv_heads=2,
            head_width=36,
            hidden=384,
            vocabulary=576,
            positions=2048,
            tied=True,
        ),
        audio_token=3,
        pad_token=0,
        end_tokens=(0, 2),
    ),
    **{f"whisper-large-v3-{name}": Config(decoder=d) for name, d in DECODERS.items()},
}


def preset(name: str) -> Config:
    """The sizes that go by `name`.

    Raises:
      ValueError: no preset has that name; the message lists those there are.
    """
    if name not in PRESETS:
        raise ValueError(f"no preset named {name!r}; there are {', '.join(sorted(PRESETS))}")
    return PRESETS[name]
