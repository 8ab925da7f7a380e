"""Programs that carry checkpoints between PyTorch and JAX; run from a checkout."""

import argparse
import pathlib
import sys
from collections.abc import Callable


def arguments(doc: str, **sources: str) -> argparse.ArgumentParser:
    """The options that the conversions share.

    Args:
      sources: what each folder that is read has to be, by its name.
    """
    first, _, rest = doc.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, wanted in sources.items():
        parser.add_argument(name, metavar=name.upper(), help=wanted)
    parser.add_argument(
        "target", metavar="DST", type=pathlib.Path, help="a folder that is empty or not there yet"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is in DST")
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")
    return parser


def guard(program: Callable[[], int | None]) -> int:
    """Runs a program; a user's mistake is one line and exit status 2."""
    try:
        return program() or 0
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return 130
