"""Our folder -> Hugging Face's: safetensors that transformers loads.

Example:

    python -m convert.to_hf ~/qwen2-audio-ours ~/qwen2-audio-back

What `convert.from_hf` made comes back in the identical files. Tensors pass one by one, so that
4 GiB of memory suffice for any size.
"""

import sys

import jax

from convert import arguments, guard
from qwen2audio_jax.weights import conversion, locate


def main(args: list[str] | None = None) -> int:
    parser = arguments(__doc__, "a folder that convert.from_hf made")
    options = parser.parse_args(args)

    def convert() -> None:
        conversion.to_huggingface(
            locate(options.source, ()),
            options.target,
            overwrite=options.overwrite,
            progress=not options.quiet,
        )

    return guard(convert)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # nothing is computed; accelerators stay free
    sys.exit(main())
