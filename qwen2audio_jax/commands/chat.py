"""`qwen2audio chat`: a conversation, a line a message."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence

from qwen2audio_jax.commands import session
from qwen2audio_jax.processor import Processor
from qwen2audio_jax.stream import stream

HELP = """\
PATH or URL       a spoken message
PATH or URL TEXT  a question about a clip
/audio PATH       a clip for the next message; several for several (an empty line sends them)
/new              forget what was said
/exit             end; so does Ctrl-D. Ctrl-C stops an answer"""


class Chat:
    """What was said so far, and the clips that wait for a message.

    Args:
      reply: gives the answer to messages, piece by piece.
    """

    def __init__(
        self, reply: Callable[[list[dict]], Iterator[str]], system: str | None, clips: Sequence[str]
    ):
        self.reply = reply
        self.first = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self.first)
        self.clips = list(clips)

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
        elif command == "/audio":
            if not rest.strip():
                raise ValueError("wanted /audio PATH, got no path")
            self.clips.append(_unquote(rest))
        elif names_clip(line):
            self.send([_unquote(line)], "")
        elif names_clip(command):
            self.send([_unquote(command)], rest.strip())
        elif command.startswith("/"):
            raise ValueError(f"there is no command {command}; /help lists them")
        elif line or self.clips:
            self.send([], line)
        return True

    def send(self, clips: list[str], text: str) -> None:
        """Prints the answer to a message while it is made; an answer that is stopped counts."""
        parts = [{"type": "audio", "audio": clip} for clip in self.clips + clips]
        parts += [{"type": "text", "text": text}] if text else []
        # A clip that cannot be heard is not asked for again.
        self.clips = []
        messages = [*self.messages, {"role": "user", "content": parts}]
        answer = ""
        pieces = self.reply(messages)
        try:
            for piece in pieces:
                print(piece, end="", flush=True)
                answer += piece
        finally:
            if sys.exc_info()[0] in (None, KeyboardInterrupt):
                self.messages = [*messages, {"role": "assistant", "content": answer}]
                print()


def run(options: argparse.Namespace) -> int:
    limits = {"max_new_tokens": options.max_new_tokens, "sampling": session.sampling(options)}
    processor = Processor.from_pretrained(options.model)
    model = session.load(options)

    def reply(messages: list[dict]) -> Iterator[str]:
        with session.noting():
            inputs = processor(messages)
        return stream(model, processor, inputs, **limits)

    chat = Chat(reply, options.system, options.clips)
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


def names_clip(text: str) -> bool:
    """Whether a message, or its first word, is a clip: more strictly than on a command line."""
    path = _unquote(text)
    there = "/" in path and os.path.isfile(os.path.expanduser(path))
    return there or bool(session.URL.match(path) or session.SOUND.search(path))


def _unquote(path: str) -> str:
    """What a terminal writes when a file is dropped on it -> the file's path."""
    path = path.strip()
    if len(path) > 1 and path[0] == path[-1] and path[0] in "'\"":
        return path[1:-1]
    return path.replace("\\ ", " ")
