"""Our folder -> Hugging Face's: safetensors that transformers loads.

Examples:

    python -m convert.to_hf ~/qwen2-audio-ours ~/qwen2-audio-back
    python -m convert.to_hf Qwen/Qwen2-Audio-7B-Instruct ~/merged --adapter runs/sft-7b/adapter

What `convert.from_hf` made comes back in the identical files. With --adapter, SRC is the base, in
our format or in Hugging Face's, and the adapter, as PEFT or train.sft writes it, is added to its
weights. Tensors pass one by one, so that 4 GiB of memory suffice for any size.
"""

import sys

import jax
from flax import nnx

from convert import arguments, guard
from qwen2audio_jax import Qwen2Audio
from qwen2audio_jax.training import peft
from qwen2audio_jax.weights import conversion, huggingface, locate, settings


def main(args: list[str] | None = None) -> int:
    parser = arguments(__doc__, src="a folder that convert.from_hf made; with --adapter, any model")
    parser.add_argument(
        "--adapter", metavar="LORA", help="add this to the weights: a folder of PEFT's, or a hub id"
    )
    options = parser.parse_args(args)

    def convert() -> None:
        patterns = () if options.adapter is None else huggingface.PATTERNS
        adapted, source = None, locate(options.src, patterns)
        if options.adapter is not None:
            sizes = settings.read(source)
            shapes = nnx.eval_shape(lambda: Qwen2Audio(sizes, rngs=nnx.Rngs(0)))
            adapted = peft.adapted(options.adapter, shapes)
        conversion.to_huggingface(
            source,
            options.target,
            adapted=adapted,
            overwrite=options.overwrite,
            progress=not options.quiet,
        )

    return guard(convert)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # little is computed; accelerators stay free
    sys.exit(main())
