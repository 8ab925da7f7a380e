"""A tiny model from nothing, on made sound: minutes on a laptop.

    python -m train.pretrain tiny

Expected: the loss falls from 6.4, the log of the vocabulary, below 1 within the 3000 steps.
"""

import pathlib

from qwen2audio_jax.data.pack import Bucket
from qwen2audio_jax.training.optimizer import OptimizerConfig
from qwen2audio_jax.training.settings import DataConfig, LoopConfig, Settings

SETTINGS = Settings(
    out=pathlib.Path("runs/pretrain"),
    from_scratch=True,
    scan_layers=False,
    data=DataConfig(
        train=("world:small/tasks",),
        held_out=("world:small/tasks:test",),
        buckets=(
            Bucket(rows=8, tokens=160, clips=24, frames=160),
            Bucket(rows=8, tokens=200, clips=16, frames=320),
            Bucket(rows=8, tokens=400, clips=8, frames=3000),
        ),
        augmented=0.4,
        masked=0.4,
    ),
    optimizer=OptimizerConfig(learning_rate=1e-3, steps=3000, warmup_steps=150, weight_decay=0.05),
    loop=LoopConfig(save_every=500, evaluate_every=1000),
)
