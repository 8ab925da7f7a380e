"""Qwen2-Audio-7B goes on pretraining on a pod; bring sources and a task for each.

    python -m train.pretrain 7b --data.train ... --data.tasks ... --distributed

To begin where the reference began, with Whisper's encoder and a decoder of text alone:

    python -m convert.from_parts openai/whisper-large-v3 Qwen/Qwen2-7B start \\
        --tokenizer Qwen/Qwen2-Audio-7B
    python -m train.pretrain 7b --model start --data.train ... --data.tasks ... --distributed

Its projector has learned nothing yet: the loss begins high, and 20 000 steps are few.

The report gives no learning rate, batch size or schedule; these are what is usual at this size:
a global batch of some 64 rows of 4096 tokens, packed, a peak of 2e-5, SpecAugment as Qwen-Audio
had. The rows are of eight hosts with eight devices; docs/hosts.md has those for others. Expected:
on tasks that the model knows, recognition of LibriSpeech among them, a loss that stays level; with
--from-scratch nothing useful in so few steps.
"""

import pathlib

from qwen2audio_jax.training.data_config import DataConfig
from qwen2audio_jax.training.optimizer import OptimizerConfig
from qwen2audio_jax.training.settings import EvaluationConfig, LoopConfig, Settings
from train.configs import pod

SETTINGS = Settings(
    out=pathlib.Path("runs/pretrain-7b"),
    model="Qwen/Qwen2-Audio-7B",
    dtype="bfloat16",
    remat_policy="full",
    data=DataConfig(
        # of each host, here of eight with eight devices
        buckets=pod(rows=8, tokens=4096, clips=40),
        masked=0.5,
        workers=16,
    ),
    optimizer=OptimizerConfig(
        learning_rate=2e-5, steps=20_000, warmup_steps=1000, weight_decay=0.1, final_fraction=0.1
    ),
    loop=LoopConfig(save_every=500, evaluate_every=1000),
    evaluation=EvaluationConfig(max_new_tokens=256),
)
