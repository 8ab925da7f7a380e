"""Fine-tunes on conversations, of which the assistant's turns are learned, or on declared tasks.

    python -m train.sft tiny                                      # made conversations
    python -m train.sft tiny --data.train chats.jsonl:train --data.held-out chats.jsonl:test
    python -m train.sft 7b --data.train chats.jsonl:train --lora.r 16   # LoRA; 7b-full trains all

A line of chats.jsonl, with clips as paths, relative to it, or URLs:

    {"messages": [{"role": "user", "content": [{"type": "audio", "audio": "dog.wav"},
     {"type": "text", "text": "What is that?"}]}, {"role": "assistant", "content": "A dog."}]}

or, as ms-swift has it, {"messages": [{"role": "user", "content": "<audio>What is that?"}, ...],
"audios": ["dog.wav"]}. A part of a long recording is {"type": "audio", "audio": "call.wav",
"offset": 12.5, "duration": 4.0}, in seconds.

Every setting is a flag. The folder --out holds all of a run: the same command goes on where it
was killed, to the bit (on GPUs if XLA is asked for that: docs/hosts.md).
"""

from qwen2audio_jax.training.settings import Settings
from train.launch import launch


def main(settings: Settings) -> int | None:
    from qwen2audio_jax.training import stage  # Grain is an extra

    return stage.train(settings)


if __name__ == "__main__":
    launch("sft", main, __doc__)
