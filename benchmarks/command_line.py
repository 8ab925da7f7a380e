"""How long the command line takes to its first word, compiling and with compiled programs kept.

Example:

    python -m benchmarks.command_line

Each run is a process of its own: start, imports, weights, the answer to a clip of two seconds.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import soundfile

from benchmarks.sides import RATE, make_clip


def first_word(model: str, clip: pathlib.Path, cache: pathlib.Path) -> float:
    """Seconds from the start of the program to the first that it prints."""
    command = [sys.executable, "-m", "qwen2audio_jax.cli", "transcribe", "--model", model, clip]
    start = time.perf_counter()
    kept = {**os.environ, "QWEN2AUDIO_CACHE": os.fspath(cache)}
    process = subprocess.Popen(command, env=kept, stdout=subprocess.PIPE)
    process.stdout.read(1)
    seconds = time.perf_counter() - start
    process.communicate()
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} ended with {process.returncode}")
    return seconds


def main(arguments: list[str] | None = None) -> None:
    first, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        clip = pathlib.Path(folder, "clip.wav")
        soundfile.write(clip, make_clip(2.0), RATE)
        cache = pathlib.Path(folder, "compiled")
        seconds = [round(first_word(options.model, clip, cache), 2) for _ in range(2)]
    print(
        json.dumps({"model": options.model, "first_run_s": seconds[0], "second_run_s": seconds[1]})
    )


if __name__ == "__main__":
    main()
