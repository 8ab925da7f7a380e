"""Files that lie elsewhere: gs://, s3://, hf://, https:// and what else fsspec knows."""

import atexit
import contextlib
import functools
import os
import pathlib
import posixpath
import re
import shutil
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

from qwen2audio_jax.patience import passing, patiently

URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
WEB = ("http", "https")
ABSENT = (404, 410)  # as web servers say it
PATIENCE = 60  # seconds that one may stay mute
COPY = "qwen2audio-copy-"  # begins the names of copies
EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3"}  # the package's, by scheme


class _Passing(OSError):
    """A storage does not answer as it should; it may yet."""


def elsewhere(path: str) -> str | None:
    """The scheme of a URL; None: it is a path on a disk."""
    found = URL.match(path)
    return found[1].lower() if found else None


def reachable(path: str) -> None:
    """Asks whether a storage is known and its package there, without asking the storage.

    Raises:
      ImportError: the package is not installed; the message names it.
      ValueError: there is no such storage.
    """
    scheme = elsewhere(path)
    if scheme is None or scheme in WEB:
        return
    import fsspec

    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        raise _uninstalled(path, error) from None
    except ValueError:
        wanted = "a path, or a URL that fsspec knows (gs://, s3://, hf://, https://, ...)"
        raise ValueError(f"wanted {wanted}, got {path}") from None


def read(path: str) -> bytes:
    """All of a file.

    Raises:
      ImportError, ValueError: as `reachable`.
      FileNotFoundError: there is none.
      OSError: it cannot be read, whatever the storage's own package calls that; several attempts
        have failed, unless it was refused.
    """

    def whole() -> bytes:
        with _opened(path) as file:
            return file.read()

    return patiently(whole, _Passing)


@functools.cache
def copied(path: str) -> str:
    """A copy on this host's disk, for as long as this process lives: its workers map it, too.

    It is fetched once; what changes meanwhile is seen by the next process.

    Raises:
      ImportError, ValueError, OSError: as `read`.
    """
    _remove_left()
    handle, copy = tempfile.mkstemp(prefix=COPY, suffix=posixpath.splitext(path)[1])
    atexit.register(pathlib.Path(copy).unlink, missing_ok=True)
    lock(handle)  # and never closed: it is locked until this process ends, however it does

    def whole() -> None:
        with open(copy, "wb") as here, _opened(path) as there:
            shutil.copyfileobj(there, here, 1 << 24)

    patiently(whole, _Passing)
    return copy


def _remove_left() -> None:
    """Removes copies of processes that were killed before they could."""
    for copy in pathlib.Path(tempfile.gettempdir()).glob(f"{COPY}*"):
        with contextlib.suppress(OSError), copy.open("r+b") as file:
            # an empty one may be about to be locked
            if os.fstat(file.fileno()).st_size and lock(file.fileno()):
                copy.unlink()


def lock(handle: int) -> bool | None:
    """Whether a file is this process's now, until it ends, however it does; not if another has it.
    None: nothing can be locked there."""
    try:
        import fcntl  # not of every system

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True


def beside(path: str, name: str) -> str:
    """What is called so in the folder of a file, on a disk or elsewhere."""
    url = URL.match(path)
    if url is None:
        return os.fspath(pathlib.PurePath(path).parent / name)
    folder = posixpath.dirname(path[url.end() :])
    if elsewhere(path) in WEB:
        name = urllib.parse.quote(name)  # a file's: "take#2.wav" is all of one
    return url[0] + posixpath.normpath(posixpath.join(folder, name))


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
    reachable(path)
    try:
        with _open(path) as file:
            yield file
            if elsewhere(path) in WEB and file.length:
                raise OSError(f"the server promised {file.length} bytes more than it sent")
    except ImportError as error:
        raise _uninstalled(path, error) from None
    except MemoryError:
        raise
    except Exception as error:  # packages have types of their own for what a network does
        code = getattr(error, "code", None)
        if isinstance(error, FileNotFoundError) or code in ABSENT:
            raise FileNotFoundError(f"no file at {path}") from None
        # A mute one has been waited for.
        final = PermissionError | ValueError | TimeoutError
        refused = isinstance(getattr(error, "reason", error), final)
        refused = refused or (isinstance(code, int) and not passing(code))
        told = isinstance(error, OSError) and (error.strerror or str(error))
        told = told or f"{type(error).__name__}: {error}"
        kind = OSError if refused else _Passing
        raise kind(f"{path}: {' '.join(told.split())}") from None


def _open(path: str) -> Any:
    if elsewhere(path) in WEB:
        # Some servers refuse Python's own name.
        request = urllib.request.Request(path, headers={"User-Agent": "qwen2audio_jax"})
        return urllib.request.urlopen(request, timeout=PATIENCE)
    import fsspec

    files, name = fsspec.url_to_fs(path)
    return files.open(name, "rb")


def _uninstalled(path: str, error: ImportError) -> ImportError:
    extra = EXTRAS.get(elsewhere(path))
    how = f"; pip install 'qwen2audio_jax[{extra}]'" if extra else ""
    return ImportError(f"{path}: {error}{how}")
