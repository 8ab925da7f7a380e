"""Manifests are read whole or refused by line."""

import json
import os
import pathlib

import pytest

from qwen2audio_jax.data import manifest


@pytest.fixture
def write(tmp_path):
    """Writes rows (objects, or lines as they are) and returns the manifest's path."""

    def make(*rows) -> pathlib.Path:
        path = tmp_path / "set" / "manifest.jsonl"
        path.parent.mkdir(exist_ok=True)
        lines = [r if isinstance(r, str) else json.dumps(r) for r in rows]
        path.write_text("\n".join(lines), encoding="utf-8")
        return path

    return make


def test_paths_start_at_the_manifest(write):
    """Relative audio is found from anywhere; absolute paths and URLs stay as they are."""
    path = write(
        {"audio": "clips/a.wav", "text": "one"},
        "",
        {"audio": "/elsewhere/b.wav", "text": "zwei “drei”\u2028", "speaker": "jo"},
        {"audio": "https://example.org/c.wav", "text": ""},
    )
    a, b, c = manifest.read(path)
    assert a.audio == os.fspath(path.parent / "clips" / "a.wav")
    assert (b.audio, b.text) == ("/elsewhere/b.wav", "zwei “drei”\u2028")
    assert b.fields["speaker"] == "jo"
    assert c.audio == "https://example.org/c.wav" and c.text == ""


def test_unescaped_line_separators_do_not_split_rows(write):
    """JSON may hold U+2028 raw; only a newline ends a row."""
    path = write('{"audio": "a.wav", "text": "one\u2028two"}')
    assert [s.text for s in manifest.read(str(path))] == ["one\u2028two"]


def test_a_byte_order_mark_is_no_text(write):
    """As Windows' editors begin a file with."""
    path = write({"audio": "a.wav", "text": "one"}, {"audio": "b.wav", "text": "two"})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [s.text for s in manifest.read(path)] == ["one", "two"]


def test_a_split_is_a_part(write):
    """`split` keeps its rows in their order and nothing else."""
    path = write(
        {"audio": "a.wav", "text": "one", "split": "train"},
        {"audio": "b.wav", "text": "two", "split": "test"},
        {"audio": "c.wav", "text": "three"},
        {"audio": "d.wav", "text": "four", "split": "test"},
    )
    assert [s.text for s in manifest.read(path, split="test")] == ["two", "four"]
    assert len(manifest.read(path)) == 4
    with pytest.raises(ValueError, match="no rows with split 'dev'; splits in it: test, train"):
        manifest.read(path, split="dev")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"audio": "a.wav"', "line 2: Expecting ',' delimiter"),
        ("[1]", "line 2: wanted an object, got list"),
        ('{"text": "one"}', "line 2: no 'audio' among text"),
        ('{"audio": "a.wav", "label": "dog"}', "line 2: no 'text' among audio, label"),
        ('{"audio": "a.wav", "text": null}', "line 2: 'text' must be a string, got null"),
        ('{"audio": "", "text": "one"}', "line 2: 'audio' is empty"),
    ],
)
def test_a_bad_row_is_named(write, line, message):
    """The error names the file, the line, and what was wrong."""
    path = write({"audio": "a.wav", "text": "one"}, line)
    with pytest.raises(ValueError) as error:
        manifest.read(path)
    assert message in str(error.value) and str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_no_file_and_no_rows_are_errors(write, tmp_path):
    """A manifest that is not there, or has nothing in it, is refused."""
    with pytest.raises(FileNotFoundError, match=r"no manifest at .*nothing\.jsonl"):
        manifest.read(tmp_path / "nothing.jsonl")
    with pytest.raises(ValueError, match="no rows; splits in it: none"):
        manifest.read(write(""))


def test_the_real_digits(shared_data):
    """Takes 0-4 of six speakers and ten digits are the test split; every file is there."""
    path = shared_data / "fsdd" / "manifest.jsonl"
    test, train = manifest.read(path, split="test"), manifest.read(path, split="train")
    assert (len(test), len(train)) == (300, 2100)
    assert all(os.path.isfile(s.audio) for s in test)
    assert len({s.text for s in test}) == 10 and len({s.fields["speaker"] for s in test}) == 6
