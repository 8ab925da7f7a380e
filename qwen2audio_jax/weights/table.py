"""Every parameter, once: its name in Hugging Face's files, its path in ours, and its axes.

Read from left to right the rows import, from right to left they export, and the right-hand axes
tell `sharding.py` what may be split. Axes are einops words in the alphabet of `config.py`; where
a letter occurs twice, one of them has a suffix (`E_in`). `{i}` numbers the layers.
"""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import einops
import jax

from qwen2audio_jax.config import Config

# fmt: off
# Hugging Face's prefix, ours, and below them: Hugging Face's name, our path, axes
GROUPS = (
    ("audio_tower.", "encoder.", (
        ("conv1.weight",           "conv1.kernel", "E M taps -> taps M E"),
        ("conv1.bias",             "conv1.bias",   "E -> E"),
        ("conv2.weight",           "conv2.kernel", "E E_in taps -> taps E_in E"),
        ("conv2.bias",             "conv2.bias",   "E -> E"),
        ("embed_positions.weight", "positions",    "P E -> P E"),
        ("layer_norm.weight",      "norm.scale",   "E -> E"),
        ("layer_norm.bias",        "norm.bias",    "E -> E"),
    )),
    ("audio_tower.layers.{i}.", "encoder.blocks.", (
        ("self_attn_layer_norm.weight", "attention_norm.scale",   "E -> E"),
        ("self_attn_layer_norm.bias",   "attention_norm.bias",    "E -> E"),
        ("self_attn.q_proj.weight",     "attention.query.kernel", "(N H) E -> E N H"),
        ("self_attn.q_proj.bias",       "attention.query.bias",   "(N H) -> N H"),
        ("self_attn.k_proj.weight",     "attention.key.kernel",   "(N H) E -> E N H"),
        ("self_attn.v_proj.weight",     "attention.value.kernel", "(N H) E -> E N H"),
        ("self_attn.v_proj.bias",       "attention.value.bias",   "(N H) -> N H"),
        ("self_attn.out_proj.weight",   "attention.out.kernel",   "E (N H) -> N H E"),
        ("self_attn.out_proj.bias",     "attention.out.bias",     "E -> E"),
        ("final_layer_norm.weight",     "mlp_norm.scale",         "E -> E"),
        ("final_layer_norm.bias",       "mlp_norm.bias",          "E -> E"),
        ("fc1.weight",                  "up.kernel",              "F E -> E F"),
        ("fc1.bias",                    "up.bias",                "F -> F"),
        ("fc2.weight",                  "down.kernel",            "E F -> F E"),
        ("fc2.bias",                    "down.bias",              "E -> E"),
    )),
    ("multi_modal_projector.linear.", "projector.", (
        ("weight", "kernel", "D E -> E D"),
        ("bias",   "bias",   "D -> D"),
    )),
    ("language_model.", "decoder.", (
        ("model.embed_tokens.weight", "embedding.embedding", "V D -> V D"),
        ("model.norm.weight",         "norm.scale",          "D -> D"),
        ("lm_head.weight",            "head.embedding",      "V D -> V D"),
    )),
    ("language_model.model.layers.{i}.", "decoder.blocks.", (
        ("input_layernorm.weight",          "attention_norm.scale",   "D -> D"),
        ("self_attn.q_proj.weight",         "attention.query.kernel", "(N H) D -> D N H"),
        ("self_attn.q_proj.bias",           "attention.query.bias",   "(N H) -> N H"),
        ("self_attn.k_proj.weight",         "attention.key.kernel",   "(K H) D -> D K H"),
        ("self_attn.k_proj.bias",           "attention.key.bias",     "(K H) -> K H"),
        ("self_attn.v_proj.weight",         "attention.value.kernel", "(K H) D -> D K H"),
        ("self_attn.v_proj.bias",           "attention.value.bias",   "(K H) -> K H"),
        ("self_attn.o_proj.weight",         "attention.out.kernel",   "D (N H) -> N H D"),
        ("post_attention_layernorm.weight", "mlp_norm.scale",         "D -> D"),
        ("mlp.gate_proj.weight",            "mlp.gate.kernel",        "F D -> D F"),
        ("mlp.up_proj.weight",              "mlp.up.kernel",          "F D -> D F"),
        ("mlp.down_proj.weight",            "mlp.down.kernel",        "D F -> F D"),
    )),
)
# fmt: on

ROWS = tuple(
    (theirs + name, ours + path, axes) for theirs, ours, rows in GROUPS for name, path, axes in rows
)

EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"

# transformers >= 5 in memory, and what it calls the same on disk
IN_MEMORY = (
    ("model.language_model.", "language_model.model."),
    ("lm_head", "language_model.lm_head"),
    ("model.", ""),
)


class Entry(NamedTuple):
    """One parameter of one layer.

    Attributes:
      name: in Hugging Face's files.
      path: in ours, without the layer's number.
      layer: its number, None outside the blocks.
      axes: einops words, Hugging Face's on the left.
      sizes: of every letter in `axes`.
    """

    name: str
    path: str
    layer: int | None
    axes: str
    sizes: dict[str, int]

    @property
    def their_shape(self) -> tuple[int, ...]:
        return _shape(self.axes.partition(" -> ")[0], self.sizes)

    @property
    def our_shape(self) -> tuple[int, ...]:
        return _shape(self.axes.partition(" -> ")[2], self.sizes)

    @property
    def key(self) -> str:
        return key(self.path, self.layer)

    @property
    def count(self) -> int:
        return math.prod(self.our_shape)

    def to_ours(self, tensor: Any) -> Any:
        """Rearranges a numpy array without copying what need not be."""
        return einops.rearrange(tensor, self.axes, **self.sizes)

    def to_theirs(self, array: Any) -> Any:
        left, _, right = self.axes.partition(" -> ")
        return einops.rearrange(array, f"{right} -> {left}", **self.sizes)


def entries(config: Config) -> Iterator[Entry]:
    """Every parameter of a model of these sizes, in the table's order."""
    for name, path, axes in ROWS:
        if name == HEAD and config.decoder.tied:
            continue
        tower = config.encoder if path.startswith("encoder.") else config.decoder
        every = _sizes(config, tower)
        sizes = {word: every[word.partition("_")[0]] for word in re.findall(r"\w+", axes)}
        if "{i}" not in name:
            yield Entry(name, path, None, axes, sizes)
            continue
        for i in range(tower.layers):
            yield Entry(name.format(i=i), path, i, axes, sizes)


# the letters of our axes, by our path
LETTERS = {
    path: tuple(word.partition("_")[0] for word in axes.partition(" -> ")[2].split())
    for _, path, axes in ROWS
}


def on_disk(name: str) -> str:
    """Hugging Face's name on disk, of a name on disk or in memory."""
    for memory, disk in IN_MEMORY:
        if name.startswith(memory):
            return disk + name.removeprefix(memory)
    return name


def in_memory(name: str) -> str:
    """What transformers >= 5 calls a parameter or a module in memory, by its name on disk."""
    memory, disk = next(names for names in IN_MEMORY if name.startswith(names[1]))
    return memory + name.removeprefix(disk)


def _sizes(config: Config, tower) -> dict[str, int]:
    return {
        "E": config.encoder.width,
        "M": config.encoder.mels,
        "P": config.encoder.positions,
        "D": config.decoder.width,
        "V": config.decoder.vocabulary,
        "N": tower.heads,
        "K": getattr(tower, "kv_heads", tower.heads),
        "H": tower.head_width,
        "F": tower.hidden,
        "taps": 3,
    }


def _shape(words: str, sizes: dict[str, int]) -> tuple[int, ...]:
    groups = re.findall(r"\(([^)]*)\)|(\S+)", words)
    return tuple(math.prod(sizes[word] for word in (a or b).split()) for a, b in groups)


def split(path: tuple[Any, ...]) -> tuple[str, int | None]:
    """Our path and the layer's number, of a jax key path into a model or its state."""
    if isinstance(path[-1], jax.tree_util.GetAttrKey):  # what a variable calls its content
        path = path[:-1]
    words = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
    numbers = [int(word) for word in words if word.isdigit()]
    return ".".join(w for w in words if not w.isdigit()), numbers[0] if numbers else None


def key(path: str, layer: int | None) -> str:
    """Our path with the layer's number in it."""
    return path if layer is None else path.replace("blocks", f"blocks.{layer}")
