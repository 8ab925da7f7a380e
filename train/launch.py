"""What the programs of this folder share: presets, flags, and one line for a mistake."""

import dataclasses
import importlib
import pkgutil
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import tyro

from qwen2audio_jax.training import hosts
from qwen2audio_jax.training.data_config import WORLD
from train import command, configs

SMALLER = (
    "smaller --data.buckets, --remat-policy full, or more devices; "
    "in an evaluation fewer --evaluation.rows"
)


def presets(stage: str) -> dict[str, tuple[str, Any]]:
    """The presets of a stage, `configs/STAGE_NAME.py`: what each is for, and its settings."""
    found = {}
    for module in pkgutil.iter_modules(configs.__path__):
        if module.name.startswith(f"{stage}_"):
            loaded = importlib.import_module(f"{configs.__name__}.{module.name}")
            name = module.name.removeprefix(f"{stage}_").replace("_", "-")
            found[name] = (loaded.__doc__, loaded.SETTINGS)
    return found


def launch(stage: str, train: Callable[[Any], int | None], about: str) -> None:
    """Reads the command line, trains, and exits.

    Status 0: done. 143 or 130: ended by SIGTERM or SIGINT (128 and its number), all saved; the
    same command goes on. 2: something that was given is wrong. 1: the run could not go on: its
    gradients, or its disk. Both with one line.
    """
    name = f"train.{stage}"
    command.prepare()
    with command.guard(name):
        settings = _parse(stage, about)
        if settings.distributed or settings.hosts.coordinator:
            hosts.join(settings.hosts)
        else:
            hosts.alone()
        signal = _train(train, settings, name)
    if signal is not None:
        print(f"{name}: signal {signal}: run it again to go on from what {settings.out} holds")
        sys.exit(128 + signal)
    print(f"{name}: done: {settings.out / 'summary.md'}, and the model in {settings.out / 'model'}")


def _train(train: Callable[[Any], int | None], settings: Any, name: str) -> int | None:
    try:
        with hosts.together():
            return train(settings)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(f"{settings.out}: {error.strerror}") from error  # as of a disk that is full
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            reason = str(error).splitlines()[0]
            command.stop(name, f"no room for a step: wanted {SMALLER} ({reason})", 1)
        raise


def _parse(stage: str, about: str) -> Any:
    """The settings: those of a preset, and what the command line says."""
    known = presets(stage)
    settings = _read(stage, known, about)
    fitting = {name: (doc, _fitting(each, settings)) for name, (doc, each) in known.items()}
    if fitting == known:
        return settings
    # Read anew: what is told stays, be it what the preset would have had.
    told = _read(stage, fitting, about)
    if settings.data.held_out and not told.data.held_out:
        print(f"train.{stage}: nothing is measured without --data.held-out", file=sys.stderr)
    return told


def _fitting(preset: Any, told: Any) -> Any:
    """A preset without what does not go with what is told.

    What is not said of adapters is as in those that are begun with, and a made world does not
    measure what was learned from somebody's own data.
    """
    if told.lora.start is not None:
        silent = dict.fromkeys(("lora_alpha", "target_modules", "modules_to_save"))
        lora = dataclasses.replace(preset.lora, **silent, r=0, start=told.lora.start)
        preset = dataclasses.replace(preset, lora=lora)
    made = lambda sources: any(source.startswith(WORLD) for source in sources)
    if told.data.train and not made(told.data.train) and made(preset.data.held_out):
        data = dataclasses.replace(preset.data, held_out=())
        preset = dataclasses.replace(preset, data=data)
    return preset


def _read(stage: str, known: dict[str, tuple[str, Any]], about: str) -> Any:
    cli = tyro.extras.overridable_config_cli
    return command.read(partial(cli, known, prog=f"python -m train.{stage}", description=about))
