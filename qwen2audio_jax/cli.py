"""The command line: `qwen2audio ask | transcribe | chat`."""

import argparse
import atexit
import functools
import importlib
import importlib.metadata
import io
import os
import signal
import sys
from collections.abc import Sequence

from qwen2audio_jax.commands import PROGRAM

MAIN = """\
Listens to sound and answers in text.

  qwen2audio transcribe talk.mp3                 write down what is said
  qwen2audio ask bell.wav "What is that sound?"  ask about a clip
  qwen2audio ask question.wav                    voice chat: answer what is said in it
  qwen2audio chat                                talk it over, turn by turn

A clip is a file (wav, flac, mp3, ogg, opus; m4a and others with ffmpeg) or a URL.
`qwen2audio COMMAND --help` says more, with examples.
"""
ASK = """\
Answers about clips: with a question it is audio analysis, without one voice chat.

  qwen2audio ask bell.wav "What is that sound?"
  qwen2audio ask question.wav                        what is said in it is answered
  qwen2audio ask *.wav "What is that?" --json        every clip by itself, in batches
  qwen2audio ask a.wav b.wav "Which is louder?" --together
  qwen2audio ask a.wav -q "Does it say clip.wav?"    where a question looks like a file
  qwen2audio ask *.wav --mesh.ici-data-parallelism 4 --mesh.ici-tensor-parallelism 2

An argument that exists, is a URL, is one word that ends like a sound file, or begins with ./,
../, / or ~/ is a clip; the one that is none of these is the question. A clip over 30 s is
heard as consecutive windows of 30 s.
"""
TRANSCRIBE = """\
Writes down what is said. Clips may have any length: what is longer than a window (30 s, or what
the model has learned from) is cut where it is quietest.

  qwen2audio transcribe talk.mp3
  qwen2audio transcribe talk.mp3 --timestamps
  qwen2audio transcribe talk.mp3 --format srt > talk.srt
  qwen2audio transcribe *.wav --json                 one object a line
  qwen2audio transcribe *.wav --format vtt --output-dir subtitles
  qwen2audio transcribe reden.flac --language de     without it the model is to tell
  qwen2audio transcribe talk.mp3 --chat --model Qwen/Qwen2-Audio-7B-Instruct

A base model gets the clip and `Detect the language and recognize the speech:`, and begins its
answer with a tag like <|en|>; --language en ends the prompt with that tag. --chat puts the same
prompt into a user's turn, and --prompt another in its place.
"""
CHAT = """\
A conversation by text and sound.

  qwen2audio chat
  qwen2audio chat bell.wav                           the first message is about this clip
  printf 'bell.wav\\nWhat was that?\\n' | qwen2audio chat

Every line is a message. A line that is a clip's path is a spoken message; `bell.wav What is
that?` asks about a clip; `/audio PATH` keeps a clip for the next message, and several for
several. `/new` forgets what was said, `/help` lists the commands, `/exit` or Ctrl-D ends.
Ctrl-C stops an answer.
"""
DTYPES = ("float32", "bfloat16", "float16")
MESH = {
    "data": "copies of the model, each for clips of its own (1)",
    "fsdp": "devices that each copy is spread over, with clips of their own (-1: all others)",
    "tensor": "devices that share each answer by heads and hidden units (1)",
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, where argparse prints the usage too."""

    def error(self, message: str):
        self.exit(2, f"{PROGRAM}: error: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0, 2 for a user's mistake, 130 for Ctrl-C."""
    # While Python itself ends, Ctrl-C would print a trace.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)
    try:
        _open_streams()
        options = build_parser().parse_args(arguments)
        # Here, so that --help need not wait for what a command needs.
        status = importlib.import_module(options.module).run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Python flushes once more at the end, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError) as error:
        return _fail(str(error))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).splitlines()[:1] or ["no memory is left"]
        return _fail(f"{reason[0]} (--dtype bfloat16 or a smaller --batch-size takes less memory)")
    return status


def _fail(message: str) -> int:
    print(f"{PROGRAM}: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _open_streams() -> None:
    """Lets any name be printed, and gives what a caller has closed a place to go."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  as long as the process lasts
        elif isinstance(stream, io.TextIOWrapper) and mode == "w":  # a notebook's is none
            # A file's name may have bytes that are no text.
            stream.reconfigure(errors="backslashreplace")


def _version() -> str:
    try:
        return importlib.metadata.version("qwen2audio_jax")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def build_parser() -> argparse.ArgumentParser:
    parser = _described(Parser, MAIN, prog=PROGRAM)
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {_version()}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_ask(commands)
    _add_transcribe(commands)
    _add_chat(commands)
    return parser


def _described(make, text: str, *arguments, **settings) -> argparse.ArgumentParser:
    form = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=32)
    settings = {"formatter_class": form, "allow_abbrev": False, "description": text} | settings
    return make(*arguments, **settings)


def _add_ask(commands) -> None:
    parser = _described(
        commands.add_parser,
        ASK,
        "ask",
        help="answer about clips",
        usage=f"{PROGRAM} ask CLIP... [QUESTION] [OPTION...]",
    )
    parser.set_defaults(module="qwen2audio_jax.commands.ask")
    parser.add_argument("arguments", nargs="+", metavar="CLIP... [QUESTION]")
    parser.add_argument("-q", "--question", metavar="TEXT", help="the question")
    parser.add_argument(
        "--together", action="store_true", help="one answer about all clips: Audio 1, Audio 2, ..."
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    _add_batch_size(parser)
    _add_system(parser)
    _add_model(parser)


def _add_transcribe(commands) -> None:
    parser = _described(
        commands.add_parser,
        TRANSCRIBE,
        "transcribe",
        help="write down what is said",
        usage=f"{PROGRAM} transcribe CLIP... [OPTION...]",
    )
    parser.set_defaults(module="qwen2audio_jax.commands.transcribe")
    parser.add_argument("clips", nargs="+", metavar="CLIP")
    parser.add_argument(
        "--language",
        default="auto",
        metavar="CODE",
        help="what is spoken: en, zh, ... (auto: the model is to tell)",
    )
    parser.add_argument(
        "--prompt", metavar="TEXT", help="what to ask of the model instead; follows the clip"
    )
    parser.add_argument(
        "--chat", action="store_true", help="ask as a user in a chat: for Instruct models"
    )
    parser.add_argument(
        "--window",
        type=float,
        metavar="SECONDS",
        help="the longest part heard at once (the model's own; at most 30)",
    )
    parser.add_argument("--timestamps", action="store_true", help="print windows with their times")
    parser.add_argument("--format", choices=("text", "json", "srt", "vtt"), default="text")
    parser.add_argument(
        "--json", action="store_const", dest="format", const="json", help="same as --format json"
    )
    parser.add_argument(
        "--output-dir", metavar="FOLDER", help="write a file a clip, named after it"
    )
    _add_batch_size(parser)
    _add_model(parser)


def _add_chat(commands) -> None:
    parser = _described(
        commands.add_parser,
        CHAT,
        "chat",
        help="talk it over, turn by turn",
        usage=f"{PROGRAM} chat [CLIP...] [OPTION...]",
    )
    parser.set_defaults(module="qwen2audio_jax.commands.chat")
    parser.add_argument("clips", nargs="*", metavar="CLIP")
    _add_system(parser)
    _add_model(parser)


def _add_batch_size(parser) -> None:
    parser.add_argument(
        "--batch-size", type=_positive, default=8, metavar="N", help="clips heard at once (8)"
    )


def _add_system(parser) -> None:
    parser.add_argument("--system", metavar="TEXT", help="the system message")


def _add_model(parser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default=os.environ.get("QWEN2AUDIO_MODEL") or "tiny",
        help="tiny, a folder or a hub id (%(default)s; QWEN2AUDIO_MODEL sets it too)",
    )
    group.add_argument(
        "--dtype", choices=DTYPES, help="of the parameters (float32 on CPUs, else bfloat16)"
    )
    group = parser.add_argument_group(
        "mesh",
        "All accelerators here share the model, as in training; without any of these it is on\n"
        "one. For speed, tensor shares each answer and data the clips of a batch.",
    )
    for axis, text in MESH.items():
        name = f"ici_{axis}_parallelism"
        flag = f"--mesh.{name.replace('_', '-')}"
        group.add_argument(flag, dest=name, type=int, metavar="N", help=text)
    group = parser.add_argument_group("answer")
    group.add_argument(
        "--max-new-tokens", type=_positive, metavar="N", help="the longest answer (256)"
    )
    group.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 takes the best token (0)"
    )
    group.add_argument(
        "--top-p", type=float, metavar="P", help="above temperature 0: only the likeliest share"
    )
    group.add_argument(
        "--top-k", type=int, metavar="K", help="above temperature 0: only the K best tokens"
    )
    group.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="above 1 repeats less, also at temperature 0 (1)",
    )
    group.add_argument("--seed", type=int, help="above temperature 0: where chance comes from (0)")


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"wanted a number of 1 or more, got {text}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
