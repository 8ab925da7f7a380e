"""A model taken apart into what trains and what stays, each on its devices, and moved by steps."""

import contextlib
import functools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen2audio_jax import sharding
from qwen2audio_jax.model import Qwen2Audio
from qwen2audio_jax.training import checksum, flops, lora, placement, preference, step
from qwen2audio_jax.training.loss import Sums
from qwen2audio_jax.training.optimizer import PARTS, OptimizerConfig, averaged, part_of
from qwen2audio_jax.training.placement import by_name


class Learner:
    """What a loop drives.

    Args:
      model: given away: its parameters are the first state's, and are donated to the next. One of
        shapes alone, as `nnx.eval_shape` makes, makes a learner that can be lowered but not run.
      loss: of a model and a batch; with `reference` of a `reference` model too.
      adapters: what trains in the place of the model's own parameters.
      start: adapters to begin with, of the same shapes; None: such as change nothing yet.
      reference: whether the loss compares with the model as it was: the base of adapters, with a
        copy of those that it begins with, or a copy of what trains.
      mesh: to spread the parameters over; None: they stay where they are.
      dtype: of the arithmetic, where that is not the parameters' own.
      accumulate: batches that make up a step, along their arrays' first axis.
      seed: of adapters and of their dropout.
      drawn: whether the model's parameters are a seed's, which tell it from no other.

    Attributes:
      state: all that a step changes; a checkpoint holds it.
      dtype: as it was given.
    """

    def __init__(
        self,
        model: Qwen2Audio,
        optimizer: OptimizerConfig,
        loss: Callable[..., Sums],
        *,
        adapters: lora.LoraConfig | None = None,
        start: lora.Adapters | None = None,
        reference: bool = False,
        mesh: Mesh | None = None,
        dtype: Any = None,
        accumulate: int = 1,
        seed: int = 0,
        drawn: bool = False,
    ):
        if mesh is not None:
            graph, whole = nnx.split(model)
            model = nnx.merge(graph, placement.put(whole, sharding.shardings(whole, mesh)))
        self.config, self.optimizer = model.config, optimizer
        self.adapters, self.mesh, self.accumulate = adapters, mesh, accumulate
        self.reference, self.dtype, self._seed = reference, dtype, seed
        self._drawn = drawn if adapters is None else start is None
        optimizer.check(by_name(nnx.state(model)))
        if adapters is None:
            self._graph, params, frozen = step.split(model, optimizer.trains)
            self._fixed = (frozen, placement.copied(params)) if reference else (frozen,)
            self._loss = step.bind(loss, self._graph, dtype=dtype)
        else:
            self._graph, *fixed = nnx.split(model, lambda *_: True, ...)
            params = self._fresh(model, adapters, start)
            began = reference and start is not None
            self._fixed = (*fixed, placement.copied(params)) if began else tuple(fixed)
            self._loss = self._adapted(loss)
        if not jax.tree.leaves(params):
            raise ValueError("nothing trains: every learning rate is 0, or all is frozen")
        self._trained = {part_of(name) for name in by_name(params)}
        self._start(params)

    def _fresh(
        self, model: Qwen2Audio, config: lora.LoraConfig, start: lora.Adapters | None
    ) -> dict[str, Any]:
        graph, base = nnx.split(model)
        key = jax.random.key(self._seed)
        init = lambda base: lora.init(config, nnx.merge(graph, base), key=key)
        params = start or jax.eval_shape(init, base)
        adapted = {part_of(name) for name in by_name(params)}
        for part in PARTS:
            name = f"{part}_learning_rate"
            if getattr(self.optimizer, name) and part not in adapted:
                raise ValueError(
                    f"{name} is of nothing that trains: with LoRA adapters and whole modules "
                    f"do, and neither target_modules nor modules_to_save name any in the {part}"
                )
        if still := [name for name in by_name(params) if not self.optimizer.trains(name)]:
            raise ValueError(
                f"target_modules name {still[0].rpartition('.')[0]}, or modules_to_save do, "
                "whose learning rate is 0 or which is frozen"
            )
        places = None if self.mesh is None else lora.shardings(params, self.mesh)
        if start is None and not placement.is_abstract(base):
            return jax.jit(init, out_shardings=places)(base)  # each is made where it belongs
        return placement.put(params, places)

    def _adapted(self, loss: Callable[..., Sums]) -> Callable[..., Sums]:
        """The loss as a function of adapters: the base is what stays, and the reference."""
        config, seed, reference = self.adapters, self._seed, self.reference

        def of_adapters(adapters, batch, base, rest, began=None):
            key = None
            if "draw" in batch:
                key = jax.random.fold_in(jax.random.key(seed), batch["draw"])

            def of_base(model, batch):
                how = {}
                if reference:
                    how["reference"] = lora.apply(model, began, config) if began else model
                return loss(lora.apply(model, adapters, config, key=key), batch, **how)

            return step.bind(of_base, self._graph, dtype=self.dtype)(base, batch, rest)

        return of_adapters

    def _start(self, params: Any) -> None:
        make = self.optimizer.make()
        begin = partial(step.start, optimizer=make)
        move = partial(
            step.update,
            loss=self._loss,
            optimizer=make,
            gradient_accumulation_steps=self.accumulate,
        )
        places, how = None, {}
        if self.mesh is not None:
            places = placement.state(jax.eval_shape(begin, params), params, self.mesh)
            # Else the compiler chooses, and a resumed run would run another program.
            how = {"out_shardings": (places, None)}
        if placement.is_abstract(params):
            self.state = placement.put(jax.eval_shape(begin, params), places)
        else:
            self.state = jax.jit(begin, out_shardings=places, donate_argnums=0)(params)
        self._update = jax.jit(move, donate_argnums=0, **how)
        self._sums = jax.jit(self._loss)
        everywhere = None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())
        self._score = jax.jit(partial(_score, self.model_of), out_shardings=everywhere)

    def step(self, batch: Mapping[str, Any], number: int) -> dict[str, Any]:
        """Moves the state once; gives what is to be logged, still on its way from the device.

        Args:
          number: of the step, from 0; dropout depends on it.
        """
        with self.on_mesh():
            self.state, metrics = self._update(self.state, self._given(batch, number), self._fixed)
        return metrics

    def lower(self, batch: Mapping[str, Any]) -> jax.stages.Lowered:
        """The program of `step`, to be compiled; of a batch's shapes, which need no arrays."""
        with self.on_mesh():
            return self._update.lower(self.state, self._given(batch, 0), self._fixed)

    def held(self) -> dict[str, Any]:
        """All that devices hold between two steps, by what it is."""
        names = ("frozen", "reference") if self.adapters is None else ("base", "rest", "reference")
        fixed = dict(zip(names, self._fixed, strict=False))
        return {"trained": self.state.params, "optimizer": self.state.opt_state, **fixed}

    def _given(self, batch: Mapping[str, Any], number: int) -> dict[str, Any]:
        batch = {name: x for name, x in batch.items() if name != "rows"}  # which pairs they are
        placed = dict(placement.place(batch, self.mesh, parts=self.accumulate))
        if self.adapters is not None and self.adapters.lora_dropout:
            draws = number * self.accumulate + np.arange(self.accumulate, dtype=np.int32)
            placed |= {"draw": draws if self.accumulate > 1 else draws[0]}
        return placed

    def measure(self, batch: Mapping[str, Any]) -> Sums:
        """The loss on a batch that all hosts have, of the parameters that `model` has."""
        placed = placement.place(batch, self.mesh, shared=True)
        with self.on_mesh():
            return self._sums(self.averaged(), placed, *self._fixed)

    def reference_logps(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """How likely the model finds both answers of each pair; a reference's, before all steps."""
        placed = placement.place(batch, self.mesh, shared=True)
        with self.on_mesh():
            return jax.device_get(self._score(self.averaged(), self._fixed, placed))

    def model(self) -> Qwen2Audio:
        """The model as it is now; where an average of the parameters is kept, with that."""
        return self.model_of(self.averaged(), self._fixed)

    def model_of(self, params: Any, fixed: tuple) -> Qwen2Audio:
        """The model that the loss sees, in its arithmetic's dtype."""
        cast = lambda state: step.cast(state, self.dtype)
        if self.adapters is None:
            return nnx.merge(self._graph, cast(params), cast(fixed[0]))
        return lora.apply(nnx.merge(self._graph, *map(cast, fixed[:2])), params, self.adapters)

    def merged(self) -> Qwen2Audio:
        """As `model`, with adapters in the weights."""
        if self.adapters is None:
            return nnx.merge(self._graph, self.averaged(), self._fixed[0])
        return lora.merge(self.base(), self.averaged(), self.adapters)

    def base(self) -> Qwen2Audio:
        """The model that adapters stand on."""
        return nnx.merge(self._graph, *self._fixed[:2])

    def averaged(self) -> Any:
        """What trains, as it is; its average, where the optimizer keeps one."""
        if not self.optimizer.ema_decay:
            return self.state.params
        average = averaged(self.state.opt_state)
        return jax.tree.map(lambda x, p: x.astype(p.dtype), average, self.state.params)

    def on_mesh(self) -> Any:
        """A context in which the compiler knows of the mesh."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def release(self) -> Any:
        """Lets go of the state; gives its shapes and places, to restore another."""
        describe = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        abstract = jax.tree.map(describe, self.state)
        self.state = None
        return abstract

    @functools.cached_property
    def stays(self) -> str:
        """A checksum of what stays as it is, and so is in no checkpoint."""
        return checksum.of(self._fixed)

    @functools.cached_property
    def began(self) -> str | None:
        """A checksum of what trains as it was given, if it is asked for before the first step;
        None: it was drawn, which another kind of device rounds otherwise."""
        return None if self._drawn else checksum.of(self.state.params)

    def flops(self, batch: Mapping[str, Any]) -> float:
        """Operations of a step on this host's batch."""
        twice = self.reference and preference.REFERENCE[0] not in batch
        adapted = self.adapters is not None
        return flops.of_step(self.config, batch, self._trained, adapters=adapted, reference=twice)


def _score(model_of, params, fixed, batch):
    return preference.reference_logps(model_of(params, fixed), batch)


def fresh(config: Any, mesh: Mesh, *, seed: int, **how: Any) -> Qwen2Audio:
    """A model of random parameters, each made where it belongs."""
    make = lambda: Qwen2Audio(config, rngs=nnx.Rngs(seed), **how)

    def state():
        model = make()
        model.encoder.look_nearby()
        return nnx.state(model)

    sharding.check(config, mesh)
    graph, abstract = nnx.split(nnx.eval_shape(make))
    places = sharding.shardings(abstract, mesh)
    return nnx.merge(graph, jax.jit(state, out_shardings=places)())
