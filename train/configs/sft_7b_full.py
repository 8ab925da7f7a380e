"""All of Qwen2-Audio-7B-Instruct but its audio encoder, on a pod or eight GPUs of 80 GB.

    python -m train.sft 7b-full --data.train chats.jsonl:train --data.held-out chats.jsonl:test

5e-6 at 32 rows of 4096 tokens a step, as Megatron-Bridge has it: of one host of eight devices, with
four batches a step; on four such hosts say --gradient-accumulation-steps 1. v5e has room for a row
on each chip: docs/hosts.md has the command. Expected: as LoRA's preset, with more to gain from more
data, and more to lose from less.
"""

import dataclasses
import pathlib

from train.configs import sft_7b

SETTINGS = dataclasses.replace(
    sft_7b.SETTINGS,
    out=pathlib.Path("runs/sft-7b-full"),
    weight_dtype="float32",
    lora=dataclasses.replace(sft_7b.SETTINGS.lora, r=0),
    optimizer=dataclasses.replace(
        sft_7b.SETTINGS.optimizer, learning_rate=5e-6, encoder_learning_rate=0.0, b2=0.95
    ),
)
