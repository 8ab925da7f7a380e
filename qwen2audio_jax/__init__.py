"""Qwen2-Audio in JAX: sound and text in, text out."""

from qwen2audio_jax.audio import AudioError
from qwen2audio_jax.config import Config, DecoderConfig, EncoderConfig, preset
from qwen2audio_jax.conversation import Conversation
from qwen2audio_jax.generate import generate
from qwen2audio_jax.model import Qwen2Audio
from qwen2audio_jax.processor import Processor
from qwen2audio_jax.sampling import Sampling
from qwen2audio_jax.stream import stream

__all__ = [
    "AudioError",
    "Config",
    "Conversation",
    "DecoderConfig",
    "EncoderConfig",
    "Processor",
    "Qwen2Audio",
    "Sampling",
    "generate",
    "preset",
    "stream",
]
