"""Clips are heard wherever they lie, or it is said why not."""

import base64
import io
import pickle
import re

import fsspec
import numpy as np
import pytest
import soundfile

from qwen2audio_jax.data.example import BadSample, hear, why


def test_clips_come_from_anywhere(chirp, tmp_path):
    """Paths, bytes, arrays, and what datasets makes of them: the same wave."""
    file = io.BytesIO()
    soundfile.write(file, chirp(0.3), 16_000, "FLOAT", format="WAV")
    (tmp_path / "clip.wav").write_bytes(file.getvalue())
    path = str(tmp_path / "clip.wav")
    for source in (
        path,
        file.getvalue(),
        (chirp(0.3), 16_000),
        {"array": chirp(0.3), "sampling_rate": 16_000},
        {"bytes": file.getvalue(), "path": "elsewhere.wav"},
        {"bytes": None, "path": path},
        f"data:audio/wav;base64,{base64.b64encode(file.getvalue()).decode()}",
    ):
        np.testing.assert_array_equal(hear(source), chirp(0.3))


def test_clips_in_remote_storage_are_fetched(chirp):
    """Through fsspec; what is not there is missing, not broken."""
    file = io.BytesIO()
    soundfile.write(file, chirp(0.3), 16_000, "FLOAT", format="WAV")
    fsspec.filesystem("memory").pipe("/bucket/clip.wav", file.getvalue())
    np.testing.assert_array_equal(hear("memory://bucket/clip.wav"), chirp(0.3))
    with pytest.raises(BadSample, match=r"missing audio: no file at memory://bucket/no.wav"):
        hear("memory://bucket/no.wav")
    told = r"too long: memory://bucket/clip.wav: wanted at most 0.2 s, got 0.30 s$"
    with pytest.raises(BadSample, match=told):
        hear("memory://bucket/clip.wav", 0.2)


@pytest.mark.parametrize(
    ("clip", "told"),
    [
        ("", "missing audio: wanted a clip, got none"),
        ("HERE", "corrupt audio: .*: is a directory, wanted a sound file"),
        ({"name": "a.wav"}, "corrupt audio: wanted a url or base64 data, got {'name'"),
        (5, "corrupt audio: .*, got int"),
        (["a.wav"], "corrupt audio: .*, got 1 values"),
    ],
    ids=str,
)
def test_what_is_no_clip_is_a_bad_sample(clip, told, tmp_path):
    """Whatever a row has in its place."""
    with pytest.raises(BadSample, match=f"^{told}"):
        hear(str(tmp_path) if clip == "HERE" else clip)


def test_a_name_that_no_log_could_hold_is_spelt_out(tmp_path):
    """Bytes that are no UTF-8, as file names have them, whatever is wrong with the file."""
    with pytest.raises(BadSample) as caught:
        hear(f"{tmp_path}/caf\udce9.wav")
    for error in (caught.value, pickle.loads(pickle.dumps(caught.value)), OSError("caf\udce9.wav")):
        _, message = why(error)
        assert r"caf\udce9.wav" in message and message.encode("utf-8")


def test_what_is_wrong_with_a_long_sample_is_told_in_short():
    """Checkpoints hold what was told, and logs; both ends of it say what it was."""
    error = BadSample("too long", f"a.wav: {'x' * 10**6}, wanted less")
    assert len(str(error)) < 400
    assert re.fullmatch(r"too long: a\.wav: x+\.\.\.x+, wanted less", str(error))
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert len(why(OSError("x" * 10**6))[1]) < 400
