"""Compiled programs are kept where the user says, or where it is usual."""

import pathlib
import sys

import jax
import pytest

from qwen2audio_jax import compilation_cache


@pytest.fixture
def set_to(monkeypatch):
    """What jax is told to be, which knows of no folder for programs."""
    before, told = jax.config.jax_compilation_cache_dir, {}
    jax.config.update("jax_compilation_cache_dir", None)
    with monkeypatch.context() as patched:
        patched.setattr(jax.config, "update", told.__setitem__)
        yield told
    jax.config.update("jax_compilation_cache_dir", before)


def test_programs_are_kept(monkeypatch, tmp_path, set_to):
    """Where compiled programs lie: as the user says, else as jax is told, else in the cache."""
    monkeypatch.delenv("QWEN2AUDIO_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compilation_cache.keep()
    assert set_to["jax_compilation_cache_dir"] == str(tmp_path / "qwen2audio" / "compiled")
    assert "jax_persistent_cache_enable_xla_caches" not in set_to
    (tmp_path / "file").touch()
    for nowhere in ("", str(tmp_path / "file" / "folder")):
        set_to.clear()
        monkeypatch.setenv("QWEN2AUDIO_CACHE", nowhere)
        compilation_cache.keep()
        assert not set_to


def test_a_user_without_a_home(monkeypatch, set_to):
    """Nothing is kept, unless a folder is named."""

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(pathlib.Path, "home", homeless)
    for name in ("QWEN2AUDIO_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    compilation_cache.keep()
    assert not set_to


def test_a_bucket_is_no_folder_of_this_machine(monkeypatch, tmp_path, set_to):
    """A URL is jax's to open; nothing of its name is made here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QWEN2AUDIO_CACHE", "memory://bucket/compiled")
    compilation_cache.keep()
    assert set_to["jax_compilation_cache_dir"] == "memory://bucket/compiled"
    assert set_to["jax_persistent_cache_enable_xla_caches"] == "none"  # XLA opens no URL
    assert not list(tmp_path.iterdir())


def test_a_bucket_is_one_place_for_all_that_name_it(monkeypatch):
    """No mark has to be left there."""
    monkeypatch.setattr(compilation_cache, "kept", lambda: "gs://bucket/compiled")
    mark = compilation_cache.mark()
    assert compilation_cache.sees(mark) and not compilation_cache.sees("gs://other/compiled")
    compilation_cache.unmark(mark)
    monkeypatch.setattr(compilation_cache, "kept", lambda: None)
    assert not compilation_cache.sees(mark) and not compilation_cache.sees(compilation_cache.mark())


def test_a_bucket_that_nothing_here_can_open(monkeypatch, set_to, capsys):
    """It is told, and done without."""
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.setenv("QWEN2AUDIO_CACHE", "gs://bucket/compiled")
    compilation_cache.keep()
    said = capsys.readouterr().err
    assert not set_to and "not kept: gs://bucket/compiled" in said and "[gcs]" in said
