"""Operations are counted by hand where that is easy, and nothing is made up for unknown devices."""

import types

import numpy as np
import pytest

from qwen2audio_jax import Config
from qwen2audio_jax.training import flops

TOKENS = 900
CONFIG = Config()


def batch(**more):
    ids = np.zeros((1, TOKENS + 100), np.int32)
    mask = (np.arange(TOKENS + 100) < TOKENS).astype(np.int32)[None]
    labels = np.where(np.arange(TOKENS + 100) < 30, 1, -100)[None]
    frames = np.ones((1, 3000), np.int32)
    sound = {"feature_attention_mask": frames}
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, **sound, **more}


def test_a_step_costs_three_times_what_is_heard_and_read():
    """Two operations a weight: 637 M of the encoder, 6.5 G of the decoder's blocks."""
    (encoder, projector), read, head = flops.forward(CONFIG, batch())
    assert encoder == pytest.approx(2 * 1500 * 637e6, rel=0.2)  # and attention
    assert read == pytest.approx(2 * TOKENS * 32 * 202_375_168, rel=0.02)
    assert head == 2 * 30 * 4096 * 156_032
    every = {"encoder", "projector", "decoder", "embeddings"}
    forward = encoder + projector + read + head
    assert flops.of_step(CONFIG, batch(), every) == pytest.approx(3 * forward)
    assert flops.of_step(CONFIG, batch(), every, reference=True) == pytest.approx(4 * forward)
    decoder = flops.of_step(CONFIG, batch(), {"decoder"})
    assert decoder == pytest.approx(encoder + projector + 3 * read + 2 * head)
    adapted = flops.of_step(CONFIG, batch(), {"decoder"}, adapters=True)
    assert adapted == pytest.approx(decoder - read)


def test_padding_and_neighbours_cost_nothing():
    """Two samples in a row attend to themselves alone; both answers of a pair are read."""
    halves = np.repeat([1, 2, 0], [TOKENS // 2, TOKENS // 2, 100])[None]
    np.testing.assert_array_equal(flops.segments(batch(segment_ids=halves)), [450, 450])
    whole, packed = (flops.forward(CONFIG, b)[1] for b in (batch(), batch(segment_ids=halves)))
    assert whole - packed == CONFIG.decoder.layers * 4096 * TOKENS**2
    pair = {f"{side}_{k}": x for side in ("chosen", "rejected") for k, x in batch().items()}
    assert flops.forward(CONFIG, pair)[1] == pytest.approx(2 * whole)


def test_an_unknown_device_has_no_peak():
    assert flops.peak("bfloat16") is None


@pytest.mark.parametrize(
    ("kind", "rate"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5e", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU v6e", 918e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
    ],
)
def test_devices_have_the_peak_of_their_kind(monkeypatch, kind, rate):
    """However jax calls them: the longer of two names that fit is theirs."""
    device = types.SimpleNamespace(device_kind=kind)
    monkeypatch.setattr(flops.jax, "devices", lambda: [device])
    monkeypatch.setattr(flops.jax, "device_count", lambda: 2)
    assert flops.peak("bfloat16") == 2 * rate
