"""Compiled programs are kept on disk, so that only the first run waits for them."""

import os
import pathlib
import sys

import jax


def keep() -> None:
    """Has jax keep what it compiles from now on, for the next run.

    Programs lie in QWEN2AUDIO_CACHE, a folder or a URL as gs://bucket/compiled (none are kept if
    that is empty), else where jax is told to keep them, else under the user's cache folder. A
    folder that cannot be written is done without; of several hosts the first alone writes.
    """
    folder = os.environ.get("QWEN2AUDIO_CACHE")
    if folder is None:
        folder = jax.config.jax_compilation_cache_dir or _usual()
    folder = os.fspath(folder or "")
    if not folder or not (_reachable if "://" in folder else _writable)(folder):
        return
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _usual() -> pathlib.Path | None:
    """The user's cache folder; None for a user without a home."""
    try:
        home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    except RuntimeError:
        return None
    return pathlib.Path(home, "qwen2audio", "compiled")


def _writable(folder: str) -> bool:
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def _reachable(url: str) -> bool:
    from qwen2audio_jax.data import storage

    try:
        storage.reachable(url)
    except (ImportError, ValueError) as error:
        print(f"compiled programs are not kept: {error}", file=sys.stderr)
        return False
    return True
