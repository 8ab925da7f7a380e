"""The fastest program that fits: batch, rematerialisation and mesh, changed one after the other."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

from qwen2audio_jax.training.settings import MeshConfig
from qwen2audio_jax.training.topology import GENERATION

REMAT = (
    *("full", "save_out_proj", "save_qkv_proj", "save_dot_except_mlp", "minimal", "none"),
    *("qkv_proj_offloaded", "minimal_offloaded"),
)
AXES = ("data", "tensor", "context")  # fsdp is what they leave


@runtime_checkable
class Tried(Protocol):
    """What is varied, and what a batch is made of."""

    stage: str
    batch: int
    remat_policy: str
    mesh: MeshConfig
    gradient_accumulation_steps: int


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

    @property
    def rank(self) -> tuple[float, bool, int]:
        """The fastest comes last; where none fits, the one that lacks least, and before all those
        that do not divide."""
        divides = self.report is not None
        return self.rate, divides, -self.report.hbm_peak_bytes if divides else 0


def search(given: Tried, measure: Callable[[Any], Any], devices: int) -> Iterator[Trial]:
    """Looks for the most rows a second: a larger batch while that helps, or a smaller one until it
    fits; then, in training, blocks that keep more, or elsewhere; then meshes with twice or half as
    many devices on an axis; and round again from what was best.

    Where what is given does not divide, its rows are filled up to the devices, and copies of the
    model are tried, ever more of them, until one is spread over so few that it divides.

    Args:
      given: a dataclass, to begin with.
      measure: compiles one; gives its report, or raises ValueError where it does not divide.
      devices: how many the mesh is of.

    Yields:
      Each trial once, as it ends; the fastest of them is the answer.
    """
    known: dict[Any, Trial] = {}

    def attempt(one: Any, **how: Any) -> Iterator[Trial]:
        one = dataclasses.replace(one, **how)
        key = one.batch, one.remat_policy, dataclasses.astuple(one.mesh)
        if key not in known:
            try:
                known[key] = Trial(one, measure(one))
            except ValueError as error:
                known[key] = Trial(one, None, str(error))
            yield known[key]

    policies = () if given.stage in GENERATION else REMAT
    best = lambda: max(known.values(), key=lambda trial: trial.rank)
    yield from attempt(given)
    rows = devices * given.gradient_accumulation_steps
    filled, copies = rows * math.ceil(given.batch / rows), 1
    while best().report is None and copies <= devices:
        yield from attempt(given, batch=filled, mesh=_sized(given.mesh, "data", copies))
        copies *= 2
    while (before := best()).report is not None:
        while not best().rate and (top := best()).given.batch > 1:
            yield from attempt(top.given, batch=top.given.batch // 2)
            if best() is top:
                break
        while (top := best()).rate:
            yield from attempt(top.given, batch=2 * top.given.batch)
            if best() is top:
                break
        for policy in policies if best().rate else policies[:1]:
            yield from attempt(best().given, remat_policy=policy)
        for axis in AXES:
            size = getattr(best().given.mesh, f"ici_{axis}_parallelism")
            for other in (2 * size, size // 2):
                if 1 <= other <= devices:
                    top, fewer = best(), axis != "data" and other > size
                    # Devices that share a row need half of the rows.
                    batch = top.given.batch // (1 if top.rate or not fewer else 2)
                    mesh = _sized(top.given.mesh, axis, other)
                    yield from attempt(top.given, batch=max(batch, 1), mesh=mesh)
        if best() is before:
            return


def _sized(mesh: MeshConfig, axis: str, size: int) -> MeshConfig:
    return dataclasses.replace(
        mesh, **{"ici_fsdp_parallelism": -1, f"ici_{axis}_parallelism": size}
    )
