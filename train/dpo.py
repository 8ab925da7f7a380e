"""Learns from pairs of answers of which one was preferred: DPO and its kin.

    python -m train.dpo tiny                                      # made preferences
    python -m train.dpo tiny --data.train pairs.jsonl --preference.beta 0.2
    python -m train.dpo 7b --data.train pairs.jsonl --precompute-ref-log-probs

A line of pairs.jsonl: {"messages": [...], "chosen": "...", "rejected": "..."}, or as TRL,
UltraFeedback or ms-swift ({"messages": [...], "rejected_response": "..."}) have it.
The reference is the model as it began: kept in memory; with LoRA, the model without its adapter, or
with the one that it begins with (--lora.start); or its answers' log-probabilities, precomputed.

Every setting is a flag. The folder --out holds all of a run: the same command goes on where it
was killed, to the bit (on GPUs if XLA is asked for that: docs/hosts.md).
"""

from qwen2audio_jax.training.settings import PreferenceSettings
from train.launch import launch


def main(settings: PreferenceSettings) -> int | None:
    from qwen2audio_jax.training import stage  # Grain is an extra

    return stage.train(settings)


if __name__ == "__main__":
    launch("dpo", main, __doc__)
