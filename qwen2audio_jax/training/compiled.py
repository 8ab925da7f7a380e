"""A compiled program -> what it needs of each device, and how fast it could be there."""

import dataclasses
import math
import re
import resource
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from qwen2audio_jax.training import collectives, hlo
from qwen2audio_jax.training.chips import GIB, links, route
from qwen2audio_jax.training.collectives import Collective
from qwen2audio_jax.training.topology import Lowered, Topology


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What a program needs; of one device, if nothing else is said.

    Attributes:
      fits: whether there is room for it, as the compiler finds, and for the next step's batch.
      hbm_peak_bytes: the most memory that is used at the same time; where it does not fit, what
        would be. The next step's batch, which comes while this one is worked on, included.
      hbm_chip_bytes: what there is of it for a program.
      argument_bytes: of it, what is held between two steps, and the batch.
      ahead_bytes: of it, the next step's batch.
      held: of that, bytes by what they are.
      hbm_bytes: read from and written to memory.
      host_bytes: that go to the host's memory and come from it, where something is offloaded.
      flops: that are executed, things that are computed again included.
      model_flops: that the model needs, of all devices' shares one.
      flops_ratio: of the one to the other.
      collectives: by kind, how many and how many bytes each device takes in.
      seconds: that computing, memory, links and the way to the host would take each, at the chip's
        peak rates.
      step_s: the longest of them, if each hides the others.
      mfu_bound: the model's operations in that time, to what the chip could do.
      limit: what takes longest.
      serial_s: the sum of them, if none hides another.
      serial_mfu: MFU in that time.
      links_exposed: seconds of links, within those above, in which the compiled program has the
        device wait; the rest goes on while it computes.
      compile_s, compile_cpu_s: wall-clock and processor time.
      largest: where it does not fit, what takes most memory; else empty.
    """

    fits: bool
    devices: int
    hbm_peak_bytes: int
    hbm_chip_bytes: int
    argument_bytes: int
    ahead_bytes: int = 0
    held: dict[str, int]
    hbm_bytes: float | None = None
    host_bytes: float | None = None
    flops: float | None = None
    model_flops: float
    flops_ratio: float | None = None
    collectives: dict[str, dict[str, float]] | None = None
    seconds: dict[str, float] | None = None
    step_s: float | None = None
    mfu_bound: float | None = None
    limit: str | None = None
    serial_s: float | None = None
    serial_mfu: float | None = None
    links_exposed: float | None = None
    compile_s: float
    compile_cpu_s: float
    process_peak_bytes: int
    largest: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def compile(
    lowered: Lowered, topology: Topology, options: Sequence[str] = ()
) -> tuple[Report, jax.stages.Compiled | None]:
    """Compiles; a program for which there is no room is an answer, too.

    Args:
      options: for the compiler, each `NAME=VALUE`.

    Raises:
      ValueError: the compiler refuses it for another reason.
    """
    if odd := [each for each in options if "=" not in each]:
        raise ValueError(f"wanted compiler options as NAME=VALUE, got {', '.join(odd)}")
    chosen = dict(each.split("=", 1) for each in options)
    start, cpu = time.perf_counter(), time.process_time()
    try:
        program, refused = lowered.program.compile(chosen or None), None
    except jax.errors.JaxRuntimeError as error:
        if (refused := _refusal(str(error))) is None:
            raise ValueError(f"the compiler refuses it: {str(error).splitlines()[0]}") from error
        program = None
    number = len(topology.devices)
    held = {what: _bytes(tree) for what, tree in lowered.held.items()}
    known = {
        "devices": number,
        "model_flops": lowered.flops / number,
        "hbm_chip_bytes": int(topology.chip.hbm * GIB),
        "held": held,
        "ahead_bytes": _bytes(lowered.ahead),
        "compile_s": round(time.perf_counter() - start, 1),
        "compile_cpu_s": round(time.process_time() - cpu, 1),
        "process_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    if program is None:
        used, known["hbm_chip_bytes"], largest = refused
        known |= {"argument_bytes": sum(held.values()), "largest": largest}
        return Report(fits=False, hbm_peak_bytes=used + known["ahead_bytes"], **known), None
    return _report(program, lowered, topology, known), program


def _bytes(tree: Any) -> int:
    """What each device has of arrays of shapes alone."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def _report(program: jax.stages.Compiled, lowered: Lowered, topology: Topology, known) -> Report:
    read = hlo.Program(
        program.as_text(),
        devices=len(topology.devices),
        unknown=lowered.loops,
        scopes=lowered.scopes,
    )
    costs = read.costs().of_each(lowered.steps)
    costs.flops += lowered.unseen / len(topology.devices)
    memory, chip = program.memory_analysis(), topology.chip
    exchange = lambda those: _exchange(those, lowered, topology)
    seconds = {
        "compute": costs.flops * chip.cores / chip.flops,
        "memory": costs.bytes * chip.cores / chip.bandwidth,
        "links": exchange(costs.collectives),
        "host": costs.host * chip.cores / chip.host,
    }
    limit, serial = max(seconds, key=lambda name: seconds[name]), sum(seconds.values())
    ideal = known["model_flops"] * chip.cores / chip.flops
    peak = _peak(memory) + known["ahead_bytes"]
    return Report(
        fits=peak <= known["hbm_chip_bytes"],
        hbm_peak_bytes=peak,
        argument_bytes=memory.argument_size_in_bytes,
        hbm_bytes=costs.bytes,
        host_bytes=costs.host,
        flops=costs.flops,
        flops_ratio=costs.flops / known["model_flops"],
        collectives=costs.by_kind(),
        seconds=seconds,
        step_s=seconds[limit],
        mfu_bound=ideal / seconds[limit],
        limit=limit,
        serial_s=serial,
        serial_mfu=ideal / serial,
        links_exposed=exchange([each for each in costs.collectives if each.exposed]),
        **known,
    )


def _peak(memory: Any) -> int:
    """What is held, less what results take over from arguments, and what is needed in between."""
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


def _exchange(found: Iterable[Collective], lowered: Lowered, topology: Topology) -> float:
    """Seconds that the links need at least.

    Groups exchange one after the other, those of several slices over their network, too; what one
    device sends to another goes on beside what takes other links.
    """
    chip = topology.chip
    places = [tuple(device.coords) for device in lowered.mesh.devices.flat]
    parts = [getattr(device, "slice_index", 0) for device in lowered.mesh.devices.flat]
    shape = (*topology.shape, 1, 1)[:3]
    groups, loads = 0.0, Counter()
    for each in found:
        moved = each.times * each.bytes * chip.cores
        if each.network:
            groups += moved / chip.dcn
            continue
        for start, end in each.pairs:
            if parts[start] != parts[end]:
                loads[start] += moved / chip.dcn
                continue
            for link in route(chip, places[start], places[end], shape):
                loads[parts[start], link] += moved / chip.link
        if each.pairs or len(each.group) == 1:
            continue
        slices, number = len({parts[i] for i in each.group}), len(each.group)
        to_all = each.kind in collectives.TO_ALL
        if slices > 1:
            # First within a slice, then between those who have the same part of it, which is all
            # that crosses the network. What all send to all is another thing for each.
            crosses = number - number / slices if to_all else slices - 1
            groups += moved * crosses / (number - 1) / chip.dcn
        near = [places[i] for i in each.group if parts[i] == parts[each.group[0]]]
        if len(near) > 1:
            stays = (len(near) - 1) / (number - 1) if to_all else 1
            groups += moved * stays / links(chip, near, shape, to_all=to_all)
    return groups + max(loads.values(), default=0.0)


def _refusal(message: str) -> tuple[int, int, tuple[str, ...]] | None:
    """What the compiler says of memory: needed, there, and the largest arrays; None: of others."""
    units = {"T": GIB * 1024, "G": GIB, "M": 1024**2, "K": 1024}
    size = lambda number, unit: int(float(number) * units[unit])
    amount = r"([\d.]+)([TGMK])i?B?"
    found = re.search(rf"[Uu]sed {amount} of {amount} hbm", message) or re.search(
        rf"total memory required .*?\({amount}\) exceeds available HBM \({amount}\)", message
    )
    if "RESOURCE_EXHAUSTED" not in message or found is None:
        return None
    used, there = size(*found.group(1, 2)), size(*found.group(3, 4))
    largest, seen = [], set()
    for part in re.split(r"\n\s*\d+\. Size: ", message)[1:]:
        takes = part.split("\n")[0].strip()
        shape = re.search(r"Shape: (\S+)", part)
        what = re.search(r'op_name="([^"]*)"', part)
        line = f"{takes}: {shape[1] if shape else '?'} {what[1] if what else ''}".strip()
        if line not in seen:
            largest.append(line)
            seen.add(line)
    return used, there, tuple(largest[:8])
