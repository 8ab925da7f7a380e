"""LoRA on the decoder of Qwen2-Audio-7B-Instruct: one GPU of 80 GB, or a small pod.

    python -m train.sft 7b --data.train chats.jsonl:train --data.held-out chats.jsonl:test

r 8, alpha 32, 1e-4 on all linear layers of the decoder, tower and projector frozen, warm-up 5 %:
as ms-swift has it; a step of 32 rows on one host (on four: --gradient-accumulation-steps 1), each
of several conversations: a thousand short ones are two steps. Say how many you want:
--optimizer.steps; after ten the run tells how often they read your rows. Expected: `adapter/` for
PEFT and `model/`, merged; an answer style in two or three passes and some tens of steps.
"""

import pathlib

from qwen2audio_jax.training.data_config import DataConfig
from qwen2audio_jax.training.optimizer import OptimizerConfig
from qwen2audio_jax.training.settings import EvaluationConfig, LoopConfig, Lora, Settings
from train.configs import pod

SETTINGS = Settings(
    out=pathlib.Path("runs/sft-7b"),
    model="Qwen/Qwen2-Audio-7B-Instruct",
    dtype="bfloat16",
    weight_dtype="bfloat16",
    remat_policy="full",
    lora=Lora(r=8, lora_alpha=32),
    gradient_accumulation_steps=4,
    data=DataConfig(buckets=pod(rows=8, tokens=4096, clips=40), workers=8),
    optimizer=OptimizerConfig(
        learning_rate=1e-4, steps=1000, warmup_steps=0.05, weight_decay=0.0, b2=0.999
    ),
    loop=LoopConfig(save_every=200, evaluate_every=200, best="loss"),
    evaluation=EvaluationConfig(max_new_tokens=256),
)
