"""The two sides that are compared, transformers and us, and what the comparisons share."""

import ctypes
import dataclasses
import gc
import json
import os
import pathlib
import platform
import sys
import threading
import time
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import torch
import transformers
from transformers import initialization

from qwen2audio_jax import Processor, weights
from qwen2audio_jax.config import PRESETS, Config, DecoderConfig, EncoderConfig
from qwen2audio_jax.generate import GREEDY, decode, listen, prefill, unpad
from qwen2audio_jax.model import Qwen2Audio
from qwen2audio_jax.sampling import rules_for
from qwen2audio_jax.weights import settings, table

IDS = {"audio_token": 3, "pad_token": 0, "end_tokens": (0, 2)}
SIZES = PRESETS | {
    "7b": PRESETS["qwen2-audio-7b"],
    # Qwen2-Audio's encoder, and a decoder of its decoder's proportions
    "mid": Config(decoder=DecoderConfig(layers=12, width=1024, heads=8, kv_heads=8, hidden=2752)),
    # Whisper base's encoder with two layers more, and a decoder of half Qwen2-0.5B's layers
    "100m": Config(
        encoder=EncoderConfig(layers=8, width=512, heads=8, hidden=2048),
        decoder=DecoderConfig(
            layers=12,
            width=640,
            heads=10,
            kv_heads=10,
            head_width=64,
            hidden=1728,
            vocabulary=32_000,
            tied=True,
        ),
        **IDS,
    ),
}
QUESTION = "What is that sound?"
RATE = 16_000
GIB = 2**30


def sizes_of(name: str) -> Config:
    """A preset with the token ids of the tokenizer that the benchmark makes."""
    return dataclasses.replace(SIZES[name], **IDS)


def make_clip(seconds: float) -> np.ndarray:
    """Voiced syllables, four a second, in a little noise."""
    t = np.arange(round(seconds * RATE)) / RATE
    rng = np.random.default_rng(0)
    pitch = 120 + 30 * np.sin(2 * np.pi * 0.7 * t)
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    voice = sum(np.sin(n * phase) / n for n in range(1, 20))
    syllables = np.clip(np.sin(2 * np.pi * 2 * t), 0, None)
    return (0.1 * voice * syllables + 0.005 * rng.standard_normal(len(t))).astype(np.float32)


def build(
    sizes: Config, dtype: str, device: str, *, scan_layers: bool = False
) -> tuple[Qwen2Audio, Any]:
    """Our model and transformers', with the same random parameters, each made on the device."""
    theirs, take = _theirs(sizes, dtype, device)
    return _ours(sizes, dtype, take, scan_layers=scan_layers), theirs


def build_one(name: str, sizes: Config, dtype: str, device: str) -> Any:
    """One of `build`'s two models, "ours" or "theirs", where memory has no room for both."""
    if name == "ours":
        return _ours(sizes, dtype, lambda row, array: None, scan_layers=True)
    theirs, take = _theirs(sizes, dtype, device)
    for seed, row in enumerate(_rows(sizes)):
        take(row, _drawn(seed, row, jnp.dtype(dtype)))
    return theirs


def _rows(sizes: Config) -> list[table.Entry]:
    """Parameters in the order in which `weights.fill` asks for them."""
    layers: dict[str, list[table.Entry]] = {}
    for row in table.entries(sizes):
        layers.setdefault(row.path, []).append(row)
    return [row for rows in layers.values() for row in rows]


def _ours(sizes, dtype, take, *, scan_layers):
    numbers = {row.key: (seed, row) for seed, row in enumerate(_rows(sizes))}

    def read(keys, shape, dtype, place):
        arrays = []
        for key in keys:
            seed, row = numbers[key]
            arrays.append(_drawn(seed, row, dtype))
            take(row, arrays[-1])
        return arrays

    how = {"mesh": None, "scan_layers": scan_layers, "progress": False}
    return weights.fill(sizes, read, dtype=jnp.dtype(dtype), **how)


def _theirs(sizes, dtype, device):
    """Transformers' model, and what puts a parameter of ours into it."""
    told = transformers.Qwen2AudioConfig(**settings.describe(sizes, dtype))
    torch.set_default_dtype(getattr(torch, dtype))
    with torch.device(device), initialization.no_init_weights():
        theirs = transformers.Qwen2AudioForConditionalGeneration(told).eval()
    torch.set_default_dtype(torch.float32)
    theirs.generation_config.eos_token_id = None  # answers of one length
    theirs.generation_config.pad_token_id = sizes.pad_token
    if sizes.decoder.tied:
        theirs.lm_head.weight = theirs.model.language_model.embed_tokens.weight
    named = {table.on_disk(name): p for name, p in theirs.named_parameters()}
    if sizes.decoder.tied:
        named.pop(table.HEAD, None)
    if more := named.keys() - {row.name for row in _rows(sizes)}:
        raise ValueError(f"transformers has parameters that we lack: {', '.join(sorted(more))}")

    @torch.no_grad()
    def take(row: table.Entry, array: jax.Array) -> None:
        named[row.name].copy_(torch.from_dlpack(row.to_theirs(array)))

    return theirs, take


def _drawn(seed: int, row: table.Entry, dtype: Any) -> jax.Array:
    return _random(seed, 1.0 if row.key.endswith("scale") else 0.0, row.our_shape, dtype)


@jax.jit(static_argnames=("shape", "dtype"))
def _random(seed, mean, shape, dtype):
    key = jax.random.key(seed, impl="unsafe_rbg")  # 8 billion numbers in seconds
    return (mean + 0.02 * jax.random.normal(key, shape)).astype(dtype)


class Run(NamedTuple):
    """One answer: the prompt's length, seconds to the end of each stage, the tokens."""

    prompt: int
    features: float
    encoder: float
    first: float
    last: float
    tokens: list[int]


class Ours:
    """qwen2audio_jax."""

    def __init__(self, model: Qwen2Audio, folder: pathlib.Path):
        self.model, self.processor = model, Processor.from_pretrained(folder)

    def __call__(self, wave: np.ndarray, new: int) -> Run:
        start = time.perf_counter()
        clock = lambda: time.perf_counter() - start
        inputs = self.processor(conversation((wave, RATE)))
        features = clock()
        heard = jax.block_until_ready(listen(self.model, inputs))
        encoder = clock()
        rows = unpad(inputs)
        rules = rules_for(self.model.config, GREEDY, end_tokens=())
        logits, cache = prefill(self.model, rows, heard, new)
        pieces = decode(self.model, rows, logits, cache, rules, new)
        made = [next(pieces)[0]]
        first = clock()
        made += [tokens for tokens, _ in pieces]
        tokens = np.concatenate(made, axis=1)[0].tolist()
        return Run(len(rows[0]), features, encoder, first, clock(), tokens)


class Theirs(transformers.generation.BaseStreamer):
    """transformers, with the attention it is asked for; it tells of each token when it has it."""

    def __init__(self, model: Any, folder: pathlib.Path, attention: str):
        self.model, self.attention = model, attention
        self.processor = transformers.AutoProcessor.from_pretrained(folder)
        self.start, self.notes = 0.0, {}

    @torch.inference_mode()
    def __call__(self, wave: np.ndarray, new: int) -> Run:
        self.model.set_attn_implementation(self.attention)
        tower = self.model.model.audio_tower
        hooks = (
            tower.register_forward_pre_hook(lambda *_: self._note("features")),
            tower.register_forward_hook(lambda *_: self._note("encoder")),
        )
        self.start, self.notes = time.perf_counter(), {"tokens": []}
        prompt = self.processor.apply_chat_template(
            conversation("clip"), add_generation_prompt=True, tokenize=False
        )
        inputs = self.processor(text=prompt, audio=[wave], sampling_rate=RATE, return_tensors="pt")
        inputs = inputs.to(self.model.device)
        out = self.model.generate(**inputs, max_new_tokens=new, do_sample=False, streamer=self)
        for hook in hooks:
            hook.remove()
        length = inputs["input_ids"].shape[1]
        tokens = out[0, length:].tolist()
        # a streamer is told of the prompt before it is told of tokens
        _, first, *_, last = self.notes["tokens"]
        return Run(length, self.notes["features"], self.notes["encoder"], first, last, tokens)

    def _note(self, stage):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.notes[stage] = time.perf_counter() - self.start

    def put(self, value):
        self.notes["tokens"].append(time.perf_counter() - self.start)

    def end(self):
        pass


def conversation(clip: Any) -> list[dict]:
    parts = [{"type": "audio", "audio": clip}, {"type": "text", "text": QUESTION}]
    return [{"role": "user", "content": parts}]


class Peak:
    """The rise of this process's resident memory while it is entered, in bytes."""

    def __enter__(self):
        gc.collect()
        if sys.platform == "linux":
            # what one side has freed must not hide what the other takes
            ctypes.CDLL(None).malloc_trim(0)
        self.process, self.done = psutil.Process(), threading.Event()
        self.base = self.top = self.process.memory_info().rss
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self):
        while not self.done.wait(0.01):
            self.top = max(self.top, self.process.memory_info().rss)

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()

    @property
    def rise(self) -> int:
        return self.top - self.base


def machine() -> dict[str, Any]:
    """What the figures were made on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    cpu = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(": ")[2] if names else cpu
    packages = ("jax", "jaxlib", "flax", "torch", "transformers")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": device,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / GIB),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
    }


def save(path: pathlib.Path, content: dict[str, Any], about: str, tables: list[str]) -> None:
    """Writes figures as JSON, and beside them tables under a line on what they are of."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    versions = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    device = f"{content['device']}, {content['cpu']}, {content['cores']} cores"
    head = f"{about}; {device}; {content['date']}; {versions}"
    path.with_suffix(".md").write_text("\n\n".join([head, *tables]) + "\n", "utf-8")
