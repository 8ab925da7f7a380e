"""Our folder -> Hugging Face's: safetensors that transformers loads.

Examples:

    python -m convert.to_hf ~/qwen2-audio-ours ~/qwen2-audio-back
    python -m convert.to_hf Qwen/Qwen2-Audio-7B-Instruct ~/merged --adapter runs/sft-7b/adapter

What `convert.from_hf` made comes back in the identical files. With --adapter, SRC is the base, in
our format or in Hugging Face's, and the adapter, as PEFT or train.sft writes it, is added to its
weights. Tensors pass one by one, so that 4 GiB of memory suffice for any size.
"""

import math
import pathlib
import sys
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx

from convert import arguments, guard
from qwen2audio_jax import Qwen2Audio
from qwen2audio_jax.config import Config
from qwen2audio_jax.training import peft
from qwen2audio_jax.weights import bar, conversion, folder, huggingface, locate, orbax, table
from qwen2audio_jax.weights import settings as model_settings


def merge(
    source: pathlib.Path,
    target: pathlib.Path,
    adapter: str,
    *,
    overwrite: bool = False,
    progress: bool = False,
) -> None:
    """Makes a folder that transformers loads, of a model and an adapter.

    What is adapted is added to in float32 and stored in its own type again; all else stays, to the
    bit, and so do the files' names.

    Args:
      source: the base, in Hugging Face's format or in ours.
      adapter: a folder in PEFT's format, or a hub id.

    Raises:
      ValueError: `source` is no whole model, `adapter` none of this model, or `target` cannot take
        it.
      OSError: `target` cannot be written.
    """
    sizes = model_settings.read(source)
    shapes = nnx.eval_shape(lambda: Qwen2Audio(sizes, rngs=nnx.Rngs(0)))
    added = peft.added(adapter, shapes)
    layout, total, read = _stored(source, sizes)

    def merged(name: str) -> np.ndarray:
        tensor = read(name)
        if name not in added:
            return tensor
        return (tensor.astype(np.float32) + added[name]()).astype(tensor.dtype)

    with folder.fresh(target, total, source=source, overwrite=overwrite) as partial:
        with bar("merging", total, progress) as shown:
            huggingface.write(partial, layout, merged, shown.update)
        folder.copy_settings(source, partial)


def _stored(
    source: pathlib.Path, sizes: Config
) -> tuple[huggingface.Layout, int, Callable[[str], np.ndarray]]:
    """The files that a model has or, if it is ours, came from; their bytes; what reads a tensor."""
    if not folder.is_ours(source):
        tensors = huggingface.find(source, sizes)
        total = sum(tensor.nbytes for tensor in tensors.values())
        return huggingface.layout(source), total, lambda name: tensors[name].read()
    found = orbax.find(source, sizes)
    rows = {row.name: row for row in table.entries(sizes)}
    if sizes.decoder.tied:
        rows[table.HEAD] = rows[table.EMBEDDING]
    place = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])

    def read(name: str) -> np.ndarray:
        row, leaf = rows[name], found[rows[name].key]
        wanted = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
        return row.to_theirs(np.asarray(orbax.read(source, {row.key: wanted})[row.key]))

    layout = orbax.read_layout(source) or huggingface.plan(
        (name, found[row.key].dtype, row.their_shape) for name, row in rows.items()
    )
    total = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in found.values())
    return layout, total, read


def main(args: list[str] | None = None) -> int:
    parser = arguments(__doc__, "a folder that convert.from_hf made; with --adapter, any model")
    parser.add_argument(
        "--adapter", metavar="LORA", help="add this to the weights: a folder of PEFT's, or a hub id"
    )
    options = parser.parse_args(args)

    def convert() -> None:
        how = {"overwrite": options.overwrite, "progress": not options.quiet}
        if options.adapter is None:
            conversion.to_huggingface(locate(options.source, ()), options.target, **how)
        else:
            source = locate(options.source, huggingface.PATTERNS)
            merge(source, options.target, options.adapter, **how)

    return guard(convert)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # little is computed; accelerators stay free
    sys.exit(main())
