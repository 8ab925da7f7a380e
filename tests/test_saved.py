"""A compiled program outlives its process, and does the same as before."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import serialize_executable

from qwen2audio_jax import compilation_cache, sharding
from qwen2audio_jax.training import saved


@pytest.fixture
def program():
    """Of four devices, with trees of arguments and results."""
    mesh = sharding.mesh(devices=jax.devices()[:4], fsdp=4)
    rows = jax.NamedSharding(mesh, jax.P("fsdp"))
    f = jax.jit(lambda state, x: ({"sum": state["sum"] + x.sum()}, x * 2), donate_argnums=0)
    x = jax.device_put(jnp.arange(8.0), rows)
    state = {"sum": jax.device_put(jnp.float32(1), jax.NamedSharding(mesh, jax.P()))}
    return f.lower(state, x).compile(), state, x


def test_a_saved_program_runs(program, tmp_path):
    compiled, state, x = program
    path = tmp_path / "program"
    assert saved.save(compiled, path) == path.stat().st_size
    mesh = sharding.mesh(devices=jax.devices()[:4], fsdp=4)
    again, doubled = saved.load(path, mesh)(state, x)
    assert again["sum"] == 29 and doubled.sharding == x.sharding
    np.testing.assert_array_equal(doubled, 2 * np.arange(8.0))


def test_a_program_runs_on_its_own_order_of_devices(tmp_path):
    """Which a mesh of several axes does not have from jax."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4])[[2, 0, 3, 1]], "x")
    rows = jax.P("x")
    number = lambda x: 10 * x + jax.lax.axis_index("x")
    f = jax.jit(jax.shard_map(number, mesh=mesh, in_specs=rows, out_specs=rows))
    x = jax.device_put(jnp.arange(4), jax.NamedSharding(mesh, rows))
    with compilation_cache.anew():  # what another run of the tests has kept cannot be written
        compiled = f.lower(x).compile()
    saved.save(compiled, tmp_path / "f")
    assert saved.load(tmp_path / "f", mesh)(x).tolist() == [0, 11, 22, 33]


def test_what_cannot_be_is_a_line(program, tmp_path, monkeypatch):
    """A file of another version, and a runtime that keeps its programs to itself."""
    compiled, *_ = program
    path = tmp_path / "program"
    monkeypatch.setattr(saved, "_versions", lambda: {"jax": "0.1", "libtpu": "0.2"})
    saved.save(compiled, path)
    monkeypatch.setattr(saved, "_versions", lambda: {"jax": "0.1", "libtpu": "0.3"})
    with pytest.raises(ValueError, match=r"program is of libtpu 0\.2, wanted 0\.3$"):
        saved.load(path)

    def refuses(program):
        raise ValueError("Compilation does not support serialization")

    monkeypatch.setattr(serialize_executable, "serialize", refuses)
    with pytest.raises(ValueError, match=r"cannot be saved: Compilation does not support"):
        saved.save(compiled, path)
