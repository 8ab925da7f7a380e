"""A compiled program in a file, to be run later without its being compiled again."""

import contextlib
import pathlib
import pickle
from importlib import metadata

import jax
from jax.experimental import serialize_executable
from jax.sharding import Mesh


def save(program: jax.stages.Compiled, path: pathlib.Path) -> int:
    """Writes a program; gives the file's bytes.

    It is for devices of the kind and number that it was compiled for, and for the same versions of
    jax and of the runtime.

    Raises:
      ValueError: the runtime has no form of it that outlives the process.
    """
    try:
        data = pickle.dumps((_versions(), *serialize_executable.serialize(program)))
    except (ValueError, TypeError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        raise ValueError(f"the program cannot be saved: {str(error).splitlines()[0]}") from error
    path.write_bytes(data)
    return len(data)


def load(path: pathlib.Path, mesh: Mesh | None = None) -> jax.stages.Compiled:
    """A program that was saved, to be called with arrays as those that it was compiled for.

    Reading it may run code: load what you have written yourself.

    Args:
      mesh: that it shall run on, of the shape that it was compiled for; None: all devices in jax's
        order, which is that of a mesh of one axis at most.

    Raises:
      ValueError: it is of another version of jax or of libtpu, or for other devices.
    """
    versions, *program = pickle.loads(path.read_bytes())
    for name, here in _versions().items():
        if (version := versions.get(name, here)) != here:
            raise ValueError(f"{path} is of {name} {version}, wanted {here}")
    devices = jax.devices() if mesh is None else list(mesh.devices.flat)
    try:
        return serialize_executable.deserialize_and_load(
            *program, backend=devices[0].client, execution_devices=devices
        )
    except (KeyError, jax.errors.JaxRuntimeError) as error:
        said = str(error).splitlines()[0]
        raise ValueError(
            f"{path} is for other devices than {devices[0].device_kind}: {said}"
        ) from error


def _versions() -> dict[str, str]:
    """Of what compiles; there is no libtpu where there are to be no TPUs."""
    found = {"jax": jax.__version__}
    with contextlib.suppress(metadata.PackageNotFoundError):
        found["libtpu"] = metadata.version("libtpu")
    return found
