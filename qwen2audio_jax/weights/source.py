"""Where a checkpoint lies: "tiny", a folder or a hub id -> a folder on this machine."""

import pathlib
import re
from collections.abc import Sequence

TINY = pathlib.Path(__file__).resolve().parent.parent / "assets" / "tiny"


def locate(source: str | pathlib.Path, patterns: Sequence[str]) -> pathlib.Path:
    """Finds the folder of a checkpoint, fetching it from the hub if it is nowhere else.

    Args:
      source: "tiny" (shipped with this package), a folder, or a hub id as "owner/name".
      patterns: the files to fetch from the hub, as globs; a local folder is taken as it is.

    Raises:
      ValueError: there is no such folder, and no such repository within reach.
    """
    if source == "tiny":
        if not TINY.is_dir():
            raise ValueError(f"the model 'tiny' is not installed: wanted the folder {TINY}")
        return TINY
    folder = pathlib.Path(source).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)):
        raise ValueError(
            f"wanted 'tiny', a folder or a hub id like owner/name, got {str(source)!r}"
        )
    import huggingface_hub  # here, because a local folder must not wait for its import

    try:
        return pathlib.Path(huggingface_hub.snapshot_download(str(source), allow_patterns=patterns))
    except Exception as error:  # its HTTP client's errors share no base class with its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{str(source)!r} is neither a folder here nor a repository that the hub gave: {reason}"
        ) from error
