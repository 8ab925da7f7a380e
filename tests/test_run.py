"""A run's folder is whole, and goes on only with the settings that it began with."""

import dataclasses
import json
import pathlib

import jax.numpy as jnp
import pytest

from qwen2audio_jax import Processor, preset
from qwen2audio_jax.training import run
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


def begin(folder, config):
    processor = Processor.from_pretrained("tiny")
    return run.begin(folder, config, model=preset("tiny"), processor=processor)


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
    assert (folder / run.SETTINGS).read_text() == before


def test_what_is_measured_may_change(tmp_path):
    """It moves no parameter. That data have moved has to be said; what they are stays."""
    data = DataConfig(train=("/data/chats.jsonl:train",))
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
    with pytest.raises(ValueError, match=r"data.train was .*/data/chats.*, now .*/mnt/chats"):
        begin(tmp_path, told(moved))
    assert begin(tmp_path, told(moved, "data.train")) is True
    with pytest.raises(ValueError, match=r'settings: data.tasks was \[\], now \["x"\]$'):
        begin(tmp_path, told(dataclasses.replace(moved, tasks=("x",)), "data.train"))


def test_a_setting_that_was_not_there_yet_was_as_it_is_by_default(folder):
    """A run of before goes on, unless it is now told otherwise."""
    path = folder / run.SETTINGS
    before = json.loads(path.read_text())
    del before["seed"], before["optimizer"]["learning_rate"]
    path.write_text(json.dumps(before))
    with pytest.raises(ValueError, match=r"settings: seed was 0, now 3$"):
        begin(folder, Settings(seed=3))
    assert begin(folder, Settings()) is True


def test_a_run_that_saved_nothing_begins_anew(tmp_path):
    """A mistyped setting that was noticed at once is no run yet."""
    assert begin(tmp_path, Settings(seed=1)) is False
    assert begin(tmp_path, Settings(seed=2)) is False
    assert json.loads((tmp_path / run.SETTINGS).read_text())["seed"] == 2


def test_checkpoints_without_settings_are_refused(folder):
    (folder / run.SETTINGS).unlink()
    with pytest.raises(ValueError, match=r"holds checkpoints, but no run.json to read: "):
        begin(folder, Settings())
