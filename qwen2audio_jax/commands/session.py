"""What every command starts with and says on the terminal: model, cache, clips, notes."""

import argparse
import contextlib
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator

import tqdm
from jax.sharding import Mesh

from qwen2audio_jax import compilation_cache
from qwen2audio_jax.commands import PROGRAM
from qwen2audio_jax.model import Qwen2Audio
from qwen2audio_jax.processor import LongAudioWarning
from qwen2audio_jax.sampling import Sampling

URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*:/\S+|data:[^\s,]*;base64,[^ ]*)\Z")
SOUND = re.compile(
    r"\S\.(aac|aif[cf]?|aiff|amr|au|caf|flac|m4[ab]|mk[av]|mov|mp[234]|oga|ogg|opus|snd|w64|wave?"
    r"|web[am]|wma)$",
    re.IGNORECASE,
)
PATH = re.compile(r"(\.\.?|~[^\s/]*)?/")


def load(options: argparse.Namespace) -> Qwen2Audio:
    """The model that the options name, where they want it; compiled programs are kept for the next
    run.

    Raises:
      ValueError: as `Qwen2Audio.from_pretrained`; or there is no such mesh of the devices here.
    """
    compilation_cache.keep()
    shown = options.model != "tiny" and sys.stderr.isatty()
    return Qwen2Audio.from_pretrained(
        options.model, dtype=options.dtype, mesh=_mesh(options), progress=shown
    )


def _mesh(options: argparse.Namespace) -> Mesh | None:
    """The devices that share the model; None where nothing is said of them."""
    sizes = {k: v for k, v in vars(options).items() if k.startswith("ici_") and v is not None}
    if not sizes:
        return None
    from qwen2audio_jax.training.settings import MeshConfig  # and with it all that trains

    return MeshConfig(**sizes).make()


def sampling(options: argparse.Namespace) -> Sampling:
    """How the options choose tokens.

    Raises:
      ValueError: an option is out of range, or would do nothing.
    """
    chance = {"--top-p": options.top_p, "--top-k": options.top_k, "--seed": options.seed}
    idle = [name for name, value in chance.items() if value is not None]
    if idle and not options.temperature:
        raise ValueError(
            f"{', '.join(idle)} does nothing at temperature 0: wanted --temperature above 0 too"
        )
    return Sampling(
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed or 0,
    )


def is_clip(argument: str) -> bool:
    """Whether an argument means a sound, there or misspelt, rather than a text."""
    there = os.path.exists(os.path.expanduser(argument))
    return there or names_sound(argument) or bool(PATH.match(argument))


def names_sound(text: str) -> bool:
    """Whether a text is a URL, or one word that ends like a sound file."""
    return bool(URL.match(text) or (SOUND.search(text) and not re.search(r"\s", text)))


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
