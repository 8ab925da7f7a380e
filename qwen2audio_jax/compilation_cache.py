"""Compiled programs are kept on disk, so that only the first run waits for them."""

import contextlib
import os
import pathlib
import secrets
import sys
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache as programs


def keep() -> None:
    """Has jax keep what it compiles from now on, for the next run.

    Programs lie in QWEN2AUDIO_CACHE, a folder or a URL as gs://bucket/compiled (none are kept if
    that is empty), else where jax is told to keep them, else under the user's cache folder. A
    folder that cannot be written is done without; of several processes the first alone writes, and
    `hosts.join` sees to it that all find what it has written, or nothing is kept.
    """
    folder = os.environ.get("QWEN2AUDIO_CACHE")
    if folder is None:
        folder = jax.config.jax_compilation_cache_dir or _usual()
    folder = os.fspath(folder or "")
    if not folder or not (_reachable if "://" in folder else _writable)(folder):
        return
    jax.config.update("jax_compilation_cache_dir", folder)
    if "://" in folder:  # there jax writes programs; XLA, what it has tuned, to folders alone
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def kept() -> str | None:
    """Where programs are kept, if they are."""
    return jax.config.jax_compilation_cache_dir or None


@contextlib.contextmanager
def anew() -> Iterator[None]:
    """What is compiled in here is compiled, not found: on CPUs a program that was found cannot be
    written once more (jax 0.10; what was written lacks functions)."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    programs.reset_cache()  # jax asks whether there is one only once
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        programs.reset_cache()


def stop() -> None:
    """Has jax keep none, and look for none."""
    jax.config.update("jax_compilation_cache_dir", None)


def mark() -> str:
    """Leaves a mark where this process keeps programs, by which others tell whether they see them:
    an empty file's name, or the URL, which is one place for all."""
    folder = kept()
    if folder is not None and "://" in folder:
        return folder
    name = f"seen-{secrets.token_hex(8)}"
    if folder is not None:
        with contextlib.suppress(OSError):  # nobody sees what cannot be written
            os.makedirs(folder, exist_ok=True)
            pathlib.Path(folder, name).touch()
    return name


def sees(name: str) -> bool:
    """Whether another process's mark is where this one looks for programs."""
    folder = kept()
    if folder is None or "://" in folder:
        return folder == name
    return pathlib.Path(folder, name).exists()


def unmark(name: str) -> None:
    """Takes a mark away."""
    folder = kept()
    if folder is not None and "://" not in folder:
        with contextlib.suppress(OSError):
            pathlib.Path(folder, name).unlink()


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
