"""A run's folder: all that is needed to go on where it stopped, to the bit.

    run.json                            the run's settings, its seed among them
    config.json, tokenizer.json, ...    the model's sizes and words
    checkpoints/<step>/                 parameters, optimizer, data iterators

A run with a checkpoint goes on by itself, but never with settings that would make it another run,
nor with a model of other sizes or words. That its parameters are the same `loop.resume` checks.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import socket
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
from etils import epath

from qwen2audio_jax.config import Config
from qwen2audio_jax.data.storage import lock
from qwen2audio_jax.processor import Processor
from qwen2audio_jax.training import hosts
from qwen2audio_jax.training.checkpoint import CHECKPOINTS, put
from qwen2audio_jax.weights import settings

SETTINGS = "run.json"
IN_USE = ".in-use"  # locked by the first host's process while it trains
WORDS = "tokenizer.json"

# Metadata of a dataclass field that a resumed run may have otherwise: it changes no parameter, or
# how it is rounded.
MAY_CHANGE = {"may_change": True}


@contextlib.contextmanager
def alone(folder: str | os.PathLike) -> Iterator[None]:
    """A context in which no other job trains in a folder; all hosts have to enter it at once.

    Raises:
      ValueError: one does; the message says which process it is.
      OSError: nothing can be written to the folder.
    """
    with contextlib.ExitStack() as held:
        hosts.by_first(lambda: _hold(pathlib.Path(folder), held))
        yield


def _hold(folder: pathlib.Path, held: contextlib.ExitStack) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / IN_USE, os.O_RDWR | os.O_CREAT, 0o644)
    held.callback(os.close, handle)
    if lock(handle) is False:
        by = os.pread(handle, 300, 0).decode("utf-8", "replace").strip() or "another process"
        raise ValueError(f"{folder} is in use by {by}: wanted that to end, or another --out")
    os.truncate(handle, 0)
    os.pwrite(handle, f"process {os.getpid()} of {socket.gethostname()}\n".encode(), 0)


def begin(folder: str | os.PathLike, config: Any, *, model: Config, processor: Processor) -> bool:
    """Readies a run's folder, and says whether it holds a run that goes on.

    Args:
      config: a dataclass of settings that JSON can hold, nested ones too. Fields with the metadata
        `MAY_CHANGE` may differ from those that the run began with, as may those that its own field
        `changing` names; what that may name is its `changeable`.

    Returns:
      True: there is a checkpoint to restore, and `keep` is to be called when that is done. False:
        the run is new, and its files are written.

    Raises:
      ValueError: another field, the model's sizes or its tokenizer differ; the message names each
        with both values.
      OSError: nothing can be written to the folder.
    """
    folder = epath.Path(folder)
    continues = goes_on(folder)
    if continues:
        compare(folder, config)
        _compare_model(folder, model, processor)
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        if continues:
            with tempfile.TemporaryFile(dir=folder):  # a folder to read only is told of at once
                pass
        else:
            with tempfile.TemporaryDirectory() as local:
                processor.save_pretrained(local)
                settings.write(model, pathlib.Path(local))
                for file in sorted(pathlib.Path(local).iterdir()):
                    put(folder / file.name, file.read_bytes())
            keep(folder, config)
    return continues


def keep(folder: str | os.PathLike, config: Any) -> None:
    """Writes the settings that the run in a folder has from now on.

    Of a run that goes on not before all is restored: what is refused until then leaves no trace.
    """
    if jax.process_index() == 0:
        content = json.dumps(as_json(config), indent=2).encode() + b"\n"
        put(epath.Path(folder) / SETTINGS, content)


def begun(folder: str | os.PathLike) -> dict[str, Any]:
    """The settings of the run in a folder, as JSON holds them; all hosts have to ask at once.

    Raises:
      ValueError: they cannot be read, or are none.
    """
    return hosts.by_first(lambda: _begun(epath.Path(folder)))


def _begun(folder: epath.Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / SETTINGS).read_text())
        if not isinstance(found, dict) or not found:
            raise ValueError(f"wanted settings by name, got {found!r:.40}")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} holds checkpoints, but no {SETTINGS} to read: {error}"
        ) from error
    return found


def goes_on(folder: str | os.PathLike) -> bool:
    """Whether a folder holds a run with a checkpoint to go on from, as the first host sees it; all
    have to ask at once."""
    return hosts.by_first(lambda: holds_checkpoint(folder))


def holds_checkpoint(folder: str | os.PathLike) -> bool:
    """As `goes_on`, as this host sees it."""
    return bool(_steps(epath.Path(folder) / CHECKPOINTS))


def fed(config: Any, groups: int) -> Any:
    """Settings that say how many feeds there are: as many as when the run in their folder began, in
    a new one as many as groups of hosts.

    Args:
      groups: hosts, those that share rows counted as one.

    Raises:
      ValueError: the groups cannot share them evenly; or as in `begun`.
    """
    feeds = config.data.feeds
    if not feeds:
        then = _fields(begun(config.out)) if goes_on(config.out) else {}
        feeds = then.get("data.feeds") or groups
    if feeds % groups:
        raise ValueError(
            "wanted a number of hosts (those that share rows are as one) that divides the "
            f"{feeds} feeds of the data, got {groups}"
        )
    return dataclasses.replace(config, data=dataclasses.replace(config.data, feeds=feeds))


def as_json(config: Any) -> dict[str, Any]:
    """A dataclass of settings as `run.json` holds it."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=os.fspath))


def compare(folder: str | os.PathLike, config: Any) -> None:
    """Refuses settings that are not those of the run in a folder.

    Raises:
      ValueError: says each by its name.
    """
    then, now, free = _fields(begun(folder)), _fields(as_json(config)), _free(config)
    allowed = tuple(getattr(config, "changing", ()))
    # What a run's settings do not have could not be set yet: it was as it is by default.
    default = _fields(as_json(type(config)()))
    then = {name: default[name] for name in now if name in default} | then
    changed = _changed(then, now, but=[*free, *allowed])
    if changed:
        way = "wanted the same, or another --out"
        if set(changed) <= set(getattr(config, "changeable", ())):
            way = f"--changing {' '.join([*allowed, *changed])} goes on so, another --out anew"
        told = "; ".join(changed.values())
        raise ValueError(f"{folder} holds a run with other settings: {told}; {way}")


def _compare_model(folder: epath.Path, model: Config, processor: Processor) -> None:
    """Refuses a model that a run would go on without: it has its own sizes and words."""
    kept = settings.read(pathlib.Path(folder))
    with tempfile.TemporaryDirectory() as local:  # as it would have been kept
        settings.write(model, pathlib.Path(local))
        given = settings.read(pathlib.Path(local))
    then, now = (_fields(as_json(each)) for each in (kept, given))
    changed = [*_changed(then, now, but=["generation"]).values()]
    if (folder / WORDS).read_bytes() != (processor.folder / WORDS).read_bytes():
        changed.append(f"its {WORDS} has other words")
    if changed:
        raise ValueError(
            f"{folder} holds a run that began with another --model: {'; '.join(changed)}"
        )


def _changed(then: Mapping, now: Mapping, *, but: Iterable[str]) -> dict[str, str]:
    """What differs between settings by their dotted names, and is not under any of some."""
    nothing, but = object(), tuple(but)
    show = lambda value: "nothing" if value is nothing else json.dumps(value)
    return {
        name: f"{name} was {show(before)}, now {show(after)}"
        for name in {**then, **now}
        if not any(name == field or name.startswith(f"{field}.") for field in but)
        and (before := then.get(name, nothing)) != (after := now.get(name, nothing))
    }


def _fields(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= _fields(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _free(config: Any, prefix: str = "") -> list[str]:
    names = []
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        if field.metadata.get("may_change"):
            names.append(name)
        elif dataclasses.is_dataclass(value):
            names += _free(value, f"{name}.")
    return names


def _steps(folder: epath.Path) -> list[int]:
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit())
