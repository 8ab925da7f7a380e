"""What comes out of a run says what it was learned from, as others find it."""

import json
import pathlib

import numpy as np
import pytest
import small
from flax import nnx

from qwen2audio_jax import Processor, Qwen2Audio
from qwen2audio_jax.training import export
from qwen2audio_jax.training.learner import Learner
from qwen2audio_jax.training.loss import next_token
from qwen2audio_jax.training.optimizer import OptimizerConfig
from qwen2audio_jax.training.settings import Lora, Settings
from qwen2audio_jax.weights.source import TINY


@pytest.fixture(scope="module")
def processor():
    return Processor.from_pretrained("tiny")


@pytest.mark.parametrize(
    ("how", "heard", "window"),
    [
        ({}, 0.57, "before"),  # a model that hears as long as ever
        ({}, 12.3, 12.3),
        ({}, 30.01, 30.0),
        ({}, 0.0, "before"),  # text alone
        ({"from_scratch": True}, 0.57, 1.0),  # the shortest that transcription takes
        ({"from_scratch": True}, 1.5, 1.5),
        ({"from_scratch": True}, 0.0, "before"),
    ],
)
def test_windows_are_of_what_was_heard(tmp_path, processor, how, heard, window):
    """Rather than of what the batches have room for."""
    settings = Settings(out=tmp_path, **how)
    learner = Learner(Qwen2Audio(small.CONFIG, rngs=nnx.Rngs(0)), OptimizerConfig(), next_token)
    export.save(settings, learner, processor, heard)
    found = Processor.from_pretrained(tmp_path / "model").window
    np.testing.assert_allclose(found, processor.window if window == "before" else window)


@pytest.mark.parametrize("model", ["tiny", "here", "owner/name"])
def test_adapters_name_a_base_that_others_find(tmp_path, processor, model, monkeypatch):
    """A folder by its whole path: PEFT would ask the hub for `tiny`."""
    monkeypatch.chdir(tmp_path)
    pathlib.Path("here").mkdir()
    lora = Lora(r=2)
    model_ = Qwen2Audio(small.CONFIG, rngs=nnx.Rngs(0))
    learner = Learner(model_, OptimizerConfig(), next_token, adapters=lora.config)
    export.save(Settings(out=tmp_path, model=model, lora=lora), learner, processor, 1.0)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    wanted = {"tiny": str(TINY), "here": str(tmp_path / "here")}.get(model, model)
    assert config["base_model_name_or_path"] == wanted
