"""Whisper's encoder and Qwen2's decoder -> a Qwen2-Audio to pretrain, in Hugging Face's format.

Example:

    python -m convert.from_parts openai/whisper-large-v3 Qwen/Qwen2-7B ~/qwen2-audio-start
    python -m train.pretrain 7b --model ~/qwen2-audio-start --data.train ... --data.tasks ...

Both keep every bit, unless --dtype changes the numbers. The projector is new, and so are the rows
of embedding and head beyond QWEN's own; --seed draws them as a new model's are drawn. QWEN's
tokenizer gets the words for clips, silence and times; --tokenizer Qwen/Qwen2-Audio-7B has those for
languages too. Tensors pass one by one: memory holds the largest, the embedding, and little more.
"""

import argparse
import sys

import jax

from convert import arguments, guard
from convert.from_hf import DTYPES
from qwen2audio_jax.processor import COPIED
from qwen2audio_jax.weights import huggingface, locate, parts


def main(args: list[str] | None = None) -> int:
    options = _parser().parse_args(args)

    def convert() -> None:
        tokenizer = options.tokenizer and locate(options.tokenizer, COPIED)
        config, rows = parts.join(
            locate(options.whisper, parts.WHISPER_PATTERNS),
            locate(options.qwen, huggingface.PATTERNS),
            options.target,
            tokenizer=tokenizer,
            seed=options.seed,
            dtype=options.dtype and DTYPES[options.dtype],
            overwrite=options.overwrite,
            progress=not options.quiet,
        )
        tables = "the embedding" if config.decoder.tied else "embedding and head"
        more = f", rows {rows.start} to {rows.stop - 1} of {tables}" if rows else ""
        print(f"drawn from seed {options.seed}: the projector{more}; all else is the parts' own")

    return guard(convert)


def _parser() -> argparse.ArgumentParser:
    parser = arguments(
        __doc__,
        whisper="a Whisper's folder of safetensors, or hub id",
        qwen="a Qwen2ForCausalLM's folder of safetensors, or hub id",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="FOLDER",
        help="a tokenizer with Qwen2-Audio's special tokens, taken as it is (default: QWEN's, with "
        "those that it lacks)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="store parameters in this type (default: as they are; what is new as QWEN's)",
    )
    return parser


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # nothing is computed; accelerators stay free
    sys.exit(main())
