"""A step that does not fit -> what to change of it, what helps most first."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

from jax.sharding import Mesh

from qwen2audio_jax import config, sharding
from qwen2audio_jax.mel import audio_tokens
from qwen2audio_jax.training.chips import GIB
from qwen2audio_jax.training.compiled import Report
from qwen2audio_jax.training.optimizer import OptimizerConfig
from qwen2audio_jax.training.settings import MeshConfig


@runtime_checkable
class Asked(Protocol):
    """What a program was compiled for, as `train.compile` is told."""

    stage: str
    model: str
    mesh: MeshConfig
    batch: int
    tokens: int
    clips: int
    frames: int
    attention: str
    remat_policy: str
    gradient_accumulation_steps: int
    weight_dtype: str | None
    optimizer: OptimizerConfig


def advice(given: Asked, report: Report, mesh: Mesh) -> list[str]:
    """Flags, each with what it does; empty where the step fits.

    What is held between two steps does not depend on rows: where it takes most of the memory, it
    comes first.
    """
    if report.fits:
        return []
    room, held = report.hbm_chip_bytes, report.argument_bytes
    of_rows = _of_generation if given.stage in ("prefill", "decode") else _of_rows
    rows, state = list(of_rows(given, report, mesh)), list(_of_state(given, report, mesh))
    return [*state, *rows] if held > room / 2 else [*rows, *state]


def _of_rows(given: Asked, report: Report, mesh: Mesh) -> Iterator[str]:
    """What makes less of what is there within a step."""
    sizes = mesh.shape
    places, parts = sizes["data"] * sizes["fsdp"], given.gradient_accumulation_steps
    each = given.batch // (parts * places)
    if given.remat_policy != "full":
        yield f"--remat-policy full: blocks keep their inputs alone, not as {given.remat_policy}"
    if each > 1:
        fewer = _rows_that_fit(each, report)
        said = f"{fewer} row{'s' * (fewer > 1)} on a device at a time rather than {each}"
        yield f"--gradient-accumulation-steps {parts * each // fewer}: {said}"
        yield f"--batch {places * parts * fewer}: the same, in steps of fewer rows"
    else:
        wider = 2 * sizes["context"]
        divides = places % 2 == 0 and given.tokens % wider == 0
        if divides and (flags := _meshed(given, mesh, "context", wider)):
            part = f"{given.tokens // wider} of a row's {given.tokens} tokens on a device"
            yield f"{flags} --batch {max(given.batch // 2, 1)}: {part}"
        if (shorter := _shorter(given)) and given.tokens // 2 % sizes["context"] == 0:
            yield f"{shorter}: each device has one row already"
    if given.attention == "dot_product":
        yield "--attention flash: dot_product holds the scores of all tokens with all"


def _shorter(given: Asked) -> str | None:
    """Flags of rows half as long, which have to hold what they hear; None: there are none."""
    tokens = given.tokens // 2
    ways = (
        ("", given.clips, given.frames),
        (f" --clips {given.clips // 2}", given.clips // 2, given.frames),
        (f" --frames {given.frames // 2}", given.clips, given.frames // 2),
    )
    for more, clips, frames in ways:
        if clips and frames and clips * audio_tokens(frames) < tokens:
            return f"--tokens {tokens}{more}"
    return None


def _rows_that_fit(each: int, report: Report) -> int:
    """Rows of a device that there may be room for: a divisor, as what they take is proportional."""
    taken = (report.hbm_peak_bytes - report.argument_bytes) / each
    room = (report.hbm_chip_bytes - report.argument_bytes) / max(taken, 1)
    return max(n for n in range(1, each) if each % n == 0 and n <= max(room, 1))


def _of_state(given: Asked, report: Report, mesh: Mesh) -> Iterator[str]:
    """What makes less of what is held between two steps, or spreads it further."""
    held, sizes = report.held, mesh.shape
    trained, moments = held.get("trained", 0), held.get("optimizer", 0)
    adam = given.optimizer.name in ("adamw", "adam", "muon")
    if adam and given.optimizer.mu_dtype == "float32" and moments > GIB / 10:
        saved = f"{moments / 4 / GIB:.2f} GiB less"  # a half of one of two
        yield f"--optimizer.mu-dtype bfloat16: first moments in half the bytes, {saved}"
    elif adam and given.optimizer.nu_dtype == "float32" and moments > GIB / 10:
        saved = f"{moments / 3 / GIB:.2f} GiB less"  # a half of two thirds
        yield f"--optimizer.nu-dtype bfloat16: second moments in half the bytes, {saved}"
    copies = sizes["data"] > 1 and given.mesh.ici_data_parallelism != 1  # else slices have them
    if copies and (flags := _meshed(given, mesh, "data", 1)):
        more = f"more than {sizes['fsdp']} devices"
        yield f"{flags}: each copy of the model is spread over {more}"
    if given.stage == "dpo":
        yield "--stage dpo-precomputed: the reference answers beforehand, and is not held"
    if given.stage in ("pretrain", "sft") and trained + moments > report.hbm_chip_bytes / 2:
        taken = (trained + moments) / GIB
        yield f"--stage lora-sft: parameters that train, and their moments, take {taken:.2f} GiB"
    needed = 2 ** math.ceil(math.log2(mesh.size * report.hbm_peak_bytes / report.hbm_chip_bytes))
    if given.batch < 2 * mesh.size * given.gradient_accumulation_steps:
        needed = max(needed, 2 * mesh.size)
    yield (
        f"--topology of {needed} devices: of {report.argument_bytes / GIB:.2f} GiB that each holds "
        "between steps, most is spread over them"
    )


def _of_generation(given: Asked, report: Report, mesh: Mesh) -> Iterator[str]:
    """Of rows that are read, or of a cache of them."""
    sizes = mesh.shape
    places = sizes["data"] * sizes["fsdp"]
    each = max(given.batch // places, 1)
    if each > 1:
        fewer = _rows_that_fit(each, report)
        yield f"--batch {places * fewer}: {fewer} of its {each} rows on each device"
    # a cache does not say what was heard
    shorter = f"--tokens {given.tokens // 2}" if given.stage == "decode" else _shorter(given)
    if shorter:
        yield f"{shorter}: what is read, and the cache, are half as long"
    wider = 2 * sizes["tensor"]
    if places > 1 and (flags := _meshed(given, mesh, "tensor", wider)):
        yield f"{flags}: {wider} devices share each row's cache"


def _meshed(given: Asked, mesh: Mesh, axis: str, size: int) -> str | None:
    """Flags of a mesh of so many devices on an axis, which fewer on others make up for; None: there
    is none that divides the model."""
    fewer = max(given.mesh.ici_data_parallelism // 2, 1)
    for others in ({}, {"fsdp": -1}, {"data": fewer}):
        changed = {f"ici_{name}_parallelism": n for name, n in {axis: size, **others}.items()}
        wanted = dataclasses.replace(given.mesh, **changed)
        try:
            sharding.check(config.preset(given.model), wanted.make(list(mesh.devices.flat)))
        except ValueError:
            continue
        return " ".join(f"--mesh.{name.replace('_', '-')} {n}" for name, n in changed.items())
    return None


def given_of(given: Any, mesh: Mesh) -> dict[str, Any]:
    """What a report is of, for those who read it elsewhere: the mesh, and all that was told, of
    which `parallelism` made it."""
    told = dataclasses.asdict(given)
    for name in ("search", "json", "hlo", "save"):
        del told[name]
    return told | {"parallelism": told["mesh"], "mesh": dict(mesh.shape)}
