"""A run's folder is whole, and goes on only with the settings that it began with."""

import dataclasses
import json
import os
import pathlib
import re
import shutil

import jax.numpy as jnp
import pytest

from qwen2audio_jax import Processor, preset
from qwen2audio_jax.training import hosts, run
from qwen2audio_jax.training import settings as training
from qwen2audio_jax.training.checkpoint import Checkpoints
from qwen2audio_jax.training.data_config import DataConfig
from qwen2audio_jax.weights import settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    learning_rate: float = 1e-3
    frozen: tuple[str, ...] = ("encoder",)
    log_every: int = dataclasses.field(default=10, metadata=run.MAY_CHANGE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    seed: int = 0
    data: pathlib.Path = pathlib.Path("train.jsonl")
    optimizer: Optimizer = Optimizer()
    lora: Optimizer | None = None
    out: pathlib.Path = dataclasses.field(default=pathlib.Path("runs"), metadata=run.MAY_CHANGE)


def begin(folder, config, *, model=preset("tiny"), words="tiny"):  # noqa: B008
    processor = Processor.from_pretrained(words)
    return run.begin(folder, config, model=model, processor=processor)


@pytest.fixture
def folder(tmp_path):
    """A run's, with one checkpoint."""
    assert begin(tmp_path / "run", Settings()) is False
    checkpoints = Checkpoints(tmp_path / "run")
    checkpoints.save(1, {"x": jnp.ones(3)}, None)
    checkpoints.close()
    return tmp_path / "run"


def test_a_run_goes_on_as_it_began(folder):
    """The same settings continue it, and so do others that change no parameter."""
    assert begin(folder, Settings()) is True
    logs = dataclasses.replace(Settings().optimizer, log_every=1)
    other = dataclasses.replace(Settings(), out=pathlib.Path("moved"), optimizer=logs)
    before = (folder / run.SETTINGS).read_text()
    assert begin(folder, other) is True
    assert (folder / run.SETTINGS).read_text() == before  # what it goes on from may yet be refused
    run.keep(folder, other)
    kept = json.loads((folder / run.SETTINGS).read_text())
    assert kept == run.as_json(other) and kept["optimizer"]["log_every"] == 1
    assert kept["out"] == "moved" and kept["data"] == "train.jsonl"


def test_two_jobs_do_not_share_a_folder(tmp_path):
    """The second is told which has it; when that ends, however it does, it may go on."""
    folder = tmp_path / "run"
    with run.alone(folder):
        told = rf"run is in use by process {os.getpid()} of \S+: wanted that to end, or another --o"
        with pytest.raises(ValueError, match=told), run.alone(folder):
            pass
    with run.alone(folder):
        pass


def test_its_folder_is_whole(folder):
    """Sizes and words are beside the checkpoints."""
    assert settings.read(folder) == preset("tiny")
    conversation = [{"role": "user", "content": "what is that?"}]
    ours, theirs = (Processor.from_pretrained(source) for source in (folder, "tiny"))
    assert (ours(conversation)["input_ids"] == theirs(conversation)["input_ids"]).all()
    assert not [path for path in folder.iterdir() if "partial" in path.name]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seed": 7}, "seed was 0, now 7"),
        ({"data": pathlib.Path("other.jsonl")}, 'data was "train.jsonl", now "other.jsonl"'),
        (
            {"seed": 1, "optimizer": Optimizer(learning_rate=0.1, frozen=())},
            "seed was 0, now 1; optimizer.learning_rate was 0.001, now 0.1; "
            'optimizer.frozen was ["encoder"], now []',
        ),
        (
            {"lora": Optimizer()},
            "lora was null, now nothing; lora.learning_rate was nothing, ",
        ),
    ],
)
def test_another_setting_is_refused_with_both_values(folder, change, message):
    before = (folder / run.SETTINGS).read_text()
    with pytest.raises(ValueError) as caught:
        begin(folder, dataclasses.replace(Settings(), **change))
    assert f"{folder} holds a run with other settings: {message}" in str(caught.value)
    assert str(caught.value).endswith("; wanted the same, or another --out")
    assert (folder / run.SETTINGS).read_text() == before


def test_what_is_measured_may_change(tmp_path):
    """It moves no parameter. That data have moved has to be said; what they are stays."""
    data = DataConfig(train=("/data/chats.jsonl:train",), style="tags")
    told = lambda data, *changing: training.Settings(data=data, changing=changing)
    assert begin(tmp_path, told(data)) is False
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"x": jnp.ones(3)}, None)
    checkpoints.close()
    measured = dataclasses.replace(
        data,
        held_out=("/data/chats.jsonl:test", "b.jsonl"),
        held_out_tasks=("x", "y"),
        held_out_tags=("z",),
    )
    assert begin(tmp_path, told(measured)) is True and begin(tmp_path, told(data)) is True
    moved = dataclasses.replace(measured, train=("/mnt/chats.jsonl:train",))
    with pytest.raises(ValueError, match=r"data.train was .*/data/chats.*, now .*/mnt/chats") as no:
        begin(tmp_path, told(moved, "optimizer.steps"))
    way = "; --changing optimizer.steps data.train goes on so, another --out anew"
    assert str(no.value).endswith(way)
    assert begin(tmp_path, told(moved, "data.train")) is True
    with pytest.raises(ValueError, match=r'settings: data.tasks was \[\], now \["x"\]; wanted the'):
        begin(tmp_path, told(dataclasses.replace(moved, tasks=("x",)), "data.train"))


def test_a_setting_that_was_not_there_yet_was_as_it_is_by_default(folder):
    """A run of before goes on, unless it is now told otherwise."""
    path = folder / run.SETTINGS
    before = json.loads(path.read_text())
    del before["seed"], before["optimizer"]["learning_rate"]
    path.write_text(json.dumps(before))
    with pytest.raises(ValueError, match=r"settings: seed was 0, now 3; wanted the same"):
        begin(folder, Settings(seed=3))
    assert begin(folder, Settings()) is True


def test_the_first_host_says_whether_a_run_goes_on(folder, tmp_path, monkeypatch):
    """Another one may see late what lies on their disk."""
    assert run.goes_on(folder) and not run.goes_on(tmp_path / "empty")
    begun = run.begun(folder)
    with monkeypatch.context() as patched:
        patched.setattr(hosts, "by_first", lambda make: True)
        assert run.goes_on(tmp_path / "empty")
    monkeypatch.setattr(hosts, "by_first", lambda make: begun)
    assert run.begun(tmp_path / "empty") == begun


def test_a_run_that_saved_nothing_begins_anew(tmp_path):
    """A mistyped setting that was noticed at once is no run yet."""
    assert begin(tmp_path, Settings(seed=1)) is False
    assert begin(tmp_path, Settings(seed=2)) is False
    assert json.loads((tmp_path / run.SETTINGS).read_text())["seed"] == 2


@pytest.mark.parametrize("content", [None, b'{"seed": 0', b"{}", b"[1]", b"\xff"])
def test_checkpoints_without_settings_are_refused(folder, content):
    """Absent, damaged, or something else; whoever reads them says the same."""
    (folder / run.SETTINGS).unlink()
    if content is not None:
        (folder / run.SETTINGS).write_bytes(content)
    told = re.escape(f"{folder} holds checkpoints, but no run.json to read: ")
    with pytest.raises(ValueError, match=told):
        begin(folder, Settings())
    with pytest.raises(ValueError, match=told):
        run.fed(training.Settings(out=folder), 1)


def test_a_model_that_would_be_ignored_is_refused(folder, tmp_path):
    """A run has its own sizes and words: others are named. The same may lie elsewhere, and say
    otherwise how it is best sampled."""
    tiny = preset("tiny")
    sampled = dataclasses.replace(tiny, generation={"top_p": 0.5})
    own = Processor.from_pretrained("tiny").folder
    assert begin(folder, Settings(), model=sampled, words=shutil.copytree(own, tmp_path / "moved"))
    decoder = dataclasses.replace(tiny.decoder, rope_theta=2e6, kv_heads=4)
    other = dataclasses.replace(tiny, decoder=decoder)
    with pytest.raises(ValueError, match=r"another --model: decoder.kv_heads was 2, now 4; .*rope"):
        begin(folder, Settings(), model=other)
    words = tmp_path / "moved" / run.WORDS
    words.write_text(words.read_text() + "\n")
    with pytest.raises(ValueError, match=r"another --model: its tokenizer.json has other words$"):
        begin(folder, Settings(), words=tmp_path / "moved")
