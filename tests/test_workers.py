"""What ends a worker is told by the row that it had in hand."""

import json
import os
import signal
from unittest.mock import Mock

import pytest
import words

pytest.importorskip("grain")

from qwen2audio_jax.data import workers
from qwen2audio_jax.data.chats import from_messages
from qwen2audio_jax.data.mixture import Mixture, Part
from qwen2audio_jax.data.pack import Bucket
from qwen2audio_jax.data.sources import open_source


def ends(record, processor):
    """As a decoder that crashes would."""
    if record["crashes"]:
        os.kill(os.getpid(), signal.SIGSEGV)
    return from_messages(record, processor)


def test_the_last_of_a_killed_trainer_takes_its_notes_away(tmp_path, monkeypatch):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "1").touch()
    ended = []
    monkeypatch.setattr(workers.multiprocessing.connection, "wait", lambda sentinels: None)
    monkeypatch.setattr(workers.multiprocessing, "parent_process", Mock())
    monkeypatch.setattr(workers.os, "_exit", ended.append)
    workers._end_with_parent(str(tmp_path / "notes"))
    workers._end_with_parent(None)
    assert ended == [1, 1] and not (tmp_path / "notes").exists()


@pytest.mark.slow
def test_a_row_that_ends_its_worker_is_told_and_can_be_taken_out(tmp_path):
    """By the line it stands in; with {} there the run goes on from where it was."""
    turns = [{"role": "user", "content": "no"}, {"role": "assistant", "content": "yes"}]
    lines = [json.dumps({"messages": turns, "crashes": i == 20}) for i in range(30)]
    tokenizer = str(words.made_tokenizer(tmp_path / "tokenizer"))

    def opened(workers):
        (tmp_path / "rows.jsonl").write_text("\n".join(lines))
        part = Part(name="chats", source=open_source(tmp_path / "rows.jsonl"), compile=ends)
        bucket = Bucket(rows=2, tokens=90, clips=0, frames=0)
        how = {"processor": tokenizer, "buckets": (bucket,), "workers": workers, "epochs": 1}
        return iter(Mixture(parts=(part,), **how, shuffle=False))

    batches = opened(1)
    told = r"with status -11 with line 21 of rows.jsonl \(chats\) in hand; wanted \{\} in"
    with pytest.raises(ChildProcessError, match=told):
        list(batches)
    state = batches.get_state()
    batches.close()
    lines[20] = "{}"
    again = opened(0)
    again.set_state(state)
    list(again)
    assert again.counts["chats"]["samples"] == 29
    assert [count for count, _ in again.counts["chats"]["bad"].values()] == [1]
    again.close()
