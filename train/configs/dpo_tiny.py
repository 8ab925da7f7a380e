"""The tiny model learns what to prefer from made pairs of answers: minutes on a laptop.

    python -m train.dpo tiny --model runs/sft/model

Expected: the loss falls from log 2 = 0.693, where every run begins, and `accuracy` rises from 0,
as no answer's reward is the higher at first, to above 0.9.
"""

import pathlib

from qwen2audio_jax.training.data_config import DataConfig
from qwen2audio_jax.training.optimizer import OptimizerConfig
from qwen2audio_jax.training.settings import LoopConfig, PreferenceSettings
from train.configs import TALKS, pairs

SETTINGS = PreferenceSettings(
    out=pathlib.Path("runs/dpo"),
    scan_layers=False,
    data=DataConfig(
        train=("world:small/preference",),
        held_out=("world:small/preference:test",),
        buckets=(*pairs(320, 1004, 3000), *TALKS),
    ),
    optimizer=OptimizerConfig(
        name="muon", learning_rate=7e-5, steps=200, warmup_steps=10, weight_decay=0.0
    ),
    loop=LoopConfig(save_every=100, evaluate_every=100, evaluate_first=True, best="accuracy"),
)
