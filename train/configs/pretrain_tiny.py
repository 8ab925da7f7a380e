"""A tiny model from nothing, on made sound: minutes on a laptop.

    python -m train.pretrain tiny

Expected: after half of the 1500 steps one word in ten of held-out voices is wrong, and of sounds
and counts nine in ten are right. (The first stage of train.demo is shorter: fewer words in its
vocabulary, recognition more often, less augmentation.)
"""

import pathlib

from qwen2audio_jax.training.data_config import DataConfig
from qwen2audio_jax.training.optimizer import OptimizerConfig
from qwen2audio_jax.training.settings import LoopConfig, Settings
from train.configs import laptop

SETTINGS = Settings(
    out=pathlib.Path("runs/pretrain"),
    from_scratch=True,
    scan_layers=False,
    ctc=0.3,
    data=DataConfig(
        train=("world:small/tasks",),
        held_out=("world:small/tasks:test",),
        buckets=laptop(104, 190, 320, 1004, 3000),
        augmented=0.4,
        masked=0.4,
    ),
    optimizer=OptimizerConfig(
        name="muon", learning_rate=1e-3, steps=1500, warmup_steps=75, weight_decay=0.05
    ),
    loop=LoopConfig(save_every=500, evaluate_every=500),
)
