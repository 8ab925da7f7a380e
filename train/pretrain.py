"""Pretrains on declared tasks: audio and a prompt in, what follows the arrow is learned.

    python -m train.pretrain tiny                                 # made sound, from nothing
    python -m train.pretrain tiny --data.train rows.jsonl --data.tasks \\
        "[AUDIO:audio,words=text] Detect the language and recognize the speech: -> [TEXT:text]"
    python -m train.pretrain 7b --data.train shards/speech tfds:librispeech:train_clean100 \\
        --data.weights 3 1 --data.tasks "..." "..." --mesh.ici-fsdp-parallelism 64

`words=text` says that the text is what is spoken, word by word: with --ctc, the encoder learns to
spell it too; `offset=offset,duration=duration`, that rows are pieces of longer recordings, as
NeMo's are. Every setting is a flag. The folder --out holds all of a run: the same command goes on
where it was killed, to the bit (on GPUs if XLA is asked for that: docs/hosts.md).
"""

from qwen2audio_jax.training.settings import Settings
from train.launch import launch


def main(settings: Settings) -> int | None:
    from qwen2audio_jax.training import stage  # Grain is an extra

    return stage.train(settings)


if __name__ == "__main__":
    launch("pretrain", main, __doc__)
