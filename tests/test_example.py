"""Clips are heard wherever they lie, or it is said why not."""

import base64
import io

import numpy as np
import pytest
import soundfile

from qwen2audio_jax.data.example import BadSample, hear


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


def test_clips_in_remote_storage_are_fetched(chirp, monkeypatch):
    """Through epath; what is not there is missing, not broken."""
    file = io.BytesIO()
    soundfile.write(file, chirp(0.3), 16_000, "FLOAT", format="WAV")
    bucket = {"gs://bucket/clip.wav": file.getvalue()}

    class Path:
        def __init__(self, path):
            self.path = path

        def read_bytes(self):
            if self.path not in bucket:
                raise FileNotFoundError(2, "No such file or directory")
            return bucket[self.path]

    monkeypatch.setattr("qwen2audio_jax.data.example.epath.Path", Path)
    np.testing.assert_array_equal(hear("gs://bucket/clip.wav"), chirp(0.3))
    with pytest.raises(BadSample, match=r"missing audio: s3://bucket/no.wav: No such file"):
        hear("s3://bucket/no.wav")
