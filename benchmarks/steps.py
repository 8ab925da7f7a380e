"""A step of training, of transformers' model and of ours, that `benchmarks.training` times."""

import dataclasses
import importlib.util
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
import safetensors.torch
import torch
from flax import nnx

from qwen2audio_jax import Qwen2Audio
from qwen2audio_jax.config import Config
from qwen2audio_jax.training import lora, peft
from qwen2audio_jax.training.learner import Learner
from qwen2audio_jax.training.lora import LoraConfig
from qwen2audio_jax.training.loss import next_token
from qwen2audio_jax.training.optimizer import OptimizerConfig
from qwen2audio_jax.weights import table

SETTINGS = {"schedule_type": "constant", "warmup_steps": 0}
LORA = LoraConfig()  # PEFT's r of 8, on every linear layer of the decoder

Batch = Mapping[str, np.ndarray]
Step = Callable[[], float]


@dataclasses.dataclass(frozen=True)
class How:
    """What trains, and in what arithmetic.

    In bfloat16 both sides compute blocks again for the backward pass, ours as far as `remat` says,
    and keep moments in the dtype of what trains: bfloat16, or the float32 of adapters.

    Attributes:
      remat_policy: ours; None: what memory leaves room for.
    """

    lora: bool = False
    dtype: str = "float32"
    device: str = "cpu"
    remat_policy: str | None = None

    @property
    def spares(self) -> bool:
        """Whether memory is short."""
        return self.dtype == "bfloat16"

    @property
    def remat(self) -> str:
        """What our blocks keep for the backward pass. Adapters leave room for all products, without
        which frozen matrices would be multiplied by a second time: 1.45 times the model's work."""
        usual = ("minimal" if self.lora else "full") if self.spares else "none"
        return self.remat_policy or usual

    @property
    def optimizer(self) -> OptimizerConfig:
        short = {"mu_dtype": "bfloat16", "nu_dtype": "bfloat16"}
        return OptimizerConfig(**SETTINGS, **(short if self.spares and not self.lora else {}))


def ours(model: Qwen2Audio, batch: Batch, how: How) -> tuple[Step, float]:
    """A step of qwen2audio_jax that returns its loss, and its model's FLOPs."""
    loss = partial(next_token, remat=how.remat)
    learner = Learner(model, how.optimizer, loss, adapters=LORA if how.lora else None)

    def step():
        metrics = learner.step(batch, 0)
        jax.block_until_ready(learner.state)
        return float(metrics["loss"])

    return step, learner.flops(batch)


def theirs(model: Any, batch: Batch, how: How) -> Step:
    """A step of transformers, with what `how.optimizer` says in torch's terms."""
    c, trained = how.optimizer, trained_of(model)
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": c.weight_decay},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=c.learning_rate, betas=(c.b1, c.b2), eps=c.eps, fused=True)
    inputs = {name: torch.from_numpy(x).to(how.device) for name, x in batch.items()}
    inputs["input_ids"], inputs["labels"] = inputs["input_ids"].long(), inputs["labels"].long()
    model.train()
    if how.spares:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if how.spares and how.lora:
        model.disable_input_require_grads()  # else the encoder, too, is gone through backwards

    def step():
        adamw.zero_grad()
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, c.clip_norm)
        adamw.step()
        return loss.item()  # waits for all of it

    return step


def trained_of(model: Any) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def adapt(model: Any, sizes: Config) -> Any:
    """Transformers' model with the adapters that ours begins with: PEFT's, if that is installed."""
    shapes = nnx.eval_shape(lambda: Qwen2Audio(sizes, scan_layers=False, rngs=nnx.Rngs(0)))
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        peft.save(folder, lora.init(LORA, shapes, key=jax.random.key(0)), LORA, shapes)
        if importlib.util.find_spec("peft"):
            from peft import PeftModel

            return PeftModel.from_pretrained(model, folder, is_trainable=True)
        tensors = safetensors.torch.load_file(folder / peft.WEIGHTS)
    model.requires_grad_(False)
    for path, module in list(model.named_modules()):
        stored = peft.PREFIX + table.on_disk(f"{path}.weight").removesuffix("weight")
        if f"{stored}lora_A.weight" in tensors:
            pair = (tensors.pop(f"{stored}{letter}.weight") for letter in (lora.A, lora.B))
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, Adapted(module, *pair))
    if tensors:
        raise ValueError(f"transformers lacks what is adapted: {', '.join(tensors)}")
    return model


class Adapted(torch.nn.Module):
    """A linear layer with what its adapter adds, as PEFT computes it."""

    def __init__(self, base: torch.nn.Linear, a: torch.Tensor, b: torch.Tensor):
        super().__init__()
        self.base = base
        self.lora_A, self.lora_B = (
            torch.nn.Parameter(x.to(base.weight.device, torch.float32)) for x in (a, b)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        added = x.to(self.lora_A.dtype) @ self.lora_A.T @ self.lora_B.T
        return (y + added * LORA.scale).to(y.dtype)
