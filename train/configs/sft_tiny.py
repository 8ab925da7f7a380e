"""The tiny model learns conversations, or recordings of your own: minutes on a laptop.

    python -m train.sft tiny
    python -m train.sft tiny --data.train digits/manifest.jsonl:train \\
        --data.held-out digits/manifest.jsonl:test --data.tasks \\
        "[AUDIO:audio] Detect the language and recognize the speech: -> <|en|>[TEXT:text]"

Expected: of digits that `--model runs/demo` hears, seven words in ten wrong before the first step,
one in sixty after 300, none in 300 after 600.
"""

import pathlib

from qwen2audio_jax.training.data_config import DataConfig
from qwen2audio_jax.training.optimizer import OptimizerConfig
from qwen2audio_jax.training.settings import LoopConfig, Settings
from train.configs import TALKS, laptop

SETTINGS = Settings(
    out=pathlib.Path("runs/sft"),
    scan_layers=False,
    data=DataConfig(
        train=("world:small/analysis", "world:small/chat"),
        held_out=("world:small/analysis:test", "world:small/chat:test"),
        buckets=(*laptop(104, 190, 320, 1004, 3000), *TALKS),
        augmented=0.3,
        masked=0.3,
    ),
    optimizer=OptimizerConfig(
        name="muon", learning_rate=5e-4, steps=600, warmup_steps=30, weight_decay=0.05
    ),
    loop=LoopConfig(save_every=300, evaluate_every=300, evaluate_first=True, best="exact_match"),
)
