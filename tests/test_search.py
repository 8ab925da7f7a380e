"""A search finds the fastest program that fits, and compiles none twice."""

import dataclasses
import types
from unittest import mock

import jax
import pytest

from qwen2audio_jax.training.search import search
from qwen2audio_jax.training.settings import MeshConfig

KEEPS = {"full": 1, "save_out_proj": 2, "save_qkv_proj": 3, "save_dot_except_mlp": 4}
AWAY = {"qkv_proj_offloaded": 3, "minimal_offloaded": 6}  # what others keep, in the host's memory


@dataclasses.dataclass(frozen=True)
class Given:
    stage: str = "sft"
    batch: int = 8
    remat_policy: str = "full"
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    gradient_accumulation_steps: int = 1


def pod(room, *, tensor=1.0, devices=4, width=2**20, host=0.0):
    """A measure: rows that keep more take more memory and less time; `width` is spread over fsdp.

    Args:
      tensor: how much faster two devices are that share a row.
      host: how much of what is saved the way to the host takes.
    """

    def measure(given):
        seen.append(given)
        mesh, shared = given.mesh, given.mesh.ici_tensor_parallelism
        apart = mesh.ici_context_parallelism
        rows, over = divmod(devices, shared * apart)
        copies, left = divmod(rows, mesh.ici_data_parallelism)
        if over or left or given.batch % rows:
            raise ValueError(f"{given.batch} rows do not split over the {rows} devices")
        if width % copies:
            raise ValueError(f"a dimension of {width} does not divide by the {copies} devices")
        keeps = KEEPS.get(given.remat_policy, AWAY.get(given.remat_policy, 6))
        away = given.remat_policy in AWAY
        cost = 1.5 - keeps / 20 * (1 - away * (1 - host))
        slower = (shared > 2) + (apart > 1) + (mesh.ici_data_parallelism > 1) / 10
        speed = (tensor if shared == 2 else 1.0) / (1 + slower)
        peak = given.batch * (1 if away else keeps)
        fits = peak <= room
        seconds = (5 + given.batch * cost) / speed
        return types.SimpleNamespace(
            fits=fits, step_s=seconds if fits else None, hbm_peak_bytes=int(1000 * peak)
        )

    seen = []
    return measure, seen


def best_of(trials):
    return max(trials, key=lambda trial: trial.rate).given


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
    trials = list(search(begin, measure, 4))
    best = best_of(trials)
    assert (best.batch, best.remat_policy, best.mesh.ici_tensor_parallelism) == wanted
    assert len(set(seen)) == len(seen) == len(trials)


def test_a_policy_that_keeps_more_is_taken_where_there_is_room():
    measure, _ = pod(200)
    refused = Given(batch=3)
    measure_up_to_32 = lambda given: measure(given) if given.batch <= 32 else measure(refused)
    best = best_of(search(Given(), measure_up_to_32, 4))
    assert (best.batch, best.remat_policy) == (32, "minimal")


def test_generation_keeps_nothing_for_a_backward_pass():
    """No policy is tried there, neither where it fits nor where nothing does."""
    for room in (200, 0):
        measure, seen = pod(room, devices=2)
        capped = lambda given, measure=measure: measure(
            given if given.batch <= 32 else Given(batch=3)
        )
        list(search(Given(stage="decode"), capped, 2))
        assert {given.remat_policy for given in seen} == {"full"} and len(seen) > 3


def test_what_there_is_no_room_for_goes_to_the_host_if_that_is_near():
    near, _ = pod(32, host=0.9)
    assert best_of(search(Given(), near, 4)).remat_policy == "minimal_offloaded"
    far, _ = pod(32, host=-1.0)
    assert best_of(search(Given(), far, 4)).remat_policy == "full"


def test_a_model_that_does_not_divide_is_copied_until_it_does():
    """512 devices do not divide 1280: two copies, over 256 each, do; rows are one a device, and no
    batch is compiled that grew for nothing."""
    measure, seen = pod(1024, devices=512, width=1280)
    trials = list(search(Given(batch=32), measure, 512))
    best = best_of(trials)
    assert (best.mesh.ici_data_parallelism, best.batch) == (2, 1024)
    assert [trial.given.batch for trial in trials[:3]] == [32, 512, 512]
    assert trials[2].report is not None and max(given.batch for given in seen) == 2048


def test_rows_that_fit_on_no_device_are_split_by_their_tokens():
    """Smaller batches do not divide; context does, and the batch with it."""
    measure, _ = pod(1, devices=4)
    best = best_of(search(Given(batch=4), measure, 4))
    assert best.batch == 1
    assert best.mesh.ici_context_parallelism * best.mesh.ici_tensor_parallelism == 4


def test_where_nothing_fits_or_divides_there_is_no_answer():
    """Neither a batch that grows without end nor a mesh of no devices is tried."""
    trials = list(search(Given(), pod(0)[0], 4))
    assert not any(trial.rate for trial in trials) and len(trials) < 30
    trials = list(search(Given(), pod(70, width=0.5)[0], 4))
    copies = [trial.given.mesh.ici_data_parallelism for trial in trials]
    assert {trial.report for trial in trials} == {None} and copies == [1, 2, 4]


def test_sizes_that_others_leave_become_numbers():
    """So that each of them can be varied; fsdp is what the varied ones leave."""
    devices = [mock.create_autospec(jax.Device, slice_index=i // 8) for i in range(16)]
    told = MeshConfig(ici_data_parallelism=-1, ici_fsdp_parallelism=2, dcn_data_parallelism=-1)
    settled = told.settled(devices)
    assert (settled.ici_data_parallelism, settled.ici_fsdp_parallelism) == (4, 2)
    assert settled.dcn_data_parallelism == 2
    usual = MeshConfig(dcn_data_parallelism=2, ici_tensor_parallelism=2)
    assert usual.settled(devices) == usual
