"""XLA is asked for what helps on GPUs, and the user has the last word."""

import importlib.util
import os
import subprocess
import sys

import pytest

from qwen2audio_jax.training import xla_flags


@pytest.fixture
def plugin(monkeypatch):
    """As if jax's extra for GPUs were installed."""
    there = lambda name: name == "jax_cuda13_plugin" or None
    monkeypatch.setattr(importlib.util, "find_spec", there)


def test_without_gpus_nothing_is_asked_for(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1")
    xla_flags.ask()
    assert os.environ["XLA_FLAGS"] == "--xla_a=1"


def test_what_the_user_says_stays(monkeypatch, plugin):
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_gpu_triton_gemm_any=false")
    xla_flags.ask()
    flags = os.environ["XLA_FLAGS"].split()
    assert flags[:2] == ["--xla_a=1", "--xla_gpu_triton_gemm_any=false"]
    assert flags[2] == "--xla_gpu_enable_latency_hiding_scheduler=true"
    assert len({flag.partition("=")[0] for flag in flags}) == len(flags) == 1 + len(xla_flags.GPU)


def test_xla_knows_every_flag(monkeypatch, plugin):
    """It ends a process that names another one."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    xla_flags.ask()
    program = "import jax; jax.numpy.zeros(()).block_until_ready()"
    run = lambda: subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run().returncode == 0
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"] + " --xla_gpu_enable_no_such_thing=1")
    assert run().returncode != 0
