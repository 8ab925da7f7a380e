"""Hugging Face's folder -> ours: an Orbax checkpoint with config and tokenizer beside it.

Example:

    python -m convert.from_hf ~/Qwen2-Audio-7B-Instruct ~/qwen2-audio-ours

Tensors pass one by one, so that 4 GiB of memory suffice for any size. `convert.to_hf` gives back
the identical files, unless --dtype changed the numbers.
"""

import sys

import jax
import ml_dtypes
import numpy as np

from convert import arguments, guard
from qwen2audio_jax.weights import conversion, huggingface, locate

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def main(args: list[str] | None = None) -> int:
    parser = arguments(__doc__, src='a folder of safetensors, "tiny" or a hub id')
    parser.add_argument(
        "--dtype", choices=DTYPES, help="store parameters in this type (default: as they are)"
    )
    options = parser.parse_args(args)

    def convert() -> None:
        conversion.from_huggingface(
            locate(options.src, huggingface.PATTERNS),
            options.target,
            dtype=options.dtype and DTYPES[options.dtype],
            overwrite=options.overwrite,
            progress=not options.quiet,
        )

    return guard(convert)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # nothing is computed; accelerators stay free
    sys.exit(main())
