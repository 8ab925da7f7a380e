"""`qwen2audio transcribe`: what is said in clips, as text, JSON or subtitles."""

import argparse
import collections
import pathlib
import sys
import urllib.parse
from collections.abc import Sequence

from qwen2audio_jax import transcribe as transcription
from qwen2audio_jax.commands import session
from qwen2audio_jax.processor import Processor

SUFFIXES = {"text": ".txt", "json": ".json", "srt": ".srt", "vtt": ".vtt"}


def run(options: argparse.Namespace) -> int:
    if options.output_dir is not None:
        files = place(pathlib.Path(options.output_dir), options.clips, SUFFIXES[options.format])
    elif options.format in ("srt", "vtt") and len(options.clips) > 1:
        raise ValueError(
            f"one {options.format} is of one clip, got {len(options.clips)}; --output-dir FOLDER"
            " writes one each"
        )
    else:
        files = [None] * len(options.clips)
    sampling = session.sampling(options)
    processor = Processor.from_pretrained(options.model)
    results = transcription.transcribe(
        session.load(options),
        processor,
        options.clips,
        language=None if options.language == "auto" else options.language,
        prompt=options.prompt,
        chat=options.chat,
        window=options.window,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        sampling=sampling,
        progress=sys.stderr.isatty(),
    )
    failed = False
    for result, file in zip(results, files, strict=True):
        failed |= result.error is not None
        if result.error is not None and (options.format != "json" or file):
            session.error(result.error)
            continue
        if result.cut and options.format != "json":
            session.note_cut(result.audio)
        named = len(files) > 1 and file is None
        written = write(result, options.format, timestamps=options.timestamps, named=named)
        if file is None:
            session.put(written)
            continue
        try:
            # A clip's name, which JSON repeats, may have bytes that are no text.
            file.write_text(written + "\n", "utf-8", errors="backslashreplace")
            session.put(str(file))
        except OSError as error:
            session.error(f"{result.audio}: {file} cannot be written: {error.strerror}")
            failed = True
    return 2 if failed else 0


def place(folder: pathlib.Path, clips: Sequence[str], suffix: str) -> list[pathlib.Path]:
    """The files to write, named after the clips; makes their folder.

    Raises:
      ValueError: two clips would share a file.
    """
    files = []
    for clip in clips:
        path = urllib.parse.urlsplit(clip).path if session.URL.match(clip) else clip
        files.append(folder / f"{pathlib.PurePath(path).stem}{suffix}")
    shared = [str(file) for file, count in collections.Counter(files).items() if count > 1]
    if shared:
        raise ValueError(f"wanted clips with names of their own; several would be {shared[0]}")
    folder.mkdir(parents=True, exist_ok=True)
    return files


def write(result: transcription.Transcript, form: str, *, timestamps: bool, named: bool) -> str:
    if form == "json":
        return _record(result, timestamps)
    if form != "text":
        return transcription.subtitles(result.windows, form).rstrip("\n")
    clock = transcription.clock
    if timestamps:
        lines = [f"[{clock(w.start)} --> {clock(w.end)}] {w.text}" for w in result.windows]
        return "\n".join([f"{result.audio}:", *lines] if named else lines)
    return f"{result.audio}: {result.text}" if named else result.text


def _record(result: transcription.Transcript, timestamps: bool) -> str:
    if result.error is not None:
        return session.record(audio=result.audio, error=result.error)
    windows = [
        {"start": round(w.start, 3), "end": round(w.end, 3), "text": w.text} for w in result.windows
    ]
    return session.record(
        audio=result.audio,
        text=result.text,
        seconds=round(result.seconds, 3),
        windows=windows if timestamps or len(windows) > 1 else None,
        language=result.language,
        cut=result.cut,
    )
