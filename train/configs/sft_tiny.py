"""The tiny model learns conversations, or recordings of your own: minutes on a laptop.

    python -m train.sft tiny
    python -m train.sft tiny --data.train digits/manifest.jsonl:train \\
        --data.held-out digits/manifest.jsonl:test --data.tasks \\
        "[AUDIO:audio] Detect the language and recognize the speech: <|en|> -> [TEXT:text]"

Expected: the loss on what is held out falls from evaluation to evaluation.
"""

import pathlib

from qwen2audio_jax.data.pack import Bucket
from qwen2audio_jax.training.optimizer import OptimizerConfig
from qwen2audio_jax.training.settings import DataConfig, LoopConfig, Settings

SETTINGS = Settings(
    out=pathlib.Path("runs/sft"),
    scan_layers=False,
    data=DataConfig(
        train=("world:small/analysis", "world:small/chat"),
        held_out=("world:small/analysis:test", "world:small/chat:test"),
        buckets=(
            Bucket(rows=8, tokens=160, clips=24, frames=160),
            Bucket(rows=8, tokens=240, clips=16, frames=320),
            Bucket(rows=8, tokens=480, clips=16, frames=3000),
        ),
        augmented=0.4,
        masked=0.4,
    ),
    optimizer=OptimizerConfig(learning_rate=5e-4, steps=1000, warmup_steps=50, weight_decay=0.05),
    loop=LoopConfig(save_every=250, evaluate_every=500, best="exact_match"),
)
