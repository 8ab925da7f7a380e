"""The model in the package hears, answers, and is the same to transformers."""

import json
import pathlib
import re

import numpy as np
import pytest
import torch
import transformers

pytest.importorskip("espeakng_loader")

import qwen2audio_jax
from qwen2audio_jax import Processor, Qwen2Audio, audio, generate
from qwen2audio_jax.data.skills import CLASSES
from qwen2audio_jax.data.world import MODES, World
from qwen2audio_jax.evaluation import metrics, recognition
from qwen2audio_jax.evaluation import world as evaluation
from qwen2audio_jax.transcribe import transcribe

FOLDER = pathlib.Path(qwen2audio_jax.__file__).parent / "assets" / "tiny"
RATE = audio.SAMPLE_RATE
MISSED = ["recognise zh"]  # aims, as README says


@pytest.fixture(scope="module")
def tiny():
    return Qwen2Audio.from_pretrained("tiny", dtype="float32"), Processor.from_pretrained("tiny")


@pytest.fixture(scope="module")
def world():
    return World.named("full")


def test_it_is_small_and_says_what_it_is():
    """A few megabytes, with a card in the form of Hugging Face's."""
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 6e6
    assert (FOLDER / "README.md").read_text("utf-8").startswith("---\nlicense: apache-2.0")


def rows_of_the_card():
    """What it scores after pretraining, SFT and DPO, in percent, by task."""
    found = {}
    for line in (FOLDER / "README.md").read_text("utf-8").splitlines():
        if row := re.fullmatch(r"(\S.*?) +(exact|wer|times) +\d+((?: +[\d.]+%){3})", line):
            found[row[1]] = [float(each) for each in row[3].replace("%", "").split()]
    return found


def test_its_card_says_that_it_meets_the_aims():
    """Of every language, direction, class and mode, and what DPO costs recognition."""
    card = rows_of_the_card()
    task = lambda start: {name: values for name, values in card.items() if name.startswith(start)}
    spoken, translated = task("recognise "), task("translate ")
    assert (len(spoken), len(translated)) == (5, 8)
    most = {name: 5.0 for name in spoken} | {"recordings": 3.0}
    least = {name: 85.0 for name in (*translated, *MODES)} | dict.fromkeys(CLASSES, 90.0)
    least["preference: no speech"] = 90.0
    wrong = [name for name, aim in most.items() if card[name][-1] > aim]
    wrong += [name for name, aim in least.items() if card[name][-1] < aim]
    wrong += [f"{name}: DPO" for name, (_, sft, dpo) in spoken.items() if dpo - sft > 1]
    assert sorted(wrong) == MISSED


def test_transformers_says_the_same(tiny, world):
    """Token for token, of a conversation in each mode, each in a batch of four."""
    model, processor = tiny
    theirs = transformers.Qwen2AudioForConditionalGeneration.from_pretrained(
        FOLDER, dtype=torch.float32
    ).eval()
    for mode in ("analysis", "chat"):
        asked = [world.messages(i, "test", mode=mode)["messages"][:1] for i in range(4)]
        ours = generate(model, processor(asked), max_new_tokens=12, min_new_tokens=12)
        inputs = {k: torch.from_numpy(x) for k, x in processor(asked, frames=3000).items()}
        told = theirs.generate(
            **inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0
        )
        np.testing.assert_array_equal(ours, told[:, inputs["input_ids"].shape[1] :].numpy())


def test_it_hears_recorded_digits(tiny, shared_data):
    """At most three in a hundred wrong, of speakers that it knows."""
    folder = shared_data / "fsdd"
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["split"] == "test"]
    waves = [audio.load(folder / row["audio"]) for row in rows]
    heard = recognition.score(*tiny, waves, [row["text"] for row in rows])
    assert heard.clips == 300 and heard.word_error_rate <= 0.03


@pytest.mark.parametrize(
    ("kind", "row", "right"),
    [
        ("recognise en", "recognise en", 0.95),
        ("translate en de", "translate en de", 0.85),
        ("voice", "voice", 0.9),
        ("gender", "gender", 0.9),
        ("pitch", "pitch", 0.9),
        ("emotion", "emotion", 0.9),
        ("chord", "chord", 0.95),
        ("analysis", "analysis", 0.85),
        ("chat", "chat", 0.85),
        ("preference", "preference: no speech", 0.9),
    ],
)
def test_it_answers_of_what_it_never_heard(tiny, world, kind, row, right):
    """Voices and sounds that no stage learned from: the card has all, these are some."""
    scored = evaluation.score(*tiny, world, 200 if kind in MODES else 60, kinds=[kind])
    (found,) = (each for each in scored if each.task == row)
    assert (1 - found.value if found.metric == "wer" else found.value) >= right


def test_it_writes_down_what_is_longer_than_all_it_has_heard(tiny, world):
    """Twenty phrases with pauses, in windows of its own length: most words, of 30 s hardly any."""
    samples = [world["recognise en"].sample(i, "test") for i in range(20)]
    silence = np.zeros(RATE // 2, np.float32)
    parts = [part for sample in samples for part in (sample["audio"][0], silence)]
    wanted, wrong = " ".join(sample["text"] for sample in samples), []
    for window in (None, 30.0):
        [result] = transcribe(*tiny, [(np.concatenate(parts), RATE)], window=window)
        assert result.seconds > 25
        errors, words = metrics.word_errors(wanted, result.text)
        wrong.append(errors / words)
    assert wrong[0] <= 0.3 < wrong[1] / 2
