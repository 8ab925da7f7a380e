"""What XLA is asked for beyond its defaults, in one place."""

import importlib.util
import os

# The plugins of jax's extras for GPUs.
PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
LAYER = 2**29  # bytes: one of the 7b preset's decoder is 466 MB in bfloat16
# What jax's guide to GPUs and NVIDIA's for training with it (JAX-Toolbox) begin with; not every
# version has it on by itself. What concerns exchanges changes nothing on one GPU; on several it was
# not measured here. The same bits are not asked for: cuDNN's attention, backwards, and scattered
# sums may add up in another order each time, unless the user sets
# --xla_gpu_exclude_nondeterministic_ops=true, which is slower.
GPU = {
    # Parameters come from other devices while the layer before theirs computes.
    "--xla_gpu_enable_latency_hiding_scheduler": "true",
    # Triton's matrix products take in what surrounds them, and are tuned beside cuBLAS's.
    "--xla_gpu_triton_gemm_any": "true",
    # A scan over layers asks for the next one's parameters within the round of the one before:
    # without, a round begins by waiting for its own.
    "--xla_gpu_enable_pipelined_all_gather": "true",
    # A layer's gradients are summed while the next one's are computed, rather than at the end of
    # its own round.
    "--xla_gpu_enable_pipelined_reduce_scatter": "true",
    # The same for those that all devices keep: of norms and biases, and of copies over slices.
    "--xla_gpu_enable_pipelined_all_reduce": "true",
    # All matrices of a layer come in one exchange, not one after the other: each costs a start, and
    # small ones do not fill the links. More than a layer would wait for the last of its parts.
    "--xla_gpu_all_gather_combine_threshold_bytes": f"{LAYER}",
    # And their gradients go in one.
    "--xla_gpu_reduce_scatter_combine_threshold_bytes": f"{LAYER}",
    "--xla_gpu_all_reduce_combine_threshold_bytes": f"{LAYER}",
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
