"""What every test shares: fake devices, the real data's folder, made sound."""

import os
import pathlib

import jax
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 8)
# Devices that wait for each other hold a thread of XLA's each, of which there are as many as cores:
# on two, all would wait for a device that has none.
os.environ.setdefault("NPROC", "64")
# They share two busy cores, and may meet late: after 40 s XLA would end the process.
PATIENT = "--xla_cpu_collective_call_terminate_timeout_seconds=300"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {PATIENT}"

SHARED = pathlib.Path(__file__).resolve().parent.parent.parent / "shared" / "data"


@pytest.fixture(scope="module", autouse=True)
def hurry(request):
    """Programs that run but a few times take longer to be compiled well than to be run badly, in
    the processes that tests start, too; a module that says `HURRY = False` has others."""
    hurry = getattr(request.module, "HURRY", True)
    jax.config.update("jax_disable_most_optimizations", hurry)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(hurry)


@pytest.fixture(scope="session", autouse=True)
def cached(tmp_path_factory):
    """Many tests compile the same programs; all workers, and all processes that tests start, share
    what one has compiled. So do all runs that are told the same folder by TESTS_CACHE."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    programs = os.environ.get("TESTS_CACHE") or str(folder / "programs")
    os.environ["QWEN2AUDIO_CACHE"] = programs
    jax.config.update("jax_compilation_cache_dir", programs)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder of real audio, vocabulary and configurations; skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"the real data is not at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def chirp():
    """Makes sound: `chirp(seconds, seed)` sweeps with noise, mono at 16 kHz, float32."""

    def make(seconds: float, seed: int = 0) -> np.ndarray:
        rng = np.random.default_rng(seed)
        t = np.arange(round(seconds * 16_000)) / 16_000
        low, high = rng.uniform(100, 600), rng.uniform(800, 4000)
        tone = np.sin(2 * np.pi * (low * t + (high - low) * t**2 / (2 * max(seconds, 0.1))))
        return (0.4 * tone + 0.02 * rng.standard_normal(len(t))).astype(np.float32)

    return make
