"""DPO of Qwen2-Audio-7B-Instruct by LoRA, its base the reference: one GPU of 80 GB, or a pod.

    python -m train.dpo 7b --data.train pairs.jsonl:train --data.held-out pairs.jsonl:test

beta 0.1 as published, LoRA as in `train.sft 7b` at half its rate. Expected: the loss falls from
log 2 = 0.693, and `accuracy`, how often the chosen answer's reward is the higher, rises from 0.
"""

import dataclasses
import pathlib

from qwen2audio_jax.data.pack import Bucket
from qwen2audio_jax.training.data_config import DataConfig
from qwen2audio_jax.training.settings import PreferenceSettings
from train.configs import sft_7b

_SFT = sft_7b.SETTINGS

SETTINGS = PreferenceSettings(
    out=pathlib.Path("runs/dpo-7b"),
    model=_SFT.model,
    dtype=_SFT.dtype,
    weight_dtype=_SFT.weight_dtype,
    remat_policy=_SFT.remat_policy,
    lora=_SFT.lora,
    gradient_accumulation_steps=4,
    data=DataConfig(
        # a pair has a row to itself
        buckets=(
            Bucket(rows=8, tokens=256, clips=8, frames=504),
            Bucket(rows=8, tokens=512, clips=8, frames=1004),
            Bucket(rows=8, tokens=1536, clips=8, frames=3000),
        ),
        workers=8,
    ),
    optimizer=dataclasses.replace(_SFT.optimizer, learning_rate=5e-5),
    loop=dataclasses.replace(_SFT.loop, best="accuracy"),
    evaluation=_SFT.evaluation,
)
