"""What a block keeps for its backward pass, by names that are MaxText's; the rest is made again."""

from collections.abc import Callable
from typing import Literal

import jax
from jax.ad_checkpoint import checkpoint_name

QKV = ("query", "key", "value")
PRODUCTS = (*QKV, "out", "gate", "up", "down")  # what matrices make: without attention and norms

# What is kept on the device, and what in the host's memory.
# fmt: off
POLICIES = {
    "none":                None,  # all
    "full":                ((), ()),  # nothing but the blocks' inputs
    "minimal":             (PRODUCTS, ()),  # the least work a second time
    "save_dot_except_mlp": ((*QKV, "out"), ()),
    "save_qkv_proj":       (QKV, ()),
    "save_out_proj":       (("out",), ()),
    "minimal_offloaded":   ((), PRODUCTS),
    "qkv_proj_offloaded":  ((), QKV),
}
# fmt: on

Policy = Literal[tuple(POLICIES)]
name = checkpoint_name


def wrap(step: Callable, policy: str, *, scanned: bool) -> Callable:
    """The step of a block with a backward pass that keeps what `policy` says.

    Args:
      scanned: whether it is the body of a scan, in which the compiler cannot undo it anyway.

    Raises:
      ValueError: no policy has that name; the message lists those there are.
    """
    if policy not in POLICIES:
        raise ValueError(f"no remat_policy {policy!r}; there are {', '.join(POLICIES)}")
    if POLICIES[policy] is None:
        return step
    kept, away = POLICIES[policy]
    if away:
        how = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=list(kept),
            names_which_can_be_offloaded=list(away),
            offload_src="device",
            offload_dst="pinned_host",
        )
    else:
        how = jax.checkpoint_policies.save_only_these_names(*kept) if kept else None
    return jax.checkpoint(step, policy=how, prevent_cse=not scanned)
