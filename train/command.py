"""What all programs that are told by flags share: one line for a mistake, and the exit status."""

import contextlib
import functools
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import tyro

from qwen2audio_jax import compilation_cache
from qwen2audio_jax.training import hosts, memory, xla_flags

T = TypeVar("T")

GIVEN = (ValueError, FileNotFoundError, ImportError)  # what was given is wrong
MET = (FloatingPointError, OSError)  # it could not go on


def run(
    main: Callable[[Any], int | None],
    settings: Any,
    name: str,
    doc: str | None,
    *,
    extra: str = "train",
) -> NoReturn:
    """Reads the command line into `settings`, runs a program, and exits with what it gives.

    Args:
      name: the module that is run, "train.shard".
      doc: what --help begins with.
      extra: of the package, what the program needs.
    """
    with guard(name, extra):
        cli = functools.partial(tyro.cli, settings, prog=f"python -m {name}", description=doc)
        sys.exit(main(read(cli)))


def prepare() -> None:
    """What a program that trains asks of the machine, before all else."""
    memory.keep()
    xla_flags.ask()
    compilation_cache.keep()


def read(cli: Callable[[], T]) -> T:
    """What tyro reads; what is wrong with the flags is said in one line rather than in its box.

    Raises:
      ValueError: it cannot be read.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return cli()
    except SystemExit as end:
        if not end.code:  # --help
            raise
    raise ValueError(f"{_essence(said.getvalue())}; --help teaches")


@contextlib.contextmanager
def guard(name: str, extra: str = "train") -> Iterator[None]:
    """Ends a program with one line if it fails: 2, something that was given is wrong; 1, it could
    not go on, as with a full disk; 130, Ctrl-C. Where QWEN2AUDIO_TRACEBACK is set, the stack is
    printed before that line."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, (*GIVEN, *MET)):
            if hosts.joined():
                traceback.print_exception(error)
                leave(1)
            raise
        if os.environ.get("QWEN2AUDIO_TRACEBACK"):
            traceback.print_exception(error)
        missing = isinstance(error, ModuleNotFoundError)
        more = f"; pip install 'qwen2audio_jax[{extra}]'" if missing else ""
        stop(name, f"{error}{more}", 2 if isinstance(error, GIVEN) else 1)
    except KeyboardInterrupt:
        leave(130)


def stop(name: str, error: object, status: int) -> NoReturn:
    who = f"{hosts.here()}: " if hosts.joined() else ""
    print(f"{name}: error: {who}{' '.join(str(error).split())}", file=sys.stderr, flush=True)
    leave(status)


def leave(status: int) -> NoReturn:
    """Exits; at once where others have been met, who would wait for it as it for them."""
    if hosts.joined():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _essence(box: str) -> str:
    """Of a box of tyro's, what is wrong, and the names that come near."""
    box = re.sub(r"__tyro-dummy-inner__\.?", "--", box)  # settings that a preset begins with
    parts = [[]]
    for line in box.splitlines()[1:-1]:
        line = line.strip("│| ")
        if set(line) <= {"─", "-"}:  # the latter where nothing else can be shown
            parts.append([])
        else:
            parts[-1].append(line)
    wrong, *more = filter(None, parts)
    said = [" ".join(wrong)]
    for head, *rest in more:
        if head.startswith("Perhaps you meant"):
            flags = dict.fromkeys(line.split()[0] for line in rest if line.startswith("--"))
            said.append(f"perhaps {' or '.join(flags)}")
        elif not head.startswith(("For full helptext", "Argument helptext")):
            said.append(" ".join([head, *rest]))
    return "; ".join(said)
