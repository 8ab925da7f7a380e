"""DPO of all of Qwen2-Audio-7B-Instruct but its audio encoder, on a pod.

    python -m train.dpo 7b-full --data.train pairs.jsonl:train --data.held-out pairs.jsonl:test

The reference answers once, before the training, so that it takes no memory. Expected: as in LoRA's
preset.
"""

import dataclasses
import pathlib

from train.configs import dpo_7b

SETTINGS = dataclasses.replace(
    dpo_7b.SETTINGS,
    out=pathlib.Path("runs/dpo-7b-full"),
    weight_dtype="float32",
    lora=dataclasses.replace(dpo_7b.SETTINGS.lora, r=0),
    precompute_ref_log_probs=True,
    optimizer=dataclasses.replace(
        dpo_7b.SETTINGS.optimizer, learning_rate=1e-6, encoder_learning_rate=0.0, b2=0.95
    ),
)
