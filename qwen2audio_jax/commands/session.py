"""What every command starts with and says on the terminal: model, cache, clips, notes."""

import argparse
import contextlib
import json
import os
import pathlib
import re
import sys
import warnings
from collections.abc import Iterator

import jax
import tqdm

from qwen2audio_jax.commands import PROGRAM
from qwen2audio_jax.model import Qwen2Audio
from qwen2audio_jax.processor import LongAudioWarning
from qwen2audio_jax.sampling import Sampling

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/|data:")
SOUND = re.compile(
    r"\.(aac|aif[cf]?|aiff|amr|au|caf|flac|m4[ab]|mk[av]|mov|mp[234]|oga|ogg|opus|snd|w64|wave?"
    r"|web[am]|wma)$",
    re.IGNORECASE,
)
FILE = re.compile(r"\S+\.\w{2,4}$")  # one word with an ending


def load(options: argparse.Namespace) -> Qwen2Audio:
    """The model that the options name; compiled programs are kept for the next run."""
    cache_programs()
    shown = options.model != "tiny" and sys.stderr.isatty()
    return Qwen2Audio.from_pretrained(options.model, dtype=options.dtype, progress=shown)


def sampling(options: argparse.Namespace) -> Sampling:
    return Sampling(
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
    )


def cache_programs() -> None:
    """Keeps compiled programs on disk, so that only the first run waits for them.

    They lie in QWEN2AUDIO_CACHE (none are kept if that is empty), else where jax is told to keep
    them, else under the user's cache folder. A folder that cannot be written is done without.
    """
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    usual = jax.config.jax_compilation_cache_dir or pathlib.Path(home, PROGRAM, "compiled")
    folder = os.environ.get("QWEN2AUDIO_CACHE", usual)
    if not folder:
        return
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:
        return
    if not os.access(folder, os.W_OK):
        return
    jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def is_clip(argument: str) -> bool:
    """Whether an argument means a sound, there or misspelt, rather than a text."""
    if os.path.exists(os.path.expanduser(argument)):
        return True
    if any(form.match(argument) for form in (URL, FILE)) or SOUND.search(argument):
        return True
    return "/" in argument and not re.search(r"\s|[?？]$", argument)


def record(*, text: str | None = None, **fields) -> str:
    """One JSON object on one line, without the fields that have nothing to say."""
    said = {} if text is None else {"text": text}
    kept = {key: value for key, value in fields.items() if value}
    return json.dumps({"audio": kept.pop("audio"), **said, **kept}, ensure_ascii=False)


def put(line: str) -> None:
    """Prints an answer, above the progress bar where there is one."""
    tqdm.tqdm.write(line)
    sys.stdout.flush()


def error(message: str) -> None:
    print(f"{PROGRAM}: error: {message}", file=sys.stderr)


def note(message: str) -> None:
    print(f"{PROGRAM}: {message}", file=sys.stderr)


@contextlib.contextmanager
def noting() -> Iterator[None]:
    """Says what the processor warns of in a line of its own, without Python's file and line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", LongAudioWarning)
        yield
    for warning in caught:
        note(str(warning.message))


def note_cut(name: str) -> None:
    note(f"{name}: the answer is as long as it may be, and was cut; --max-new-tokens allows more")
