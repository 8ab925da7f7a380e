"""A search finds the fastest program that fits, and compiles none twice."""

import dataclasses
import types

import pytest

from qwen2audio_jax.training.search import search
from qwen2audio_jax.training.settings import MeshConfig

KEEPS = {"full": 1, "save_out_proj": 2, "save_qkv_proj": 3, "save_dot_except_mlp": 4}


@dataclasses.dataclass(frozen=True)
class Given:
    batch: int = 8
    remat_policy: str = "full"
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)


def pod(room, *, tensor=1.0):
    """A measure: rows that keep more take more memory and less time."""

    def measure(given):
        seen.append(given)
        mesh = given.mesh
        if given.batch % 4:
            raise ValueError(f"{given.batch} rows do not split over the 4 devices")
        keeps = KEEPS.get(given.remat_policy, 6)
        speed = tensor if mesh.ici_tensor_parallelism == 2 else 1.0
        other = mesh.ici_tensor_parallelism == 4 or mesh.ici_context_parallelism > 1
        seconds = (5 + given.batch * (1.5 - keeps / 20)) / speed * (1 + other)
        fits = given.batch * keeps <= room
        return types.SimpleNamespace(fits=fits, step_s=seconds if fits else None)

    seen = []
    return measure, seen


@pytest.mark.parametrize(
    ("begin", "room", "tensor", "wanted"),
    [
        (Given(), 70, 1.0, (64, "full", 1)),
        (Given(batch=512), 70, 1.0, (64, "full", 1)),  # smaller until it fits
        (Given(), 70, 1.5, (64, "full", 2)),
        (Given(batch=4), 27, 1.0, (16, "full", 1)),
        (Given(batch=1), 27, 1.0, (16, "full", 1)),  # fewer rows than devices
    ],
)
def test_the_fastest_that_fits_is_found(begin, room, tensor, wanted):
    measure, seen = pod(room, tensor=tensor)
    trials = list(search(begin, measure))
    best = max(trials, key=lambda trial: trial.rate).given
    assert (best.batch, best.remat_policy, best.mesh.ici_tensor_parallelism) == wanted
    assert len(set(seen)) == len(seen) == len(trials)


def test_a_policy_that_keeps_more_is_taken_where_there_is_room():
    measure, _ = pod(200)
    measure_up_to_32 = lambda given: measure(given) if given.batch <= 32 else measure(refused)
    refused = Given(batch=3)
    best = max(search(Given(), measure_up_to_32), key=lambda trial: trial.rate).given
    assert (best.batch, best.remat_policy) == (32, "minimal")


def test_where_nothing_fits_there_is_no_answer():
    measure, _ = pod(0)
    trials = list(search(Given(), measure))
    assert not any(trial.rate for trial in trials) and len({t.given.batch for t in trials}) == 4
