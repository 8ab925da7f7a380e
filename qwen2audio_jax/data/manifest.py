"""Manifests: JSON Lines that name audio files and what is heard in them."""

import dataclasses
import json
import os
from typing import Any

from etils import epath

from qwen2audio_jax.data.sources import ELSEWHERE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One row: where the sound is, what is said in it, and everything else the row states."""

    audio: str  # a path, absolute if the manifest's own is, or a URL
    text: str
    fields: dict[str, Any]  # the whole row as written: split, speaker, language, ...


def _parse(line: str, folder: epath.Path) -> Sample:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f"wanted an object, got {type(row).__name__}")
    for field in ("audio", "text"):
        if field not in row:
            raise ValueError(f"no {field!r} among {', '.join(row) or 'no fields'}")
        if not isinstance(row[field], str):
            raise ValueError(f"{field!r} must be a string, got {json.dumps(row[field])}")
    if not row["audio"]:
        raise ValueError("'audio' is empty")
    elsewhere = ELSEWHERE.match(row["audio"])
    audio = row["audio"] if elsewhere else os.fspath(folder / row["audio"])
    return Sample(audio=audio, text=row["text"], fields=row)


def read(path: epath.PathLike, *, split: str | None = None) -> list[Sample]:
    """Reads a manifest; relative paths in it start at its own folder.

    Args:
      path: a JSONL file, local or on any storage that etils.epath reaches (gs://, s3://).
      split: keeps only the rows whose "split" is this; by default all.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a row is not a JSON object with the strings "audio" and "text" (the message
        names file and line), or no row is left.
    """
    path = epath.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no manifest at {path}")
    samples = []
    text = path.read_text(encoding="utf-8").removeprefix("\ufeff")  # epath knows no utf-8-sig
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            samples.append(_parse(line, path.parent))
        except ValueError as error:  # JSONDecodeError is one
            raise ValueError(f"{path}, line {number}: {error}") from None
    kept = [s for s in samples if split is None or s.fields.get("split") == split]
    if not kept:
        splits = sorted({str(s.fields["split"]) for s in samples if "split" in s.fields})
        wanted = "rows" if split is None else f"rows with split {split!r}"
        raise ValueError(f"{path}: no {wanted}; splits in it: {', '.join(splits) or 'none'}")
    return kept
