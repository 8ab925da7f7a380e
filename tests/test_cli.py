"""The command line answers, says what is wrong in one line, and never loses a good clip."""

import functools
import io
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import soundfile
import tiny

from qwen2audio_jax import Processor, Qwen2Audio, cli, generate
from qwen2audio_jax.commands import ask, chat, session
from qwen2audio_jax.stream import Pieces

FEW = ("--max-new-tokens", "4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def pair(folder):
    return Qwen2Audio.from_pretrained(folder), Processor.from_pretrained(folder)


@pytest.fixture(scope="module")
def clips(tmp_path_factory, chirp):
    """A folder with clips of half a second, and some that cannot be heard."""
    home = tmp_path_factory.mktemp("clips")
    for seed, name in enumerate(("a.wav", "b.wav", "钟声 二.wav")):
        soundfile.write(home / name, chirp(0.5, seed), 16_000)
    soundfile.write(home / "long.wav", chirp(40.0), 16_000)
    (home / "bad.wav").write_bytes(b"not audio at all")
    return home


@pytest.fixture
def run(folder, pair, clips, monkeypatch, capsys):
    """Runs a command where the clips are, on one model; gives its status and what it printed."""
    monkeypatch.setenv("QWEN2AUDIO_MODEL", str(folder))
    load = functools.wraps(session.load)(lambda options: pair[0])
    monkeypatch.setattr(session, "load", load)
    monkeypatch.chdir(clips)

    def command(*arguments, stdin=""):
        typed = io.StringIO(stdin) if isinstance(stdin, str) else stdin
        monkeypatch.setattr("sys.stdin", typed)
        try:
            status = cli.main(list(arguments))
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return command


@pytest.fixture
def expected(pair):
    """What the library answers to a conversation."""

    def answer(*messages):
        model, processor = pair
        [text] = processor.decode(generate(model, processor(list(messages)), max_new_tokens=4))
        return text

    return answer


def user(*parts):
    kind = lambda part: "audio" if part.endswith(".wav") else "text"
    return {"role": "user", "content": [{"type": kind(p), kind(p): p} for p in parts]}


def test_ask(run, expected):
    """A clip with a question is analysed, without one it is answered."""
    status, out, _ = run("ask", "a.wav", "What is that?", *FEW)
    assert (status, out) == (0, expected(user("a.wav", "What is that?")) + "\n")
    status, out, _ = run("ask", "a.wav", *FEW)
    assert (status, out) == (0, expected(user("a.wav")) + "\n")
    system = {"role": "system", "content": "Be brief."}
    status, out, _ = run("ask", "a.wav", "--system", "Be brief.", *FEW)
    assert (status, out) == (0, expected(system, user("a.wav")) + "\n")


def test_ask_about_several(run, expected):
    """Each clip is answered by itself, by name; together they share one prompt."""
    one, two = (expected(user(clip, "What?")) for clip in ("a.wav", "b.wav"))
    status, out, _ = run("ask", "a.wav", "b.wav", "What?", *FEW)
    assert (status, out) == (0, f"a.wav: {one}\nb.wav: {two}\n")
    status, out, _ = run("ask", "a.wav", "b.wav", "What?", "--together", "--json", *FEW)
    both = expected(user("a.wav", "b.wav", "What?"))
    told = {"audio": ["a.wav", "b.wav"], "text": both, "seconds": 1.0, "cut": True}
    assert json.loads(out) == told


def test_devices_share_the_model(run, folder, monkeypatch):
    """Flags of a mesh, as in training: every command answers as on one device."""
    calls = (
        (("ask", "a.wav", "b.wav", "钟声 二.wav", "Why?"), ""),
        (("ask", "a.wav"), ""),
        (("transcribe", "a.wav", "b.wav"), ""),
        (("chat",), "a.wav\nWhy?\n"),
    )
    flags = ("--mesh.ici-data-parallelism", "4", "--mesh.ici-tensor-parallelism", "2")
    wanted = [run(*arguments, *FEW, stdin=stdin) for arguments, stdin in calls]
    loaded, load = [], session.load.__wrapped__
    monkeypatch.setattr(session, "load", lambda options: loaded.append(load(options)) or loaded[-1])
    for (arguments, stdin), alone in zip(calls, wanted, strict=True):
        assert alone[0] == 0 and run(*arguments, *FEW, *flags, stdin=stdin) == alone
        mesh = loaded[-1].projector.kernel.get_value().sharding.mesh
        assert dict(mesh.shape) == {"data": 4, "fsdp": 1, "tensor": 2, "context": 1}


def test_a_mesh_that_cannot_be_made_is_a_line(run, folder, monkeypatch):
    monkeypatch.setattr(session, "load", session.load.__wrapped__)
    for flag, message in (
        (("tensor", "3"), "{'data': 1, 'fsdp': 2, 'tensor': 3, 'context': 1} needs 6 devices, "),
        (("data", "0"), "wanted ici mesh sizes from 1, or a single -1, got {'data': 0, 'fsdp': -1"),
        (("tensor", "two"), "invalid int value: 'two'"),
    ):
        axis, size = flag
        status, out, err = run("ask", "a.wav", f"--mesh.ici-{axis}-parallelism", size)
        assert (status, out) == (2, "") and err.count("\n") == 1
        assert err.startswith("qwen2audio: error: ") and message in err


def test_bad_among_good(run, expected):
    """Good clips are answered, bad ones named, and the status tells."""
    names = ("bad.wav", "a.wav", "missing.wav", "b.wav")
    good = {clip: expected(user(clip)) for clip in ("a.wav", "b.wav")}
    status, out, err = run("ask", *names, *FEW)
    assert status == 2 and out == "".join(f"{clip}: {text}\n" for clip, text in good.items())
    errors = [line for line in err.splitlines() if "error" in line]
    assert errors[0].startswith("qwen2audio: error: bad.wav: it is not audio")
    assert errors[1:] == ["qwen2audio: error: missing.wav: there is no such file"]
    status, out, _ = run("ask", *names, "--json", "--batch-size", "3", *FEW)
    rows = [json.loads(line) for line in out.splitlines()]
    assert status == 2 and [row["audio"] for row in rows] == list(names)
    assert [row.get("text") for row in rows] == [None, good["a.wav"], None, good["b.wav"]]
    assert [set(row) - {"audio"} for row in rows] == [{"error"}, {"text", "seconds", "cut"}] * 2


def test_all_bad(run):
    """Every clip says why, and there is no answer."""
    for command in ("ask", "transcribe"):
        status, out, err = run(command, "missing.wav", "bad.wav", "--json")
        assert status == 2 and err == ""
        assert ["error" in json.loads(line) for line in out.splitlines()] == [True, True]
    status, out, err = run("transcribe", "missing.wav")
    error = "qwen2audio: error: missing.wav: there is no such file\n"
    assert (status, out, err) == (2, "", error)


def test_names_of_any_script(run):
    """JSON is one object a line, readable as it stands, whatever a clip is called."""
    status, out, _ = run("transcribe", "钟声 二.wav", "a.wav", "--json", *FEW)
    first, second = map(json.loads, out.splitlines())
    assert status == 0 and "钟声 二.wav" in out
    assert (first["audio"], second["audio"]) == ("钟声 二.wav", "a.wav")
    assert first["seconds"] == 0.5 and "windows" not in first


@pytest.mark.parametrize(
    ("argument", "clip"),
    [
        ("a.wav", True),
        ("clip.wav", True),  # misspelt: to be missed, not asked
        ("sounds/clip.MP3", True),
        ("./clip", True),
        ("../my clip", True),
        ("~/clip", True),
        ("/no/such clip", True),
        ("https://example.org/listen?id=3", True),
        ("data:audio/wav;base64,UklGRg==", True),
        (".", True),
        ("What is that sound?", False),
        ("a dog and/or a cat", False),
        ("请用JSON/XML回答。", False),
        ("describe/compare", False),
        ("What is said in bell.wav", False),
        ("https://example.org is a site. Is it named?", False),
        ("data: what is that?", False),
        ("data:audio/wav;base64,UklG\nRg==", True),
        (".wav", False),
        ("man/woman?", False),
        ("Hello.", False),
        ("这是什么声音？", False),
    ],
)
def test_what_is_a_clip(run, argument, clip):
    """What exists or looks like a path or URL is a clip, anything else the question."""
    assert session.is_clip(argument) == clip


def test_a_cut_answer_is_said_to_be(run):
    """Words that the limit may have cost are never missing in silence."""
    for names in (["a.wav"], ["a.wav", "b.wav"]):
        _, _, err = run("ask", *names, *FEW)
        assert [line.split(": ")[1] for line in err.splitlines()] == names
        assert err.count("was cut; --max-new-tokens allows more") == len(names)


def test_questions(run):
    """Exactly one question at most, and never in the place of a clip."""
    assert ask.separate(["Why?", "a.wav"], None) == (["a.wav"], "Why?")
    assert ask.separate(["a.wav"], "what is b.wav") == (["a.wav"], "what is b.wav")
    status, _, err = run("ask", "a.wav", "what", "now")
    assert status == 2 and "wanted one question, in quotes" in err and "'what', 'now'" in err
    status, _, err = run("ask", "What is that?")
    assert status == 2 and err.count("\n") == 1 and "wanted a clip" in err


def test_long_clips(run, clips, chirp):
    """A clip over 30 s is heard in windows, and said to be; one beyond the context is refused."""
    status, out, err = run("ask", "long.wav", "--json", *FEW)
    windows = [{"start": 0.0, "end": 30.0}, {"start": 30.0, "end": 40.0}]
    assert status == 0 and json.loads(out)["windows"] == windows
    assert "qwen2audio: long.wav: 40.00 s are heard as 2 windows of at most 30 s" in err
    soundfile.write(clips / "longer.wav", chirp(90.0), 16_000)
    status, out, err = run("ask", "longer.wav", "a.wav", *FEW)
    assert status == 2 and out.startswith("a.wav: ")
    [error] = [line for line in err.splitlines() if "error" in line]
    said = r"qwen2audio: error: longer.wav: a prompt of (\d+) tokens and 4 new ones "
    tokens = re.fullmatch(said + "do not fit the context of 2048", error)
    assert 2250 < int(tokens[1]) < 2350  # 25 of each second, and the words around them


def test_transcribe_long(run, clips):
    """Windows with their times: as text, JSON, SubRip and WebVTT."""
    status, out, _ = run("transcribe", "long.wav", "--json", *FEW)
    [first, second] = json.loads(out)["windows"]
    assert status == 0 and first["start"] == 0 and second["end"] == 40.0
    assert 20 <= first["end"] == second["start"] <= 30
    _, out, _ = run("transcribe", "long.wav", "--timestamps", *FEW)
    assert out.splitlines()[1].endswith(f" --> 00:00:40.000] {second['text']}")
    _, out, _ = run("transcribe", "long.wav", "--format", "vtt", *FEW)
    assert out.startswith("WEBVTT\n\n1\n00:00:00.000 --> 00:00:2")
    _, out, _ = run("transcribe", "long.wav", "--format", "srt", *FEW)
    assert out.startswith("1\n00:00:00,000 --> 00:00:2") and "\n\n2\n" in out
    status, _, err = run("transcribe", "long.wav", "a.wav", "--format", "srt")
    assert status == 2 and "one srt is of one clip, got 2" in err


def test_transcribe_to_files(run, tmp_path):
    """A file a clip, named after it; two of one name are refused before anything is done."""
    to = ("--output-dir", str(tmp_path / "out"), *FEW)
    status, out, err = run("transcribe", "a.wav", "missing.wav", "b.wav", "--format", "srt", *to)
    written = [str(tmp_path / "out" / name) for name in ("a.srt", "b.srt")]
    assert status == 2 and out.splitlines() == written and "missing.wav: there is no" in err
    _, alone, _ = run("transcribe", "a.wav", "--format", "srt", *FEW)
    assert (tmp_path / "out" / "a.srt").read_text("utf-8") == alone
    status, _, err = run("transcribe", "a.wav", "other/a.wav", *to)
    assert status == 2 and "several would be" in err and "a.txt" in err


def test_a_file_that_cannot_be_written_loses_one_clip(run, clips, tmp_path):
    """Names of any bytes are written to; a name that cannot be one is its clip's error."""
    odd = os.fsdecode(b"\xff.wav")
    shutil.copyfile(clips / "a.wav", clips / odd)
    (tmp_path / "b.json").mkdir()
    to = ("--json", "--output-dir", str(tmp_path), *FEW)
    status, out, err = run("transcribe", odd, "b.wav", "a.wav", *to)
    (clips / odd).unlink()
    assert status == 2 and out.count("\n") == 2
    assert err.startswith("qwen2audio: error: b.wav: ") and err.count("\n") == 1
    assert "b.json cannot be written: Is a directory" in err
    written = [
        (tmp_path / name).read_text("utf-8") for name in (os.fsdecode(b"\xff.json"), "a.json")
    ]
    assert [json.loads(each)["audio"] for each in written] == [odd, "a.wav"]


def test_chat(run, expected):
    """Lines are messages, of sound or text; every answer sees what was said before."""
    first = expected(user("a.wav"))
    reply = {"role": "assistant", "content": first}
    second = expected(user("a.wav"), reply, user("What was that?"))
    lines = "a.wav\nWhat was that?\n"
    assert run("chat", *FEW, stdin=lines)[:2] == (0, f"{first}\n{second}\n")
    third = expected(user("a.wav", "b.wav", "Why?"))
    lines = "hello\n/new\n/audio a.wav\nb.wav Why?\n\n/exit\nnever said\n"
    status, out, _ = run("chat", *FEW, stdin=lines)
    assert (status, out.splitlines()[-1]) == (0, third)
    assert run("chat", "a.wav", *FEW, stdin="\n")[:2] == (0, f"{first}\n")


def test_what_is_a_clip_in_a_chat(clips, monkeypatch):
    """A line of several words is a message, unless it is the path of a file."""
    monkeypatch.chdir(clips)
    for line in ("bell.wav", "钟声 二.wav", "'钟声 二.wav'", "https://example.org/a"):
        assert chat.names_clip(line)
    for line in ("Please listen to bell.wav", "https://example.org/a Why?", "clip", "data: a?"):
        assert not chat.names_clip(line)


def test_chat_survives_mistakes(run, expected):
    """A clip that is missing, or a command that does not exist, leaves the conversation as it
    was."""
    lines = "missing.wav\n/sing\n/audio\n/help\na.wav\n"
    status, out, err = run("chat", *FEW, stdin=lines)
    assert status == 2 and out == f"{chat.HELP}\n{expected(user('a.wav'))}\n"
    errors = [line.split("error: ")[1] for line in err.splitlines() if "error: " in line]
    assert errors == [
        "missing.wav: there is no such file",
        "there is no command /sing; /help lists them",
        "wanted /audio PATH, got no path",
    ]
    assert err.splitlines()[-1].startswith("qwen2audio: chat: the answer is as long as it may be")


def test_chat_about_a_long_clip(run):
    """A long clip is said to be heard in windows, once; one that is gone later was heard."""
    status, out, err = run("chat", *FEW, stdin="long.wav What is it?\nWhy?\n")
    assert status == 0 and len(out.splitlines()) >= 2
    assert err.count("long.wav: 40.00 s are heard as windows of at most 30 s") == 1


def test_ctrl_c_stops_an_answer(run, expected, monkeypatch):
    """At a terminal the program goes on; the part that was said counts as the answer."""

    class Terminal(io.StringIO):
        isatty = lambda self: True

    spoken = chat.Conversation.stream

    def stream(self, messages, **options):
        if len(messages) > 1:
            return spoken(self, messages, **options)

        def interrupted(tokens):
            yield "Half an"
            raise KeyboardInterrupt

        return Pieces(interrupted, ends=(), limit=4)

    monkeypatch.setattr(chat.Conversation, "stream", stream)
    status, out, err = run("chat", *FEW, stdin=Terminal("hello\nWhy?\n"))
    said = {"role": "assistant", "content": "Half an"}
    answer = expected(user("hello"), said, user("Why?"))
    assert status == 0 and out == f"> Half an\n> {answer}\n> "
    assert "/help says more" in err


def test_help_teaches(run):
    """Every help shows what to type."""
    status, out, _ = run("--help")
    assert status == 0 and "qwen2audio transcribe talk.mp3" in out
    for command in ("ask", "transcribe", "chat"):
        status, out, _ = run(command, "--help")
        assert status == 0 and out.count(f"qwen2audio {command}") > 2 and "--model" in out
        assert "--mesh.ici-tensor-parallelism N" in out
    assert run("--version")[1].startswith("qwen2audio 0.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["sing"], "invalid choice: 'sing'"),
        (["transcribe"], "required: CLIP"),
        (["ask", "a.wav", "--batch-size", "0"], "wanted a number of 1 or more, got 0"),
        (["ask", "a.wav", "--top-p", "0.5", "--seed", "1"], "--top-p, --seed does nothing at"),
        (["chat", "--top-k", "5"], "--top-k does nothing at temperature 0: wanted --temp"),
        (["transcribe", "a.wav", "--seed", "0"], "--seed does nothing"),
        (
            ["ask", "a.wav", "--temperature", "1", "--top-p", "2"],
            "top_p must be above 0 and at most 1, got 2.0",
        ),
        (["ask", "a.wav", "--model", "nowhere"], "got 'nowhere'"),
        (["transcribe", "a.wav", "--language", "xx"], "(en), got 'xx'"),
        (["transcribe", "a.wav", "--max-new-tokens", "5000"], "5000 new ones do not fit"),
    ],
)
def test_mistakes_take_one_line(run, arguments, message):
    """No usage, no stack trace: one line, and status 2."""
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("qwen2audio: error: ") and err.count("\n") == 1 and message in err


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory.\nMore: ...")]
)
def test_out_of_memory(run, monkeypatch, error):
    """One line says what takes less."""

    def full(*arguments, **settings):
        raise error

    monkeypatch.setattr(ask, "stream", full)
    status, _, err = run("ask", "a.wav")
    assert status == 2 and err.startswith("qwen2audio: error: ") and err.count("\n") == 1
    assert "memory" in err and "--batch-size" in err


def test_other_faults_keep_their_trace(run, monkeypatch):
    """What is no user's mistake is not made to look like one."""
    monkeypatch.setattr(ask, "run", lambda options: {}["absent"])
    with pytest.raises(KeyError):
        run("ask", "a.wav")


def test_without_a_terminal(run, monkeypatch):
    """A notebook's streams, and closed ones, do no harm."""
    monkeypatch.setattr("sys.stderr", None)
    assert run("ask", "missing.wav")[0] == 2
    sys.stderr.close()
    monkeypatch.setattr("sys.stderr", io.StringIO())
    assert run("ask", "missing.wav")[0] == 2


def test_not_installed(run, monkeypatch):
    """A checkout on the path has no version, and works."""

    def absent(name):
        raise cli.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(cli.importlib.metadata, "version", absent)
    assert run("--version")[:2] == (0, "qwen2audio (not installed)\n")


def test_interrupted_early(run, monkeypatch):
    """Ctrl-C before a command has begun leaves no trace either."""

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "build_parser", interrupted)
    assert run("ask", "a.wav") == (130, "", "\n")


def test_interrupted(run, monkeypatch):
    """Ctrl-C ends a command without a trace."""

    def interrupted(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(ask, "stream", interrupted)
    status, out, err = run("ask", "a.wav")
    assert (status, out, err) == (130, "", "\n")


def test_as_a_program(folder, clips, tmp_path):
    """A process of its own: the second run compiles nothing, and a closed pipe is no error."""
    command = [sys.executable, "-m", "qwen2audio_jax.cli", "ask", "a.wav", "b.wav", "--json", *FEW]
    environment = {**os.environ, "QWEN2AUDIO_CACHE": str(tmp_path), "QWEN2AUDIO_MODEL": str(folder)}
    settings = {"cwd": clips, "env": environment, "stderr": subprocess.PIPE, "text": True}
    first = subprocess.run(command, stdout=subprocess.PIPE, **settings)
    assert (first.returncode, first.stderr) == (0, "")
    assert [json.loads(line)["audio"] for line in first.stdout.splitlines()] == ["a.wav", "b.wav"]
    kept = set(tmp_path.iterdir())
    assert kept
    with subprocess.Popen(command, stdout=subprocess.PIPE, **settings) as second:
        second.stdout.close()
        assert second.stderr.read() == ""
    assert second.returncode == 141 and set(tmp_path.iterdir()) == kept
