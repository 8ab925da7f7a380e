"""LoRA adapters in PEFT's folders: adapter_config.json and adapter_model.safetensors."""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jaxtyping import Float

from qwen2audio_jax.model import Qwen2Audio
from qwen2audio_jax.training import lora, whole
from qwen2audio_jax.training.lora import Adapters, LoraConfig
from qwen2audio_jax.weights import huggingface, table
from qwen2audio_jax.weights import settings as model_settings
from qwen2audio_jax.weights.source import locate

SETTINGS, WEIGHTS = model_settings.ADAPTER, "adapter_model.safetensors"
PREFIX = "base_model.model."

# PEFT's settings that do not change what an adapter computes
_INERT = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path"),
    *("revision", "inference_mode", "megatron_core", "qalora_group_size", "layers_pattern"),
}
_NEUTRAL = (None, False, "none", {}, [])
_HARMLESS_INITS = (True, False, "gaussian", "eva", "orthogonal")  # others change the base too


def save(
    folder: str | pathlib.Path,
    adapters: Adapters,
    config: LoraConfig,
    model: Qwen2Audio,
    *,
    base: str | None = None,
) -> None:
    """Writes a folder that PEFT loads.

    Args:
      model: the base, for its sizes.
      base: where others find the base's weights: a hub id or a folder.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for entry in lora.targets(config, model):
        adapter = lora.of_layer(adapters, entry)
        for name, row in lora.matrices(entry, config.r).items():
            tensor = row.to_theirs(np.asarray(adapter[name], np.float32))
            tensors[PREFIX + _exported(row.name)] = np.ascontiguousarray(tensor)
    for entry in lora.saved(config, model):
        path, name = whole.split(entry)
        tensor = entry.to_theirs(np.asarray(adapters[path][name], np.float32))
        # of these PEFT knows no other names than those that are in memory now
        tensors[PREFIX + table.in_memory(entry.name)] = np.ascontiguousarray(tensor)
    safetensors.numpy.save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    settings = dataclasses.asdict(config) | {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "bias": "none",
        "modules_to_save": list(config.modules_to_save) or None,
    }
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")


def _exported(name: str) -> str:
    """The name of an adapter that PEFT finds with as many versions of transformers as can be.

    With transformers 5 it knows the decoder's modules by their names in transformers 4 too, but
    those of the encoder and the projector by their new names alone.
    """
    return name if name.startswith("language_model.") else f"model.{name}"


def load(source: str | os.PathLike, model: Qwen2Audio) -> tuple[LoraConfig, Adapters]:
    """Reads what `save` or PEFT wrote, for adapters of this model.

    Args:
      source: a folder, or a hub id as "owner/name".

    Raises:
      ValueError: it is none, asks for what is not supported, or its tensors are not those that
        its `target_modules` have in this model; the message names them all.
    """
    config, pairs, saved = _read(source, model)
    ours, modules = [], {}
    for entry, pair in pairs:
        rows = lora.matrices(entry, config.r)
        kept = {name: np.array(rows[name].to_ours(x), order="C") for name, x in pair.items()}
        ours.append((entry, {name: jnp.asarray(x) for name, x in kept.items()}))
    for entry, tensor in saved:
        path, name = whole.split(entry)
        modules.setdefault(path, {})[name] = jnp.asarray(np.array(entry.to_ours(tensor), order="C"))
    return config, lora.stacked(ours, model) | modules


def read_config(source: str | os.PathLike) -> LoraConfig:
    """How the adapters of a folder, or of a hub id, adapt.

    Raises:
      ValueError: there are none, or they ask for what is not supported.
    """
    return _read_settings(_located(source))


def adapted(
    source: str | os.PathLike, model: Qwen2Audio
) -> dict[str, Callable[[Float[np.ndarray, "..."]], Float[np.ndarray, "..."]]]:
    """What adapters make of weights, in float32: they add lora_alpha / r * B A, and what they have
    whole takes the place of what is there.

    Args:
      source, model: as in `load`; the model may be of shapes alone.

    Returns:
      by the weights' names in Hugging Face's files, and in their axes.

    Raises:
      ValueError: as in `load`.
    """
    config, pairs, saved = _read(source, model)
    add = lambda pair, weight: weight + config.scale * (pair[lora.B] @ pair[lora.A])
    made = {entry.name: functools.partial(add, pair) for entry, pair in pairs}
    return made | {entry.name: lambda _, own=tensor: own for entry, tensor in saved}


def _located(source: str | os.PathLike) -> pathlib.Path:
    return locate(os.fspath(source), (SETTINGS, WEIGHTS))


def _read(
    source: str | os.PathLike, model: Qwen2Audio
) -> tuple[
    LoraConfig,
    list[tuple[table.Entry, dict[str, np.ndarray]]],
    list[tuple[table.Entry, np.ndarray]],
]:
    """The weights that are adapted, each with its two matrices as PEFT has them, and those that
    are there whole; in float32."""
    folder = _located(source)
    config = _read_settings(folder)
    found = _read_tensors(folder / WEIGHTS)
    pairs, saved, problems = [], [], []

    def take(row: table.Entry) -> np.ndarray | None:
        tensor = found.pop(row.name, None)
        if tensor is None:
            problems.append(f"{row.name} is missing")
        elif tensor.shape != row.their_shape:
            problems.append(f"{row.name} has shape {tensor.shape}, wanted {row.their_shape}")
        return None if tensor is None else np.asarray(tensor, np.float32)

    for entry in lora.targets(config, model):
        rows = lora.matrices(entry, config.r)
        pairs.append((entry, {name: take(row) for name, row in rows.items()}))
    for entry in lora.saved(config, model):
        saved.append((entry, take(entry)))
    problems += [f"{key} is unknown" for key in found]
    if problems:
        raise ValueError(f"{folder} has no adapters of this model: {'; '.join(problems)}")
    return config, pairs, saved


def _read_settings(folder: pathlib.Path) -> LoraConfig:
    path = folder / SETTINGS
    if not path.is_file():
        raise ValueError(f"wanted an adapter in {folder}, got a folder without {SETTINGS}")
    try:
        settings = json.loads(path.read_text("utf-8"))
        if settings["peft_type"] != "LORA":
            raise ValueError(f"wanted peft_type LORA, got {settings['peft_type']}")
        names = {f.name for f in dataclasses.fields(LoraConfig)} - {"modules_to_save"}
        fields = {name: settings.pop(name) for name in names}
        fields["modules_to_save"] = tuple(sorted(settings.pop("modules_to_save", None) or ()))
        if not isinstance(fields["target_modules"], str):
            fields["target_modules"] = tuple(sorted(fields["target_modules"]))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} holds no LoRA settings: {error!r}") from error
    if settings.get("init_lora_weights") in _HARMLESS_INITS:
        del settings["init_lora_weights"]
    if wrong := [k for k, v in settings.items() if k not in _INERT and v not in _NEUTRAL]:
        wrong = ", ".join(f"{name}={settings[name]!r}" for name in wrong)
        raise ValueError(f"{path} asks for what is not supported: {wrong}")
    return LoraConfig(**fields)


def _read_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors, by their names without PEFT's prefix."""
    if not path.is_file():
        raise ValueError(f"wanted {path.name} in {path.parent}, got none")
    raw, infos = huggingface.header(path)
    infos.pop("__metadata__", None)
    tensors = {}
    for key, info in infos.items():
        begin, end = info["data_offsets"]
        dtype, shape = huggingface.DTYPES.get(info["dtype"]), tuple(info["shape"])
        if dtype is None or len(raw) + end > path.stat().st_size:
            raise ValueError(f"{path} is damaged at {key}: {info['dtype']}, bytes {begin}:{end}")
        tensor = huggingface.Tensor(path, len(raw) + begin, dtype, shape)
        tensors[table.on_disk(key.removeprefix(PREFIX))] = tensor.read()
    return tensors
