"""`qwen2audio chat`: a conversation, a line a message."""

import argparse
import contextlib
import os
import sys
import warnings

from qwen2audio_jax import audio
from qwen2audio_jax.commands import session
from qwen2audio_jax.conversation import Conversation
from qwen2audio_jax.model import Qwen2Audio
from qwen2audio_jax.processor import WINDOW, LongAudioWarning, Processor

HELP = """\
PATH or URL       a spoken message
PATH or URL TEXT  a question about a clip
/audio PATH       a clip for the next message; several for several (an empty line sends them)
/new              forget what was said
/exit             end; so does Ctrl-D. Ctrl-C stops an answer"""


class Chat:
    """What was said so far, and the clips that wait for a message."""

    def __init__(self, model: Qwen2Audio, processor: Processor, options: argparse.Namespace):
        self.conversation = Conversation(model, processor)
        self.longest = options.max_new_tokens
        self.sampling = session.sampling(options)
        system = options.system
        self.first = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self.first)
        self.clips = [load(clip) for clip in options.clips]

    def take(self, line: str) -> bool:
        """Does what a line says; whether the conversation goes on.

        Raises:
          ValueError: the line says nothing that can be done; the conversation stays as it was.
        """
        command, _, rest = line.partition(" ")
        if command in ("/exit", "/quit"):
            return False
        if command == "/help":
            print(HELP)
        elif command == "/new":
            self.messages, self.clips = list(self.first), []
            self.conversation.forget()
        elif command == "/audio":
            if not rest.strip():
                raise ValueError("wanted /audio PATH, got no path")
            self.clips.append(load(_unquote(rest)))
        elif names_clip(line):
            self.send([load(_unquote(line))], "")
        elif names_clip(command):
            self.send([load(_unquote(command))], rest.strip())
        elif command.startswith("/"):
            raise ValueError(f"there is no command {command}; /help lists them")
        elif line or self.clips:
            self.send([], line)
        return True

    def send(self, clips: list[tuple], text: str) -> None:
        """Prints the answer to a message while it is made; one that Ctrl-C stops counts too."""
        parts = [{"type": "audio", "audio": clip} for clip in self.clips + clips]
        parts += [{"type": "text", "text": text}] if text else []
        messages = [*self.messages, {"role": "user", "content": parts}]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LongAudioWarning)  # said once, by load
            pieces = self.conversation.stream(
                messages, max_new_tokens=self.longest, sampling=self.sampling
            )
        answer, stopped = "", False
        try:
            for piece in pieces:
                print(piece, end="", flush=True)
                answer += piece
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            stopped = True
        print()
        self.clips = []
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        if not stopped and pieces.cut:
            session.note_cut("chat")


def run(options: argparse.Namespace) -> int:
    session.sampling(options)  # a mistake in it is said before a model is loaded
    chat = Chat(session.load(options), Processor.from_pretrained(options.model), options)
    interactive, failed, more = sys.stdin.isatty(), False, True
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives input() its history and arrow keys
        session.note("write a message, or name a clip; /help says more")
    while more:
        try:
            more = chat.take(input("> " if interactive else "").strip())
        except EOFError:
            break
        except KeyboardInterrupt:
            if not interactive:
                raise
            print()
        except ValueError as error:
            session.error(str(error))
            failed = True
    return 2 if failed and not interactive else 0


def load(clip: str) -> tuple:
    """Loads a clip once, for all turns; says if it is long."""
    wave = audio.load(clip)
    if len(wave) > WINDOW:
        seconds = len(wave) / audio.SAMPLE_RATE
        session.note(f"{clip}: {seconds:.2f} s are heard as windows of at most 30 s")
    return wave, audio.SAMPLE_RATE


def names_clip(text: str) -> bool:
    """Whether a message, or its first word, is a clip: more strictly than on a command line."""
    path = _unquote(text)
    like = "/" in path or session.SOUND.search(path)
    return bool(like and os.path.isfile(os.path.expanduser(path))) or session.names_sound(path)


def _unquote(path: str) -> str:
    """What a terminal writes when a file is dropped on it -> the file's path."""
    path = path.strip()
    if len(path) > 1 and path[0] == path[-1] and path[0] in "'\"":
        return path[1:-1]
    return path.replace("\\ ", " ")
