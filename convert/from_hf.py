"""Hugging Face's folder -> ours: an Orbax checkpoint with config and tokenizer beside it.

Example:

    python -m convert.from_hf ~/Qwen2-Audio-7B-Instruct ~/qwen2-audio-ours
    python -m convert.from_hf ~/Qwen2-Audio-7B-Instruct /mnt/bucket/ours --shards 16

Tensors pass one by one, so that 4 GiB of memory suffice for any size. `convert.to_hf` gives back
the identical files, unless --dtype changed the numbers. With --shards each parameter is stored in
the parts that so many devices hold, so that a pod reads every part once; with any other number of
devices the folder is read as well, but whole parts are read for what is needed of them.
"""

import contextlib
import sys

import jax
import ml_dtypes
import numpy as np

from convert import arguments, guard
from qwen2audio_jax import sharding
from qwen2audio_jax.weights import conversion, huggingface, locate

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def main(args: list[str] | None = None) -> int:
    parser = arguments(__doc__, src='a folder of safetensors, "tiny" or a hub id')
    parser.add_argument(
        "--dtype", choices=DTYPES, help="store parameters in this type (default: as they are)"
    )
    parser.add_argument(
        "--shards", type=int, default=1, metavar="N", help="store for N devices (default: 1)"
    )
    parser.add_argument(
        "--mesh.ici-tensor-parallelism",
        dest="tensor",
        type=int,
        default=1,
        metavar="N",
        help="how many of them share heads and hidden units; the others are fsdp (default: 1)",
    )
    options = parser.parse_args(args)

    def convert() -> None:
        conversion.from_huggingface(
            locate(options.src, huggingface.PATTERNS),
            options.target,
            dtype=options.dtype and DTYPES[options.dtype],
            mesh=mesh(options.shards, options.tensor),
            overwrite=options.overwrite,
            progress=not options.quiet,
        )

    return guard(convert)


def mesh(shards: int, tensor: int) -> jax.sharding.Mesh | None:
    """Devices that are this machine's processor, in the place of a pod's.

    Raises:
      ValueError: there is no such number of them, or it cannot be split so.
    """
    if shards < 1 or tensor < 1 or shards % tensor:
        raise ValueError(
            f"wanted --shards from 1, and --mesh.ici-tensor-parallelism that divides it, got "
            f"{shards} and {tensor}"
        )
    if shards == 1:
        return None
    with contextlib.suppress(RuntimeError):  # in a process that has begun to use those it has
        jax.config.update("jax_num_cpu_devices", max(shards, jax.config.jax_num_cpu_devices))
    devices = jax.devices("cpu")
    if len(devices) < shards:
        raise ValueError(f"wanted at least {shards} devices for --shards, got {len(devices)}")
    return sharding.mesh(devices=devices[:shards], fsdp=shards // tensor, tensor=tensor)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # nothing is computed; accelerators stay free
    sys.exit(main())
