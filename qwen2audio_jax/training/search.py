"""The fastest program that fits: batch, rematerialisation and mesh, changed one after the other."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

from qwen2audio_jax.training.settings import MeshConfig

REMAT = ("full", "save_out_proj", "save_qkv_proj", "save_dot_except_mlp", "minimal", "none")
LARGEST = 2**16  # rows
MESHES = (
    *({"ici_data_parallelism": 2}, {"ici_tensor_parallelism": 2}, {"ici_tensor_parallelism": 4}),
    *({"ici_context_parallelism": 2}, {"ici_data_parallelism": 2, "ici_tensor_parallelism": 2}),
)


@runtime_checkable
class Tried(Protocol):
    """What is varied."""

    batch: int
    remat_policy: str
    mesh: MeshConfig


@dataclasses.dataclass(frozen=True)
class Trial:
    """One program.

    Attributes:
      report: what it needs; None: it does not divide, as `why` says.
    """

    given: Any
    report: Any | None
    why: str = ""

    @property
    def rate(self) -> float:
        """Rows a second, at most; 0 where there is no room."""
        fits = self.report is not None and self.report.fits
        return self.given.batch / self.report.step_s if fits else 0.0


def search(given: Tried, measure: Callable[[Any], Any]) -> Iterator[Trial]:
    """Looks for the most rows a second: a larger batch while that helps, or a smaller one until it
    fits; then blocks that keep more; then other meshes; and round again from what was best.

    Args:
      given: a dataclass, to begin with.
      measure: compiles one; gives its report, or raises ValueError where it does not divide.

    Yields:
      Each trial once, as it ends; the fastest of them is the answer.
    """
    known: dict[Any, Trial] = {}

    def attempt(one: Any) -> Iterator[Trial]:
        key = one.batch, one.remat_policy, dataclasses.astuple(one.mesh)
        if key not in known:
            try:
                known[key] = Trial(one, measure(one))
            except ValueError as error:
                known[key] = Trial(one, None, str(error))
            yield known[key]

    def best() -> Trial:
        """The fastest; where none fits yet, the smallest of those that divide."""
        divides = lambda trial: trial.report is not None
        return max(known.values(), key=lambda t: (t.rate, divides(t), -t.given.batch))

    yield from attempt(given)
    while best().report is None and given.batch < LARGEST:  # fewer rows than devices
        given = dataclasses.replace(given, batch=2 * given.batch)
        yield from attempt(given)
    while True:
        before = best()
        while not best().rate and given.batch > 1:
            given = dataclasses.replace(given, batch=given.batch // 2)
            yield from attempt(given)
        while (top := best()).rate:
            yield from attempt(dataclasses.replace(top.given, batch=2 * top.given.batch))
            if best() is top:
                break
        for policy in REMAT if best().rate else ("full",):
            yield from attempt(dataclasses.replace(best().given, remat_policy=policy))
        for sizes in MESHES:
            mesh = dataclasses.replace(given.mesh, ici_fsdp_parallelism=-1, **sizes)
            yield from attempt(dataclasses.replace(best().given, mesh=mesh))
        if best() is before or not best().rate:
            return
