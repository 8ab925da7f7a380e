"""AdamW as language models are trained: warm-up, cosine, decay of matrices only."""

import dataclasses

import jax
import optax


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How far each step goes."""

    learning_rate: float = 1e-4  # the peak
    steps: int = 1000  # until the learning rate has fallen to `final_fraction` of the peak
    warmup_steps: int = 50
    final_fraction: float = 0.0
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    clip_norm: float = 1.0
    frozen: tuple[str, ...] = ("encoder.positions",)  # path prefixes that never move

    def __post_init__(self):
        if not 0 <= self.warmup_steps < self.steps:
            raise ValueError(
                f"wanted fewer warm-up steps than the {self.steps} steps, got {self.warmup_steps}"
            )

    def schedule(self) -> optax.Schedule:
        return optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=self.learning_rate,
            warmup_steps=self.warmup_steps,
            decay_steps=self.steps,
            end_value=self.learning_rate * self.final_fraction,
        )

    def make(self) -> optax.GradientTransformation:
        """The transformation from gradients to updates."""
        adamw = optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            optax.adamw(
                self.schedule(),
                b1=self.b1,
                b2=self.b2,
                weight_decay=self.weight_decay,
                mask=lambda params: by_path(params, _decays),
            ),
        )
        is_frozen = lambda path: any(
            path == prefix or path.startswith(f"{prefix}.") for prefix in self.frozen
        )
        label = lambda path: "frozen" if is_frozen(path) else "trained"
        return optax.partition(
            {"trained": adamw, "frozen": optax.set_to_zero()},
            lambda params: by_path(params, label),
        )


def _decays(path: str) -> bool:
    """Matrices decay; norms, biases and positions do not."""
    return path.endswith((".kernel", ".embedding"))


def by_path(params, f):
    """`f("encoder.conv1.kernel")` in the place of every parameter."""
    return jax.tree.map_with_path(
        lambda path, _: f(".".join(_names(path))), params, is_leaf=lambda x: x is None
    )


def _names(path):
    keys = (getattr(k, "key", getattr(k, "name", getattr(k, "idx", None))) for k in path)
    return [str(k) for k in keys if k not in ("value", None)]
