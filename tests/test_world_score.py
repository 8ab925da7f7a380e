"""Scores compare each answer with what is right of that very sample, by the task's own measure."""

import dataclasses

import numpy as np
import pytest
import small
from flax import nnx

from qwen2audio_jax import Processor, Qwen2Audio
from qwen2audio_jax.data.world import World
from qwen2audio_jax.evaluation import answering
from qwen2audio_jax.evaluation import world as scores

pytest.importorskip("espeakng_loader")


@pytest.fixture(scope="module")
def world():
    return World.named("small")


@pytest.fixture(scope="module")
def processor(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    world.write_tokenizer(folder, vocabulary=512)
    return Processor.from_pretrained(folder)


@pytest.fixture(scope="module")
def model():
    config = dataclasses.replace(
        small.CONFIG,
        encoder=dataclasses.replace(small.ENCODER, mels=128),
        decoder=dataclasses.replace(small.DECODER, vocabulary=512),
    )
    return Qwen2Audio(config, rngs=nnx.Rngs(0))


def test_who_knows_all_gets_all(model, world, processor, monkeypatch):
    """Whatever the batches: answers are matched to samples; every kind has its rows."""
    asked, sizes = {}, []

    def hear(model, inputs, *, choices, processor, **options):
        sizes.append(len(inputs["input_ids"]))
        rights = map(asked.__getitem__, recognised(inputs))
        rows = [processor.tokenizer.encode(f" <|en|>{r}<|im_end|> and more") for r in rights]
        longest = max(map(len, rows))
        return np.array([row + [processor.tokenizer.pad_id] * (longest - len(row)) for row in rows])

    def recognised(inputs):
        """What tells a sample from all others, in whatever batch: its tokens and its clips."""
        lengths = inputs["feature_attention_mask"].sum(axis=1)
        features = zip(inputs["input_features"], lengths, strict=True)
        clips = iter([clip[:, :length].tobytes() for clip, length in features])
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            ids = tuple(ids[mask > 0].tolist())
            yield ids, *(next(clips) for _ in range(ids.count(processor.tokenizer.audio_bos_id)))

    monkeypatch.setattr(answering, "generate", hear)
    kinds = ["recognise en", "count", "analysis", "chat", "preference"]
    for kind in kinds:
        for each in scores.ask(processor, world, kind, 11):
            inputs = processor.batch([each.example.prompt], list(each.example.waves))
            asked[next(recognised(inputs))] = each.right
    assert len(asked) == 55
    found = scores.score(model, processor, world, 11, kinds=kinds, batch=3)
    assert [row.task for row in found if not row.task.startswith("preference")] == kinds[:-1]
    assert {row.task for row in found[4:]} == {
        f"preference: {each}" for each in ("speech", "no speech", "other tasks")
    }
    assert [row.value for row in found] == [0.0] + [1.0] * (len(found) - 1)
    assert sum(row.n for row in found) == 55 and max(sizes) == 3
    assert "recognise en             wer         0.0%    11" in scores.table(found)


def test_a_model_that_knows_nothing_is_scored(model, world, processor):
    """Random weights answer without an error; where the set is closed, within it."""
    asked = scores.ask(processor, world, "gender", 2, style="tags")
    told = scores.answer(model, processor, asked, constrained=True, max_new_tokens=8)
    assert set(told) <= {"male", "female"}
    assert len(scores.rows(asked, told)) == 1


def test_measures():
    """Tags of languages do not count as words; times do, within a tenth of a second."""
    assert scores.exact(["a b", "no"], ["<|en|>a b", "no."]) == 0.5
    assert scores.METRICS["wer"](["红二", "one two"], ["<|zh|>红三", "<|en|>one two"]) == 0.25
    right = "<|0.10|>one<|0.50|><|0.70|>two<|1.20|>"
    assert scores.boundaries([right], [f"<|en|>{right}"]) == 1.0
    assert scores.boundaries([right], ["<|en|>" + right.replace("0.10", "0.20")]) == 1.0
    assert scores.boundaries([right], ["<|en|>" + right.replace("0.10", "0.30")]) == 0.75
    assert scores.boundaries([right], ["<|en|><|0.10|>one<|0.50|>"]) == 0.0


def test_a_conversation_goes_on_behind_the_model_s_own_answers(
    model, world, processor, monkeypatch
):
    """With its clip in both prompts, whatever the model says; tags of it are none of a turn's."""
    given = []

    def say(model, inputs, *, processor, **options):
        given.append(processor.decode(inputs["input_ids"], False)[0])
        return np.array([processor.tokenizer.encode("<|en|>no <|AUDIO|>one<|im_end|>")])

    monkeypatch.setattr(answering, "generate", say)
    source = world.source("analysis", "test", 100)
    messages = next(r["messages"] for r in source if len(r["messages"]) > 2)
    (first, told), (second, _) = scores.converse(model, processor, messages)
    assert first.question in given[0] and second.question in given[1]
    assert [first.right, second.right] == [messages[1]["content"], messages[3]["content"]]
    assert told == "<|en|>no <|AUDIO|>one" and "assistant\nno one<|im_end|>" in given[1]
    assert first.example.waves[0] is not None and len(second.example.waves) == 1
    np.testing.assert_array_equal(*(each.example.waves[0] for each in (first, second)))
