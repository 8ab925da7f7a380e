"""Sources give the rows that were written, by position, wherever they lie."""

import concurrent.futures
import dataclasses
import functools
import http.server
import json
import mmap
import os
import pathlib
import pickle
import shutil
import signal
import sys
import threading

import fsspec
import numpy as np
import prepared
import pytest
import soundfile
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry as known

from qwen2audio_jax import audio, patience
from qwen2audio_jax.data import sources, storage
from qwen2audio_jax.data.example import BadSample, hear
from qwen2audio_jax.data.sources import Manifest, as_record, embed, open_source, where, write
from qwen2audio_jax.prompt import parse

CLIP = {"type": "audio", "audio": "a.wav"}


@pytest.fixture
def manifest(tmp_path, chirp) -> pathlib.Path:
    folder = tmp_path / "set"
    folder.mkdir()
    soundfile.write(folder / "a.wav", chirp(0.2), 16_000)
    rows = [
        json.dumps({"audio": "a.wav", "text": "one\u2028two", "split": "test"}, ensure_ascii=False),
        "",
        json.dumps({"audio": "https://example.org/b.wav", "text": "b", "split": "train"}),
        json.dumps({"messages": [{"role": "user", "content": [CLIP, {"text": "sub/what?"}]}]}),
        '{"audio": ',
        "[1]",
    ]
    (folder / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder / "rows.jsonl"


def test_a_manifest_s_clips_start_at_its_folder(manifest):
    """Relative paths are made whole, in fields and in conversations; nothing else changes."""
    source = pickle.loads(pickle.dumps(open_source(manifest)))
    assert len(source) == 5
    whole = str(manifest.parent / "a.wav")
    assert source[0] == {"audio": whole, "text": "one\u2028two", "split": "test"}
    assert source[1]["audio"] == "https://example.org/b.wav"
    clip, text = source[2]["messages"][0]["content"]
    assert clip == {"type": "audio", "audio": whole} and text == {"text": "sub/what?"}
    assert len(hear(source[0]["audio"])) == 3200


@pytest.mark.parametrize(
    "part",
    [
        {"type": "audio_url", "audio_url": {"url": "a.wav"}},
        {"type": "audio_url", "audio_url": "a.wav"},
        {"type": "input_audio", "input_audio": {"url": "a.wav"}},
        {"type": "audio", "audio": {"path": "a.wav", "bytes": None}},
        {"type": "audio", "path": "a.wav"},
    ],
    ids=lambda part: json.dumps(part),
)
def test_however_a_conversation_names_its_clip_it_is_found(manifest, part, monkeypatch):
    """Behind the manifest's folder, and its file in a shard's record; heard either way."""
    path = manifest.parent / "others.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": [part]}]}))
    row = open_source(path)[0]
    monkeypatch.chdir("/")
    for each in (row, embed(row)):
        [clip] = parse(each["messages"])[0]["content"]
        assert len(hear(clip["audio"])) == 3200
    assert clip["audio"] == (manifest.parent / "a.wav").read_bytes()


def test_a_clip_s_name_may_hold_the_time(manifest):
    """A colon makes no URL, unless a slash is behind it; then no folder goes in front."""
    name, folder = "rec-2024-01-01T12:30:05.wav", manifest.parent
    shutil.copy(folder / "a.wav", folder / name)
    urls = [f"file:{folder}/a.wav", f"file://{folder}/a.wav", "https://example.org/b.wav"]
    urls += ["data:audio/wav;base64,AAAA", "/a.wav", "~/a.wav"]
    path = folder / "others.jsonl"
    path.write_text("\n".join(json.dumps({"audio": clip, "text": ""}) for clip in (name, *urls)))
    source = Manifest(path)
    assert [row["audio"] for row in source] == [str(folder / name), *urls]
    assert all(len(hear(source[i]["audio"])) == 3200 for i in range(3))
    shutil.copy(folder / "a.wav", folder / "a b.wav")
    for url in (*urls[:2], (folder / "a b.wav").as_uri()):
        assert embed({"audio": url})["audio"] == (folder / "a.wav").read_bytes()


def test_clips_beside_a_conversation_are_found(manifest, monkeypatch):
    """However each is named; a row without a conversation has none that are anybody's."""
    told = [{"role": "user", "content": "<audio>, <audio>?"}]
    clips = ["a.wav", {"path": "a.wav", "bytes": None}]
    path = manifest.parent / "others.jsonl"
    rows = [{"messages": told, "audios": clips}, {"text": "a", "audios": clips}]
    path.write_text("\n".join(map(json.dumps, rows)))
    source = open_source(path)
    monkeypatch.chdir("/")
    for row in (source[0], embed(source[0])):
        assert row["messages"] == told
        assert [len(hear(clip)) for clip in row["audios"]] == [3200, 3200]
    assert row["audios"] == [(manifest.parent / "a.wav").read_bytes()] * 2
    assert embed(source[1]) == rows[1]


def test_a_byte_order_mark_is_no_row(manifest):
    """As Windows' editors begin a file with; a file may be nothing else."""
    manifest.write_bytes(b"\xef\xbb\xbf" + manifest.read_bytes())
    source = open_source(manifest)
    assert source[0]["split"] == "test" and (source.line(0), source.line(1)) == (1, 3)
    manifest.write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(ValueError, match=r"rows.jsonl: no rows"):
        open_source(manifest)


def test_a_row_is_called_by_its_line(manifest):
    """Blank lines and other splits count; where there are no lines, by its number."""
    source = open_source(f"{manifest}:train")
    assert [where(source, row) for row in range(3)] == [
        f"line {line} of rows.jsonl" for line in (3, 5, 6)
    ]
    assert where([{}, {}], 1) == "row 1"


def test_a_split_is_found_without_its_clips(tmp_path, monkeypatch):
    """Of a million rows, only the first are looked at closely at every start."""
    rows = [{"audio": f"{i}.wav", "split": "ab"[i % 2]} for i in range(200)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    looked, change = [], sources.each_clip
    monkeypatch.setattr(sources, "each_clip", lambda *a: looked.append(a) or change(*a))
    source = open_source(f"{tmp_path}/rows.jsonl:b")
    assert len(source) == 100 and len(looked) <= 3 * sources.FEW
    assert source[1]["audio"] == str(tmp_path / "3.wav")


def test_a_split_may_be_a_number(tmp_path):
    """As a fold is; what is named on the command line is a text."""
    rows = [{"text": f"{i}", "split": i % 2} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [row["text"] for row in open_source(f"{tmp_path}/rows.jsonl:1")] == ["1", "3"]
    with pytest.raises(ValueError, match="no rows with split '2'; splits in it: 0, 1"):
        open_source(f"{tmp_path}/rows.jsonl:2")


def test_a_broken_row_is_a_bad_sample_with_its_line(manifest):
    """It is met when asked for, so that it can be counted; nobody can tell of which split it is."""
    source = open_source(manifest)
    for index, message in ((3, "line 5: Expecting value"), (4, "line 6: wanted an object")):
        with pytest.raises(BadSample, match=message) as error:
            source[index]
        assert error.value.reason == "bad row" and str(manifest) in str(error.value)
    train = open_source(f"{manifest}:train")
    assert len(train) == 3 and train[0]["text"] == "b" and train.line(1) == 5


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The folder that s3://bucket is."""

    class Bucket(LocalFileSystem):
        protocol = "s3"

        @classmethod
        def _strip_protocol(cls, path):
            return str(path).replace("s3://bucket", str(tmp_path))

    monkeypatch.setitem(known, "s3", Bucket)
    storage.copied.cache_clear()  # of another test's
    return tmp_path


def test_storage_elsewhere(manifest, bucket):
    """A manifest on s3:// and its clips are reached through fsspec; pickles carry no data."""
    source = pickle.loads(pickle.dumps(Manifest("s3://bucket/set/rows.jsonl")))
    assert source[0]["audio"] == "s3://bucket/set/a.wav"
    wave, file = audio.load(manifest.parent / "a.wav"), (manifest.parent / "a.wav").read_bytes()
    np.testing.assert_array_equal(hear(source[0]["audio"]), wave)
    assert embed(source[0])["audio"] == file
    # what epath does not know
    shelf = fsspec.filesystem("memory")
    shelf.pipe({"/set/rows.jsonl": b'{"audio": "sub/../a.wav"}', "/set/a.wav": file})
    np.testing.assert_array_equal(hear(open_source("memory://set/rows.jsonl")[0]["audio"]), wave)


def test_a_manifest_on_a_web_server(manifest, monkeypatch):
    """With its clips beside it; one that is cut short, or is not there, is told."""
    content = manifest.read_bytes()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            if self.path != "/set/cut.jsonl":
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content) + 9))
            self.end_headers()
            self.wfile.write(content)

    handler = functools.partial(Quiet, directory=manifest.parent.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/set"
        source = open_source(f"{url}/rows.jsonl:test")
        assert len(source) == 3 and source[0]["audio"] == f"{url}/a.wav"
        assert len(hear(source[0]["audio"])) == 3200
        names = ["中文.wav", "a b.wav", "take#2.wav", "what?x=1.wav", "%61.wav", "a+b:&.wav"]
        for name in names:
            shutil.copy(manifest.parent / "a.wav", manifest.parent / name)
        lines = [json.dumps({"audio": f"sub/../{name}"}) for name in names]
        (manifest.parent / "names.jsonl").write_text("\n".join(lines))
        (manifest.parent / "a.wav").unlink()  # which %61.wav is not
        assert [len(hear(row["audio"])) for row in Manifest(f"{url}/names.jsonl")] == [3200] * 6
        with pytest.raises(FileNotFoundError, match=f"^no manifest at {url}/absent.jsonl$"):
            open_source(f"{url}/absent.jsonl")
        with pytest.raises(OSError, match=r"cut.jsonl: the server promised 9 bytes more than it"):
            open_source(f"{url}/cut.jsonl")
        server.shutdown()


def test_what_storage_says_is_one_line(tmp_path, monkeypatch):
    """Whatever its package calls it; what it says of a clip is that sample's fault."""

    class Refused(Exception):
        """As httpx and gcsfs have their own."""

    class Down(LocalFileSystem):
        protocol = "s3"

        def _open(self, path, *_, **__):
            raise Refused("no\nroute")

    monkeypatch.setitem(known, "s3", Down)
    monkeypatch.setattr(patience, "PAUSES", (0.0,))
    with pytest.raises(OSError, match=r"^s3://bucket/rows.jsonl: Refused: no route$"):
        open_source("s3://bucket/rows.jsonl")
    with pytest.raises(BadSample, match=r"^missing audio: s3://bucket/a.wav: Refused: no route$"):
        hear("s3://bucket/a.wav")


class Answered(Exception):
    """As a storage's own package has them."""

    def __init__(self, code):
        super().__init__(f"status {code}")
        self.code = code


@pytest.mark.parametrize(
    ("failures", "asked"),
    [([Answered(503), OSError("reset")], 3), ([Answered(503)] * 3, 3), ([Answered(403)], 1)],
)
def test_storage_that_fails_for_a_while_is_asked_again(
    manifest, bucket, monkeypatch, failures, asked
):
    """Two times more, for a clip and for a manifest; one that refuses is not."""
    heard, opens, open_ = hear(manifest.parent / "a.wav"), [], LocalFileSystem._open

    def shaky(files, path, *how, **more):
        opens.append(path)
        if len(opens) <= len(failures):
            raise failures[len(opens) - 1]
        return open_(files, path, *how, **more)

    monkeypatch.setattr(patience, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(LocalFileSystem, "_open", shaky)
    if asked > len(failures):
        np.testing.assert_array_equal(hear("s3://bucket/set/a.wav"), heard)
        opens.clear()
        assert len(Manifest("s3://bucket/set/rows.jsonl")) == len(Manifest(str(manifest)))
    else:
        with pytest.raises(BadSample, match=r"^missing audio: s3://bucket/set/a.wav: .*status"):
            hear("s3://bucket/set/a.wav")
    assert len(opens) == asked


def test_storage_that_nobody_knows_is_told_with_its_line(tmp_path):
    """Of a whole manifest at once; of one row when that is asked for."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"audio": "weird://a.wav"}')
    wanted = r"wanted a path, or a URL that fsspec knows \(.*\), got weird://"
    with pytest.raises(ValueError, match=f"rows.jsonl, line 1: {wanted}a.wav"):
        open_source(path)
    with pytest.raises(ValueError, match=f"^{wanted}rows.jsonl"):
        open_source("weird://rows.jsonl")
    path.write_text('{"audio": "weird://a.wav"}\n{"audio": "b.wav"}')
    with pytest.raises(BadSample, match=f"^missing audio: {wanted}a.wav"):
        hear(open_source(path)[0]["audio"])


def test_a_manifest_elsewhere_is_fetched_once(manifest, bucket, monkeypatch):
    """To a file that workers map, too, and that goes with the process that made it."""
    ending = []
    keep = lambda call, *args, **settings: ending.append(lambda: call(*args, **settings))
    monkeypatch.setattr(storage.atexit, "register", keep)
    monkeypatch.setattr(storage.tempfile, "tempdir", str(bucket))
    before = set(bucket.iterdir())
    source = Manifest("s3://bucket/set/rows.jsonl")
    (copy,) = set(bucket.iterdir()) - before
    assert copy.read_bytes() == manifest.read_bytes()
    manifest.unlink()
    assert len(Manifest("s3://bucket/set/rows.jsonl", split="train")) == 3
    for each in (source, pickle.loads(pickle.dumps(source))):
        assert each[0]["text"] == "one\u2028two" and isinstance(each._data, mmap.mmap)
    (end,) = ending
    end()
    assert set(bucket.iterdir()) == before


def test_copies_of_who_was_killed_are_removed(manifest, bucket, monkeypatch):
    """By the next to make one; those of who lives stay, and what may be about to be locked."""
    left, empty = (bucket / f"{storage.COPY}{name}" for name in ("left", "empty"))
    left.write_text("{}"), empty.touch()
    monkeypatch.setattr(storage.tempfile, "tempdir", str(bucket))
    copy = pathlib.Path(storage.copied("s3://bucket/set/rows.jsonl"))
    shutil.copy(manifest, manifest.parent / "other.jsonl")
    storage.copied("s3://bucket/set/other.jsonl")
    assert copy.exists() and empty.exists() and not left.exists()


@pytest.fixture
def no_storage(monkeypatch):
    """As where neither gcsfs nor s3fs is installed."""
    for package in ("gcsfs", "s3fs"):
        monkeypatch.setitem(sys.modules, package, None)
    for scheme in ("gs", "s3"):
        monkeypatch.delitem(known, scheme, raising=False)


def test_storage_that_nothing_reaches_is_told_at_once(no_storage, tmp_path):
    """With the package to install; it is the fault of no sample, or of all."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"speech": "gs://bucket/a.wav"}')
    with pytest.raises(ImportError, match=r"^gs://bucket/a.wav: .* gcsfs .*\[gcs\].*, line 1\)$"):
        open_source(path, audio=("speech",))
    for spec in ("s3://bucket/rows.jsonl", "s3://bucket/shards"):
        with pytest.raises(ImportError, match=rf"^{spec}: .*s3fs .*qwen2audio_jax\[s3\]"):
            open_source(spec)
    with pytest.raises(ImportError, match="gcsfs"):
        hear("gs://bucket/a.wav")


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("nothing.jsonl", FileNotFoundError, "no manifest at nothing.jsonl"),
        (
            "rows.csv",
            ValueError,
            r"wanted a .jsonl manifest, .array_record shards or tfds:.*rows.csv",
        ),
        ("no-*.array_record", FileNotFoundError, r"no .array_record shards at no-\*"),
        ("tfds:fleurs", ValueError, "wanted tfds:name/config:split, got tfds:fleurs"),
        ("https://a.b/shards", ValueError, r"wanted shards on a disk .*, got https://a.b/shards"),
    ],
)
def test_what_is_not_there_is_refused(spec, error, message):
    """In one line that names it."""
    if "array_record" in spec:
        pytest.importorskip("grain")
    with pytest.raises(error, match=message):
        open_source(spec)


def test_a_manifest_without_rows_of_the_split(manifest):
    with pytest.raises(ValueError, match=r"'dev'; splits in it: test, train$"):
        open_source(f"{manifest}:dev")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("audio,text\na.wav,one\n", r"bad row: .*rows.jsonl, line 1: Expecting value"),
        ('[{"audio": "a.wav"}]', r"rows.jsonl: wanted an object a line, got one array of all"),
        ('[\n  {\n    "audio": "a.wav"\n  }\n]', r"wanted an object a line, got one array of all"),
        ('{\n  "audio": "a.wav"\n}', r"bad row: .*, line 1: Expecting property name"),
        ("\n \n", r"rows.jsonl: no rows"),
        ('{"a":' * 100_000, r"bad row: .*, line 1: maximum recursion depth"),
        ('{"audio": "a.wav"}'.encode("utf-16"), r"rows.jsonl: wanted UTF-8, got UTF-16"),
        (b"RIFF\x80\n" * 20, r"bad row: .*, line 1: 'utf-8' codec can't decode"),
    ],
)
def test_what_is_no_manifest_is_refused(tmp_path, content, message):
    """With its first line; it is not a night's worth of bad samples."""
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        open_source(tmp_path / "rows.jsonl")
    assert not isinstance(error.value, BadSample)


def test_the_real_digits(shared_data):
    """Takes 0-4 of six speakers and ten digits are the test split; every file is there."""
    path = shared_data / "fsdd" / "manifest.jsonl"
    test, train = (open_source(f"{path}:{split}") for split in ("test", "train"))
    assert (len(test), len(train)) == (300, 2100)
    rows = [test[i] for i in range(len(test))]
    assert all(os.path.isfile(row["audio"]) for row in rows)
    assert len({row["text"] for row in rows}) == 10 and len({row["speaker"] for row in rows}) == 6


def test_shards_give_what_was_written(tmp_path):
    """Rows with bytes in them, over two shards, by folder and by pattern; a pickle reopens them."""
    pytest.importorskip("grain")
    rows = [
        {"audio": bytes([i] * 5), "text": f"{i}é", "n": i, "list": [{"a": None}]} for i in range(7)
    ]
    assert write(tmp_path / "x-0.array_record", map(as_record, rows[:4])) == 4
    assert write(tmp_path / "x-1.array_record", map(as_record, rows[4:])) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "x-0.array_record",
        "x-1.array_record",
    ]
    source = pickle.loads(pickle.dumps(open_source(tmp_path)))
    assert [source[i] for i in range(len(source))] == rows
    assert len(open_source(f"{tmp_path}/x-1*.array_record")) == 3


def test_a_shard_is_on_the_disk_before_it_is_called_one(tmp_path, monkeypatch):
    """With its name; whoever notes that it is there is right, though the machine should fail."""
    pytest.importorskip("grain")
    done, sync, replace = [], os.fsync, os.replace
    name = lambda handle: os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))
    monkeypatch.setattr(sources.os, "fsync", lambda file: (done.append(name(file)), sync(file)))
    monkeypatch.setattr(sources.os, "replace", lambda *a: (done.append("replace"), replace(*a)))
    write(tmp_path / "x.array_record", [as_record({"n": 0})])
    assert done == ["x.array_record.unfinished", "replace", tmp_path.name]


def test_a_clip_elsewhere_is_fetched_once(manifest, bucket, monkeypatch):
    """To be heard, and to be written; messages have its name."""
    opened, open_ = [], LocalFileSystem._open
    counted = lambda *a, **k: opened.append(a) or open_(*a, **k)
    monkeypatch.setattr(LocalFileSystem, "_open", counted)
    file = (manifest.parent / "a.wav").read_bytes()
    assert embed({"audio": "s3://bucket/set/a.wav"})["audio"] == file and len(opened) == 1
    (manifest.parent / "a.wav").write_bytes(b"no sound")
    with pytest.raises(BadSample, match=r"^corrupt audio: s3://bucket/set/a.wav: "):
        embed({"audio": "s3://bucket/set/a.wav"})


def test_a_folder_of_shards_is_whole(tmp_path):
    """What is still written is no shard; some of them may be named on purpose."""
    pytest.importorskip("grain")
    for i in (0, 2, 3):
        write(tmp_path / f"x-{i:05}-of-00004.array_record", [as_record({"n": i})])
    write(tmp_path / "other.array_record", [as_record({"n": 9})])
    (tmp_path / "x-00001-of-00004.array_record.unfinished").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"wanted all 4 shards .*x-\*-of-00004.array_.*, got 3"):
        open_source(tmp_path)
    assert len(open_source(f"{tmp_path}/x-*.array_record*")) == 3
    write(tmp_path / "x-00001-of-00004.array_record", [as_record({"n": 1})])
    assert len(open_source(tmp_path)) == 5


def test_shards_elsewhere_are_refused(bucket):
    """In one line: ArrayRecord reads from disks alone."""
    pytest.importorskip("grain")
    write(bucket / "x-0.array_record", [as_record({"n": 0})])
    for spec in ("s3://bucket", "s3://bucket/x-*.array_record"):
        with pytest.raises(
            ValueError, match=r"^wanted shards on a disk \(mount .*, got s3://bucket"
        ):
            open_source(spec)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"rows": 0}, "wanted --rows of at least 1, got 0"),
        ({"workers": -1}, "wanted --workers of at least 0, got -1"),
        ({"out": pathlib.Path("gs://bucket/set")}, "on a disk to write to, got gs://bucket/set$"),
        ({"manifest": "absent.jsonl"}, "no manifest at absent.jsonl"),
    ],
)
def test_shards_that_cannot_be_written_leave_nothing(manifest, monkeypatch, how, message):
    pytest.importorskip("grain")
    from train import shard

    monkeypatch.chdir(manifest.parent)
    settings = shard.Settings(manifest=str(manifest), out=pathlib.Path("out"), workers=0)
    with pytest.raises((ValueError, OSError), match=message):
        shard.main(dataclasses.replace(settings, **how))
    assert {path.name for path in manifest.parent.iterdir()} == {"a.wav", "rows.jsonl"}


@pytest.mark.parametrize("field", ["speech", "audio", "a"])
def test_a_field_that_no_row_has_names_no_clip(manifest, monkeypatch, field, capsys):
    """As a typing mistake does not; text alone, and a row that lacks a clip, are told."""
    pytest.importorskip("grain")
    from train import shard

    path = manifest.parent / "others.jsonl"
    monkeypatch.chdir(manifest.parent)
    rows = [{"text": "a", "prompt": "What?"}, {field: "a.wav", "text": "b"}, {field: None}]
    path.write_text("\n".join(map(json.dumps, rows)))

    def run(audio):
        shard.main(shard.Settings(manifest=str(path), out=out, workers=0, audio=audio))
        return capsys.readouterr().out.splitlines()[1:]

    out = pathlib.Path("out")
    with pytest.raises(ValueError) as error:
        run(("audo", field))
    wanted = f"--audio of its fields (text, prompt, {field}; nothing behind it: no clips)"
    assert str(error.value) == f"{path}: wanted {wanted}, got audo" and not out.exists()
    assert run((field,)) == ["2 of them without a clip"]
    assert open_source(out)[1][field] == (manifest.parent / "a.wav").read_bytes()
    out = pathlib.Path("text")
    assert run(()) == ["3 of them without a clip"]


def test_conversations_need_no_field_that_names_clips(manifest, monkeypatch, capsys):
    pytest.importorskip("grain")
    from train import shard

    manifest.write_text(manifest.read_text().split("\n")[3])
    monkeypatch.chdir(manifest.parent)
    shard.main(shard.Settings(manifest=str(manifest), out=pathlib.Path("out"), workers=0))
    assert capsys.readouterr().out == "1 rows in 1 shards in out\n"


@pytest.fixture
def many(tmp_path, chirp) -> pathlib.Path:
    """A manifest of thirteen rows, four of them bad: two of them no record can hold."""
    for i in range(9):
        soundfile.write(tmp_path / f"{i}.wav", chirp(0.1, i), 16_000)
    rows = [{"audio": f"{i}.wav", "text": str(i)} for i in range(9)]
    rows.insert(2, {"audio": "absent.wav", "text": ""})
    rows.insert(5, {"audio": "0.wav", "text": "half a letter: \ud800"})
    rows.insert(6, {"audio": "0.wav", "text": "x", "size": 1 << 70})
    rows.insert(8, {"messages": [{"role": "user", "content": [{"audio": "absent.wav"}]}]})
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_a_worker_gets_a_manifest_once(many, tmp_path, monkeypatch):
    """Jobs are numbers: the lines of a large manifest would go to each of thousands of shards."""
    pytest.importorskip("grain")
    from train import shard

    jobs = []

    class Threads(concurrent.futures.ThreadPoolExecutor):
        def __init__(self, workers, context, begin, given):
            super().__init__(workers, initializer=begin, initargs=given)

        def submit(self, call, *args):
            jobs.append(pickle.dumps(args))
            return super().submit(call, *args)

    monkeypatch.setattr(shard.concurrent.futures, "ProcessPoolExecutor", Threads)
    monkeypatch.setattr(shard, "settle", lambda: None)  # it is of a process
    settings = shard.Settings(manifest=str(many), out=tmp_path / "out", rows=3, workers=1)
    shard.main(settings)
    assert len(jobs) == 5 and max(map(len, jobs)) < 100
    shards = open_source(tmp_path / "out")
    assert len(shards) == 9 and sources.manifest_of(f"{tmp_path}/out") == str(many)


def test_killed_while_writing_shards(many, tmp_path, monkeypatch, capsys):
    """What was whole is kept, what was not is written anew; the end is as if nothing had been."""
    pytest.importorskip("grain")
    from train import shard

    settings = shard.Settings(manifest=str(many), out=tmp_path / "out", rows=3, workers=0)
    whole, write = dataclasses.replace(settings, out=tmp_path / "whole"), shard.write
    shard.main(whole)

    def killed(settings, source, shards, number):
        if number == 2:
            (settings.out / "00002-of-00005.array_record.unfinished").write_bytes(b"half")
            raise KeyboardInterrupt
        return write(settings, source, shards, number)

    monkeypatch.setattr(shard, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        shard.main(settings)
    with open(settings.out / "progress.jsonl", "a") as progress:
        progress.write('{"shard": 2, "ro')  # cut off
    written, write_text = [], pathlib.Path.write_text

    def anew(path, *args):
        assert path.name != "progress.jsonl"  # what is done would be forgotten, if killed in it
        return write_text(path, *args)

    monkeypatch.setattr(pathlib.Path, "write_text", anew)
    monkeypatch.setattr(shard, "write", lambda *a: written.append(a[3]) or write(*a))
    shard.main(settings)
    monkeypatch.setattr(pathlib.Path, "write_text", write_text)
    assert written == [2, 3, 4]

    files = {path.name: path.read_bytes() for path in settings.out.glob("*")}
    expected = {path.name: path.read_bytes() for path in whole.out.glob("*")}
    assert files.pop("progress.jsonl") and expected.pop("progress.jsonl")
    assert files == expected and len(files) == 6
    told = [json.loads(line) for line in files["left_out.jsonl"].decode().splitlines()]
    assert [(row["line"], row["reason"]) for row in told] == [
        (3, "missing audio"),
        (6, "bad row"),
        (7, "bad row"),
        (9, "missing audio"),
    ]
    assert "9 rows in 5 shards" in capsys.readouterr().out
    source = open_source(settings.out)
    assert [row["text"] for row in (source[i] for i in range(9))] == [str(i) for i in range(9)]
    np.testing.assert_array_equal(hear(source[4]["audio"]), audio.load(tmp_path / "4.wav"))

    with pytest.raises(ValueError, match=r"out holds other shards: audio \['audio'\], not \['clip"):
        shard.main(dataclasses.replace(settings, audio=("clip",)))
    many.write_text(many.read_text().replace('"8"', '"9"'))
    with pytest.raises(ValueError, match="out holds other shards: crc"):
        shard.main(settings)


def test_a_shard_of_nothing_but_bad_rows_is_read_as_none(many, tmp_path):
    """It holds no record, and is one of the folder's shards all the same."""
    pytest.importorskip("grain")
    from train import shard

    lines = many.read_text().splitlines()
    many.write_text("\n".join(lines[i] for i in (0, 1, 5, 6, 3, 4, 8)))
    settings = shard.Settings(manifest=str(many), out=tmp_path / "out", rows=2, workers=0)
    shard.main(settings)
    assert len(list(settings.out.glob("*-of-00004.array_record"))) == 4
    source = open_source(settings.out)
    assert [row["text"] for row in (source[i] for i in range(len(source)))] == [*"0123"]
    shard.main(settings)  # nothing is left to do
    assert len(open_source(f"{settings.out}/*.array_record")) == 4


def killed_by_the_system(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_told_of(manifest, tmp_path, monkeypatch):
    pytest.importorskip("grain")
    from train import shard

    monkeypatch.setattr(shard, "write", killed_by_the_system)
    settings = shard.Settings(manifest=str(manifest), out=tmp_path / "out", workers=1)
    with pytest.raises(ChildProcessError, match=r"killed .*: wanted fewer --workers, got 1"):
        shard.main(settings)


def test_what_nobody_foresaw_is_left_out_of_shards(manifest, tmp_path, monkeypatch):
    """Whatever its type; what is no row's fault ends the run."""
    pytest.importorskip("grain")
    from train import shard

    class Refused(Exception):
        """As gcsfs has its own."""

    def failing(*errors):
        errors = iter(errors)

        def embed(row, audio):
            raise next(errors)

        monkeypatch.setattr(sources, "embed", embed)

    settings = shard.Settings(manifest=str(manifest), out=tmp_path / "out", workers=0)
    failing(Refused("503"), RuntimeError("cut"), StopIteration())
    shard.main(settings)
    told = (settings.out / "left_out.jsonl").read_text().splitlines()
    told = [(row["line"], row["reason"]) for row in map(json.loads, told)]
    assert told == [(n, "unforeseen") for n in (1, 3, 4)] + [(5, "bad row"), (6, "bad row")]
    for error in (ImportError("gcsfs"), MemoryError()):
        failing(error)
        with pytest.raises(type(error)):
            shard.main(dataclasses.replace(settings, out=tmp_path / type(error).__name__))


@pytest.fixture(scope="module")
def made(tmp_path_factory, chirp):
    """The folder of a data set that tensorflow-datasets wrote, and its rows as that reads them."""
    pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("grain")

    def row(i):
        wave = np.round(32767 * chirp(0.1, i)).astype(np.int64)
        heard = [[], ["dog"], ["rain", "dog"]][i % 3]
        return {"speech": wave, "text": f"wörd {i}", "gender": i % 2, "heard": heard}

    folder = tmp_path_factory.mktemp("tfds")
    builder = prepared.write(
        folder,
        {"train": [row(i) for i in range(6)], "test": [row(i) for i in range(2)]},
        lambda tfds: {
            "speech": tfds.features.Tensor(shape=(None,), dtype=np.int64),
            "text": tfds.features.Text(),
            "gender": tfds.features.ClassLabel(names=["male", "female"]),
            "heard": tfds.features.Sequence(tfds.features.ClassLabel(names=["dog", "rain"])),
        },
        audio="speech",
        sampleRate="8000",
    )
    theirs = builder.as_data_source("train")
    return folder, [theirs[i] for i in range(len(theirs))]


def test_tfds_without_tensorflow(made, monkeypatch):
    """The rows that tfds.data_source gives, audio with its rate, classes by name, splits sliced."""
    folder, rows = made
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder))
    source = pickle.loads(pickle.dumps(open_source("tfds:made_speech/en:train")))
    assert len(source) == 6
    for ours, theirs in zip((source[i] for i in range(6)), rows, strict=True):
        samples, rate = ours["speech"]
        assert rate == 8000 and samples.dtype == np.int16
        np.testing.assert_array_equal(samples, theirs["speech"])
        assert ours["text"] == theirs["text"].decode()
        assert ours["gender"] == ("male", "female")[theirs["gender"]]
        assert ours["heard"] == ", ".join(("dog", "rain")[each] for each in theirs["heard"])
        assert len(hear(ours["speech"])) == 2 * len(samples)
    assert len(open_source("tfds:made_speech/en:train[:50%]")) == 3
    assert "tensorflow" not in sys.modules


def test_a_corrupt_record_of_tfds_is_a_bad_sample(made, monkeypatch, tmp_path):
    """On the disk, or in what was written; its neighbours are read."""
    folder, _ = made
    shutil.copytree(folder, tmp_path / "copy")
    [path] = (tmp_path / "copy").rglob("*train*array_record*")
    content = bytearray(path.read_bytes())
    content[content.index("wörd 0".encode())] ^= 1
    path.write_bytes(content)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "copy"))
    source = open_source("tfds:made_speech/en:train")
    bad = []
    for index in range(len(source)):
        try:
            assert source[index]["text"].startswith("wörd")
        except BadSample as error:
            bad.append(error)
    assert [error.reason for error in bad] == ["bad row"]
    assert str(path.parent) in str(bad[0]) and "record " in str(bad[0])

    monkeypatch.setattr(source, "_records", {0: b"no protobuf"})
    with pytest.raises(BadSample, match=r"bad row: .*made_speech.*, train, record 0: "):
        source[0]
    monkeypatch.setattr(source._features, "deserialize_example_np", __import__)
    monkeypatch.setattr(source, "_records", {0: "no_such_package"})
    with pytest.raises(ImportError, match="no_such_package"):  # no record's fault
        source[0]


def test_tfds_says_what_is_missing(made, monkeypatch, tmp_path):
    """The data set, the split, the rate, or a disk that holds it."""
    folder, _ = made
    monkeypatch.setenv("TFDS_DATA_DIR", "gs://bucket/tfds")
    with pytest.raises(
        ValueError, match=r"wanted TFDS_DATA_DIR on a disk .*, got gs://bucket/tfds$"
    ):
        open_source("tfds:made_speech/en:train")
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder))
    with pytest.raises(FileNotFoundError, match="tfds build fleurs/de_de --file_format=array_rec"):
        open_source("tfds:fleurs/de_de:train")
    with pytest.raises(
        ValueError, match=r"no split 'dev', wanted one of (train, test|test, train)"
    ):
        open_source("tfds:made_speech/en:dev")
    shutil.copytree(folder, tmp_path / "copy")
    path = next((tmp_path / "copy").rglob("features.json"))
    path.write_text(path.read_text().replace('"sampleRate": "8000"', '"sampleRate": ""'))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "copy"))
    with pytest.raises(ValueError, match=r"no sampling rate for 'speech': give it: --data\.rate"):
        open_source("tfds:made_speech/en:train")
    assert open_source("tfds:made_speech/en:train", rate=4000)[0]["speech"][1] == 4000
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder))
    assert open_source("tfds:made_speech/en:train", rate=4000)[0]["speech"][1] == 8000
