"""What XLA is asked for beyond its defaults, in one place."""

import importlib.util
import os

# The plugins of jax's extras for GPUs.
PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
# What jax's guide to GPUs begins with; not every version has it on by itself.
GPU = {
    # Parameters come from other devices while the layer before theirs computes.
    "--xla_gpu_enable_latency_hiding_scheduler": "true",
    # Triton's matrix products take in what surrounds them, and are tuned beside cuBLAS's.
    "--xla_gpu_triton_gemm_any": "true",
}


def ask() -> None:
    """Has XLA overlap and fuse more, where it is to compile for GPUs; before jax's first device.

    A flag that is in XLA_FLAGS already stays as it is. TPUs' compiler needs none of this: what
    `train.compile` tells is of its defaults.
    """
    if not any(map(importlib.util.find_spec, PLUGINS)):
        return
    given = os.environ.get("XLA_FLAGS", "")
    named = {flag.partition("=")[0] for flag in given.split()}
    more = (f"{name}={value}" for name, value in GPU.items() if name not in named)
    os.environ["XLA_FLAGS"] = " ".join([*given.split(), *more])
