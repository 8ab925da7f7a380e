"""A compiled program in a file, to be run later without its being compiled again."""

import pathlib
import pickle
from collections.abc import Sequence

import jax
from jax.experimental import serialize_executable


def save(program: jax.stages.Compiled, path: pathlib.Path) -> int:
    """Writes a program; gives the file's bytes.

    It is for devices of the kind and number that it was compiled for, and for the same versions of
    jax and of the runtime.

    Raises:
      ValueError: the runtime has no form of it that outlives the process.
    """
    try:
        data = pickle.dumps((jax.__version__, *serialize_executable.serialize(program)))
    except (ValueError, TypeError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        raise ValueError(f"the program cannot be saved: {str(error).splitlines()[0]}") from error
    path.write_bytes(data)
    return len(data)


def load(path: pathlib.Path, devices: Sequence[jax.Device] | None = None) -> jax.stages.Compiled:
    """A program that was saved, to be called with arrays as those that it was compiled for.

    Reading it may run code: load what you have written yourself.

    Args:
      devices: that it shall run on; None: all there are.

    Raises:
      ValueError: it is of another version of jax, or for other devices.
    """
    version, *program = pickle.loads(path.read_bytes())
    if version != jax.__version__:
        raise ValueError(f"{path} is of jax {version}, wanted {jax.__version__}")
    devices = jax.devices() if devices is None else devices
    try:
        return serialize_executable.deserialize_and_load(
            *program, backend=devices[0].client, execution_devices=devices
        )
    except (KeyError, jax.errors.JaxRuntimeError) as error:
        said = str(error).splitlines()[0]
        raise ValueError(
            f"{path} is for other devices than {devices[0].device_kind}: {said}"
        ) from (error)
