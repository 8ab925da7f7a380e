"""How far a step goes, and what takes it: schedules, decay of matrices only, rates per part."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

PARTS = ("encoder", "projector", "decoder", "embeddings")
RATES = ("learning_rate", *(f"{part}_learning_rate" for part in PARTS))
FROZEN = ("encoder.positions",)  # sines and cosines
# What a run may go on with otherwise: no state's shape depends on it, but for rates of 0.
ADJUSTABLE = (
    *RATES,
    *("final_fraction", "schedule_type", "steps", "warmup_steps"),
    *("decay_fraction", "weight_decay", "clip_norm"),
)
FACTORED = 64  # the shortest side of what Adafactor factors: the encoder's heads are as wide
MUON_RMS = 0.5  # Adam's updates are of about this size, in units of the learning rate


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How far each step goes, and what takes it."""

    name: Literal["adamw", "adam", "adafactor", "muon"] = "adamw"
    """adam is adamw without decay; adafactor keeps row and column sums in place of each matrix's
    second moments, and no first ones (optax has no 8-bit Adam), so that b1, b2, eps and the dtypes
    of moments are not its own; muon makes the updates of blocks' matrices orthogonal, and is adamw
    for all else, adapters among it."""
    learning_rate: float = 1e-4
    """The peak."""
    encoder_learning_rate: float | None = None
    """The audio encoder's own peak; 0 freezes it, None is `learning_rate`."""
    projector_learning_rate: float | None = None
    """Likewise the projector's."""
    decoder_learning_rate: float | None = None
    """Likewise that of the decoder, but for its embeddings."""
    embeddings_learning_rate: float | None = None
    """Likewise that of the token embeddings and of the output head."""
    frozen: tuple[str, ...] = ()
    """Prefixes of paths that never move, as `decoder.blocks.mlp`, whether blocks are a stack or a
    list. The encoder's table of positions never does."""
    schedule_type: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """What follows the warm-up: a fall over all other steps, a plateau with a linear fall at its
    end (wsd), or a plateau."""
    steps: int = 1000
    """Until the learning rate has fallen to `final_fraction` of the peak."""
    warmup_steps: int | float = 50
    """Steps in which the learning rate rises from 0; below 1, the part that they are of all."""
    decay_fraction: float = 0.1
    """The part of the steps in which wsd falls."""
    final_fraction: float = 0.0
    """The last learning rate, relative to the peak."""
    weight_decay: float = 0.1
    """Per step and learning rate, of all but norms, biases and positions."""
    b1: float = 0.9
    """Adam's memory of gradients."""
    muon_beta: float = 0.95
    """Muon's, of those of blocks' matrices."""
    b2: float = 0.95
    """Adam's memory of squared gradients."""
    eps: float = 1e-8
    """Adam's floor under the root of the second moment."""
    mu_dtype: Literal["float32", "bfloat16"] = "float32"
    """Adam's and Muon's first moments are kept in this."""
    nu_dtype: Literal["float32", "bfloat16"] = "float32"
    """Adam's second moments; bfloat16 wants a b2 of at most 0.99, or what is new gets lost."""
    clip_norm: float = 1.0
    """The longest gradient, over all that trains; 0 clips none."""
    ema_decay: float = 0.0
    """If more than 0, an average of the parameters over some 1 / (1 - ema_decay) steps, or as many
    as there were, is kept; it is what is measured, and what comes out."""

    def __post_init__(self):
        if self.warmup_steps < 0 or self.warmup >= self.steps:  # a part of the steps is rounded
            raise ValueError(
                f"wanted fewer warm-up steps than the {self.steps} steps, got {self.warmup_steps}"
            )
        if self.warmup_steps >= 1 and self.warmup_steps % 1:
            raise ValueError(
                f"wanted whole warm-up steps, or a part below 1, got {self.warmup_steps}"
            )
        if self.decay_steps > self.steps - self.warmup:
            raise ValueError(
                f"wanted warm-up and decay within {self.steps} steps, "
                f"got {self.warmup} and {self.decay_steps}"
            )
        for name in ("final_fraction", "decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"wanted {name} from 0 to 1, got {getattr(self, name)}")
        for name in ("ema_decay", "b1", "muon_beta", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"wanted {name} from 0 to below 1, got {getattr(self, name)}")
        for name in (*RATES, "weight_decay", "eps", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"wanted {name} from 0, got {value}")

        if self.nu_dtype == "bfloat16" and self.b2 > 0.99:
            raise ValueError(f"wanted a b2 of at most 0.99 beside nu_dtype bfloat16, got {self.b2}")

    @property
    def warmup(self) -> int:
        """Steps in which the learning rate rises."""
        return round(self.warmup_steps * (self.steps if self.warmup_steps < 1 else 1))

    @property
    def decay_steps(self) -> int:
        """Steps in which the learning rate falls."""
        falls = {"constant": 0, "wsd": round(self.decay_fraction * self.steps)}
        return falls.get(self.schedule_type, self.steps - self.warmup)

    def peak(self, part: str) -> float:
        """The highest learning rate of one of `PARTS`, or of the rest."""
        own = getattr(self, f"{part}_learning_rate", None)
        return self.learning_rate if own is None else own

    @property
    def rates(self) -> tuple[str, ...]:
        """The names of the learning rates that something moves by: the one of all that have none
        of their own, and those of parts."""
        own = [part for part in PARTS if getattr(self, f"{part}_learning_rate") is not None]
        names = [f"{part}_learning_rate" for part in own if self.peak(part)]
        return (*(["learning_rate"] if len(own) < len(PARTS) else []), *names)

    def check_change(self, before: Mapping[str, Any]) -> None:
        """Refuses to freeze, in a run that goes on, what has moved, or to move what was frozen.

        Args:
          before: the settings that the run had, by name.

        Raises:
          ValueError: the message names the rate with both values.
        """
        then = OptimizerConfig(**{name: before[name] for name in RATES if name in before})
        for part in PARTS:
            was, now = then.peak(part), self.peak(part)
            if bool(was) != bool(now):
                raise ValueError(
                    f"optimizer.{part}_learning_rate was {was}, now {now}: a run that goes on "
                    "moves the same parts, wanted both 0 or neither"
                )

    def trains(self, path: str) -> bool:
        """Whether the parameter of this path moves."""
        still = (*FROZEN, *self.frozen)
        return self.peak(part_of(path)) > 0 and not any(_under(path, each) for each in still)

    def check(self, paths: Iterable[str]) -> None:
        """Refuses to freeze what is not among a model's parameters.

        Raises:
          ValueError: the message names the prefix.
        """
        paths = list(paths)
        for prefix in self.frozen:
            if not any(_under(path, prefix) for path in paths):
                raise ValueError(f"frozen: no parameter is under {prefix!r}; there is {paths[0]}")

    def schedule(self, part: str = "rest") -> optax.Schedule:
        """The learning rate after so many steps, of one of `PARTS` or of the rest."""
        peak = self.peak(part)
        end, fall = peak * self.final_fraction, self.decay_steps
        pieces = [
            (self.warmup, optax.linear_schedule(0.0, peak, max(self.warmup, 1))),
            (self.steps - self.warmup - fall, optax.constant_schedule(peak)),
        ]
        if self.schedule_type == "cosine":
            pieces.append((fall, optax.cosine_decay_schedule(peak, fall, self.final_fraction)))
        elif self.schedule_type != "constant":
            pieces.append((fall, optax.linear_schedule(peak, end, max(fall, 1))))
        lengths, schedules = zip(*((n, s) for n, s in pieces if n), strict=True)
        return optax.join_schedules(schedules, [sum(lengths[:i]) for i in range(1, len(lengths))])

    def make(self) -> optax.GradientTransformation:
        """The transformation from gradients to updates."""
        clipped = optax.clip_by_global_norm(self.clip_norm) if self.clip_norm else optax.identity()
        chain = [clipped, self._scaled()]  # as long without: a run may go on with it
        if self.name != "adam":
            decays = lambda params: by_path(params, _decays)
            chain.append(optax.add_decayed_weights(self.weight_decay, mask=decays))
        rates = {
            part: optax.scale_by_learning_rate(self.schedule(part)) for part in (*PARTS, "rest")
        }
        chain.append(optax.partition(rates, lambda params: by_path(params, part_of)))
        if self.ema_decay:
            chain.append(_averaging(self.ema_decay))
        label = lambda path: "trained" if self.trains(path) else "frozen"
        return optax.partition(
            {"trained": _in_float32(optax.chain(*chain)), "frozen": optax.set_to_zero()},
            lambda params: by_path(params, label),
        )

    def _scaled(self):
        if self.name == "adafactor":
            factored = optax.scale_by_factored_rms(min_dim_size_to_factor=FACTORED)
            return _layer_by_layer(optax.chain(factored, optax.clip_by_block_rms(1.0)))
        adam = optax.scale_by_adam(self.b1, self.b2, self.eps, mu_dtype=self.mu_dtype)
        adam = _with_second_moments_in(self.nu_dtype, adam)
        momentum = {"beta": self.muon_beta, "mu_dtype": self.mu_dtype}
        return _muon(adam, **momentum) if self.name == "muon" else adam


def _layer_by_layer(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` of each parameter by itself, and of each layer of a stack: as if they were a list."""

    def each(f, path):
        _, stacked, within = name_of(path).partition(".blocks.")
        return jax.vmap(f) if stacked and not within.split(".")[0].isdigit() else f

    def init(params):
        return jax.tree.map_with_path(lambda path, x: each(inner.init, path)(x), params)

    def update(grads, state, params):
        one = lambda path, *args: each(inner.update, path)(*args)
        found = jax.tree.map_with_path(one, grads, state, params)
        part = lambda i: jax.tree.map(lambda _, both: both[i], grads, found)
        return part(0), part(1)

    return optax.GradientTransformation(init, update)


def _with_second_moments_in(
    dtype: str, adam: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Adam that keeps its second moments so between steps; optax has such an option for the first
    ones alone."""
    if dtype == "float32":
        return adam

    def kept(state, dtype):
        return state._replace(nu=jax.tree.map(lambda x: x.astype(dtype), state.nu))

    def update(grads, state, params):
        updates, state = adam.update(grads, kept(state, "float32"), params)
        return updates, kept(state, dtype)

    return optax.GradientTransformation(lambda params: kept(adam.init(params), dtype), update)


def _muon(adam: optax.GradientTransformation, **momentum: Any) -> optax.GradientTransformation:
    """Momentum whose matrices are made orthogonal, for the kernels of blocks; `adam` for the rest.

    Its updates are scaled to Adam's typical size, so that one learning rate serves both.
    """
    kernel = lambda path: ".blocks." in path and path.endswith(".kernel")
    axes = lambda kernels: jax.tree.map_with_path(lambda p, x: _axes(name_of(p), x.ndim), kernels)
    orthogonal = optax.chain(
        optax.contrib.scale_by_muon(weight_dimension_numbers=axes, **momentum),
        optax.stateless(lambda updates, _: jax.tree.map(_scale_orthogonal, updates, axes(updates))),
    )
    label = lambda path: "orthogonal" if kernel(path) else "adam"
    return optax.partition(
        {"orthogonal": orthogonal, "adam": adam}, lambda params: by_path(params, label)
    )


def _axes(path: str, dimensions: int) -> optax.contrib.MuonDimensionNumbers:
    """Which axes of a block's kernel are its inputs and which its outputs; a layer axis neither."""
    axes = tuple(range(dimensions))[-3 if ".attention." in path else -2 :]
    inputs = len(axes) - 1 if path.endswith(".out.kernel") else 1
    return optax.contrib.MuonDimensionNumbers(axes[:inputs], axes[inputs:])


def _scale_orthogonal(update: jax.Array, axes: optax.contrib.MuonDimensionNumbers) -> jax.Array:
    """Gives an orthogonal matrix, whose entries are small as it is large, the size MUON_RMS."""
    sizes = (math.prod(update.shape[i] for i in side) for side in axes)
    return update * MUON_RMS * math.sqrt(max(sizes))


def averaged(opt_state: Any) -> Any:
    """The average of the trained parameters over the last steps, in float32.

    Raises:
      ValueError: the optimizer keeps none.
    """
    found = optax.tree.get(opt_state, "average")
    if found is None:
        raise ValueError("wanted an optimizer with ema_decay, got one that averages no parameters")
    return found


class _Average(NamedTuple):
    average: Any
    steps: jax.Array


def _averaging(decay):
    """Passes updates on and keeps the average of the parameters they lead to, not of those before
    the first step, which would count for much of it in a run that is short. (A warm-up's first
    step is of rate 0, and leads to these.)"""

    def update(updates, state, params):
        moved, steps = optax.apply_updates(params, updates), state.steps + 1
        weight = (decay - 1) / jnp.expm1(steps * math.log(decay))  # / (decay**steps - 1), exactly
        return updates, _Average(optax.incremental_update(moved, state.average, weight), steps)

    # copied: either may be donated
    copied = lambda params: _Average(jax.tree.map(jnp.copy, params), jnp.zeros((), jnp.int32))
    return optax.GradientTransformation(copied, update)


def _in_float32(inner):
    """Moments and averages of parameters of any dtype; small updates get lost in shorter ones."""
    wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
    return optax.GradientTransformation(
        lambda params: inner.init(wide(params)),
        lambda grads, state, params: inner.update(wide(grads), state, wide(params)),
    )


def part_of(path: str) -> str:
    """Which of `PARTS` a parameter belongs to; `rest` is what belongs to none."""
    if path.startswith(("decoder.embedding.", "decoder.head.")):
        return "embeddings"
    part = path.partition(".")[0]
    return part if part in PARTS else "rest"


def _under(path: str, prefix: str) -> bool:
    """Whether a path begins with a prefix, which may leave out the number of a block."""
    plain = ".".join(word for word in path.split(".") if not word.isdigit())
    return any(f"{each}.".startswith(f"{prefix}.") for each in (path, plain))


def _decays(path: str) -> bool:
    """Matrices decay, also those that an adapter adds; norms, biases and positions do not."""
    return path.rpartition(".")[2] not in ("scale", "bias", "positions")


def by_path(params, f):
    """`f("encoder.conv1.kernel")` in the place of every parameter."""
    return jax.tree.map_with_path(
        lambda path, _: f(name_of(path)), params, is_leaf=lambda x: x is None
    )


def name_of(path: Iterable[Any]) -> str:
    """A path of pytree's or nnx's keys as `encoder.conv1.kernel`."""
    keys = [getattr(k, "key", getattr(k, "name", getattr(k, "idx", k))) for k in path]
    if keys[-1:] == ["value"]:  # a parameter's own; attention has a projection that is called so
        keys.pop()
    return ".".join(str(k) for k in keys if k is not None)
