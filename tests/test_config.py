"""Sizes are those of the published models, and impossible ones are refused with both numbers."""

import dataclasses

import jax
import pytest
from flax import nnx

from qwen2audio_jax import Config, DecoderConfig, EncoderConfig, Qwen2Audio, preset
from qwen2audio_jax.config import DECODERS, PRESETS
from qwen2audio_jax.weights import table


def count(config):
    model = nnx.eval_shape(lambda: Qwen2Audio(config, rngs=nnx.Rngs(0)))
    return sum(x.size for x in jax.tree.leaves(model))


def test_the_seven_billion_have_the_published_size():
    """876 tensors with 8 397 094 912 parameters."""
    config = preset("qwen2-audio-7b")
    assert len(list(table.entries(config))) == 876
    assert count(config) == 8_397_094_912


# Hugging Face's counts, with 156 032 instead of 151 936 or 152 064 words
@pytest.mark.parametrize(
    ("name", "published", "words"),
    [
        ("qwen2-0.5b", 494_032_768, 151_936),
        ("qwen2-1.5b", 1_543_714_304, 151_936),
        ("qwen2-7b", 7_615_616_512, 152_064),
        ("qwen2-72b", 72_706_203_648, 152_064),
    ],
)
def test_decoders_have_their_published_sizes(name, published, words):
    """A preset of the Qwen2 family differs from its publication only in the words added."""
    c = DECODERS[name]
    config = preset(f"whisper-large-v3-{name}")
    ours = sum(e.count for e in table.entries(config) if e.path.startswith("decoder."))
    tables = 1 if c.tied else 2
    assert ours == published + tables * (c.vocabulary - words) * c.width


def test_every_preset_is_a_model():
    """Each can be built, has what the conversion table lists, and is a key of a dictionary."""
    for name in PRESETS:
        config = preset(name)
        assert count(config) == sum(entry.count for entry in table.entries(config)), name
        assert {config: name}[dataclasses.replace(config)] == name


def test_an_unknown_preset_names_those_there_are():
    with pytest.raises(ValueError, match=r"no preset named 'small'; there are .*qwen2-audio-7b"):
        preset("small")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EncoderConfig(width=100, heads=3), "width 100 does not split into 3 heads"),
        (lambda: EncoderConfig(width=15, heads=3), "must be even for sinusoids, got 15"),
        (lambda: DecoderConfig(heads=6, kv_heads=4), "6 query heads do not split over 4 key/value"),
        (lambda: DecoderConfig(head_width=7), "must be even for rotary angles, got 7"),
        (
            lambda: Config(decoder=DecoderConfig(vocabulary=64), pad_token=1, end_tokens=(2,)),
            "audio_token 151646 is outside the vocabulary of 64",
        ),
        (
            lambda: dataclasses.replace(preset("tiny"), end_tokens=(0, 576)),
            "end_tokens 576 is outside the vocabulary of 576",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make, message):
    """The message has what was wanted and what was got."""
    with pytest.raises(ValueError, match=message):
        make()
