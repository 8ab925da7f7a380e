"""Held-out samples are all answered or told about, each from the set that is its own."""

import dataclasses
import json

import numpy as np
import pytest
import small
import words
from flax import nnx

pytest.importorskip("grain")

from qwen2audio_jax import Processor, Qwen2Audio, mel
from qwen2audio_jax.data.chats import from_messages
from qwen2audio_jax.data.example import Example
from qwen2audio_jax.data.instruction import Task
from qwen2audio_jax.data.mixture import Mixture, Part
from qwen2audio_jax.data.pack import Bucket
from qwen2audio_jax.data.sources import open_source
from qwen2audio_jax.evaluation import answering
from qwen2audio_jax.training import held_out
from qwen2audio_jax.training.inputs import HeldOut

BUCKET = Bucket(rows=2, tokens=90, clips=5, frames=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(words.made_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def processor(folder):
    return Processor.from_pretrained(folder)


@pytest.fixture(scope="module")
def model():
    return Qwen2Audio(small.CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture
def asked(monkeypatch, processor):
    """What `generate` is asked, which says the first choice, or how many tokens a prompt has."""
    calls = []

    def generate(model, inputs, *, max_new_tokens, choices, processor):
        counts = inputs["attention_mask"].sum(axis=1)
        slots = (inputs["input_ids"] == processor.tokenizer.audio_id).sum()
        heard = inputs.get("feature_attention_mask", np.zeros((0, 0), int)).sum(axis=1)
        assert slots == mel.audio_tokens(heard).sum()  # or the model would refuse them
        calls.append((len(counts), choices, max_new_tokens))
        texts = [str(n) for n in counts] if choices is None else [texts[0] for texts in choices]
        rows = [processor.tokenizer.encode(text) for text in texts]
        longest = max(map(len, rows))
        return np.array([row + [processor.tokenizer.pad_id] * (longest - len(row)) for row in rows])

    monkeypatch.setattr(answering, "generate", generate)
    return calls


def prompt(processor, text):
    return Example(processor.tokenizer.compile(text), ())


def test_closed_and_open_sets_are_answered_apart(model, processor, asked):
    """None is lost to its neighbours, and no choice is cut, however short answers may be."""
    texts = ["yes", "yes no", "yes no yes", "yes no", "no"]
    examples = [prompt(processor, text) for text in texts]
    length = lambda i: sum(len(segment.ids) for segment in examples[i].prompt)
    long = "yes no yes no yes no"
    choices = [None, ("no", "yes"), None, (long,), ("yes",)]
    said = answering.answer(model, processor, examples, choices, rows=2, max_new_tokens=3)
    assert said == [str(length(0)), "no", str(length(2)), long, "yes"]
    room = len(processor.tokenizer.encode(long)) + 1
    wanted = [(2, [["no", "yes"], [long]], room), (1, [["yes"]], 3), (2, None, 3)]
    assert asked == wanted and room > 3


def conversation(question, answer="yes"):
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def test_clips_behind_the_last_answer_are_not_given(model, processor, asked, chirp):
    """A conversation may end with a question; the one before it is asked, with its own clips."""
    hear = lambda seed: {"role": "user", "content": [{"audio": (chirp(0.3, seed), 16_000)}]}
    said = {"role": "assistant", "content": "yes"}
    rows = [{"messages": m} for m in ([hear(0), said, hear(1)], [hear(0), said, hear(1), said])]
    answers, bad = held_out.answers(model, processor, [kept(rows)], rows=2, max_new_tokens=2)
    assert [each.wanted for each in answers] == ["yes", "yes"] and not bad and asked[0][0] == 2


def kept(source, name="kept"):
    part = Part(name=name, source=source, compile=from_messages)
    return HeldOut(part=part, choices=lambda sample: sample.get("choices"))


def test_what_cannot_be_answered_is_told_by_reason(model, processor, asked, caplog):
    """And ends nothing: a prompt that the context has no room for, and what nobody foresaw."""
    absent = [{"type": "audio", "audio": "absent.wav"}]
    rows = [
        conversation("no"),
        conversation(absent),
        conversation("no", " "),
        conversation("no " * 300),
        conversation("no") | {"choices": 1j},
        conversation(absent),
    ]
    choices = lambda sample: None if "choices" not in sample else sorted(sample["choices"])
    answers, bad = held_out.answers(
        model,
        processor,
        [dataclasses.replace(kept(rows), choices=choices)],
        rows=2,
        max_new_tokens=4,
    )
    assert [(each.part, each.row, each.wanted) for each in answers] == [("kept", "row 0", "yes")]
    assert len(asked) == 1
    assert bad == {"missing audio": 2, "empty text": 1, "too long": 1, "unforeseen": 1}
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 4 and told[0].startswith("kept: 2 missing audio, the last: row 5: ")
    assert any("row 4: TypeError: " in line for line in told)


def test_a_best_that_is_never_measured_is_refused():
    """At the start, rather than after the first evaluation."""
    one, two = [kept([])], [kept([]), kept([], "more.jsonl:test")]
    check = held_out.check_best
    for best, parts, how in (
        ("wer", one, {}),
        ("loss", two, {}),
        ("more.jsonl:test/wer", two, {}),
        ("ctc", one, {"ctc": True}),
        ("rewards/margins", one, {"pairs": True}),
        ("more.jsonl:test/rejected_match", two, {"pairs": True}),
    ):
        check(best, parts, **{"pairs": False, "ctc": False, **how})
        for wrong in ("kept/wer", "other.jsonl/wer", "more.jsonl:test/loss", "rewords/margins"):
            if (wrong, parts) == ("kept/wer", two):
                continue
            with pytest.raises(ValueError, match=f"wanted a loop.best of loss, .*got '{wrong}'"):
                check(wrong, parts, **{"pairs": False, "ctc": False, **how})
    for wrong in ("rewards/margins", "rejected_match", "nll", "ctc"):
        with pytest.raises(ValueError, match=r"a loop.best of loss, accuracy, wer, exact_match"):
            check(wrong, one, pairs=False, ctc=False)


def test_plain_text_has_nothing_to_answer(model, processor, asked, folder, caplog):
    """A task without a prompt: it is measured by its loss alone, which is said."""
    line = "-> [TEXT:text]"
    part = Part(name="plain", source=[{"text": "yes no"}] * 2, compile=Task.parse(line).compile)
    parts = [HeldOut(part=part, choices=Task.parse(line).choices), kept([conversation("no")])]
    answers, bad = held_out.answers(model, processor, parts, rows=2, max_new_tokens=4)
    assert [each.part for each in answers] == ["kept"] and not bad and len(asked) == 1
    (told,) = [record.getMessage() for record in caplog.records]
    assert told == "plain: 2 without a prompt are measured, not answered"
    mixture, seen = Mixture(parts=(part,), processor=folder, buckets=(BUCKET,)), []

    class One:
        def means(self):
            return {"loss": 2.0}

    assert held_out.losses(parts[:1], mixture, lambda b: seen.append(b) or One()) == {"loss": 2.0}
    assert (seen[0]["labels"] >= 0).any()


def test_answers_that_will_be_cut_are_told(model, processor, asked, caplog):
    """They are scored as they are, which the score does not show; choices are not cut."""
    wanted = " ".join(["no"] * 9)
    rows = [
        conversation("no", wanted),
        conversation("no"),
        conversation("no", wanted) | {"closed": 1},
    ]
    choices = lambda sample: ["yes", wanted] if "closed" in sample else None
    parts = [dataclasses.replace(kept(rows), choices=choices)]
    held_out.answers(model, processor, parts, rows=2, max_new_tokens=4)
    [told] = [record.getMessage() for record in caplog.records]
    needs = len(processor.tokenizer.encode(wanted)) + 1
    assert told.startswith("kept: 1 of 3 answers will be cut short")
    assert f"of {needs}, got 4" in told
    caplog.clear()
    held_out.answers(model, processor, parts, rows=2, max_new_tokens=needs)
    assert not caplog.records


def test_what_may_be_long_has_room_behind_its_prompt(model, processor, asked):
    """The longest choice of a part is asked for beside all of its prompts that have choices."""
    # with its end 161 tokens, of 256
    long = " ".join(["no"] * 80)
    rows = [conversation("no " * 60), conversation("no"), conversation("no " * 60) | {"open": True}]
    choices = lambda sample: None if "open" in sample else ["yes", long]
    parts = [dataclasses.replace(kept(rows), choices=choices)]
    answers, bad = held_out.answers(model, processor, parts, rows=2, max_new_tokens=4)
    assert len(answers) == 2 and bad == {"too long": 1}


def test_what_is_told_names_its_line(model, processor, asked, tmp_path, caplog):
    """Of what no list of types would foresee, too."""

    class Refused(Exception):
        """As gcsfs has its own."""

    def choices(sample):
        raise Refused("503")

    rows = [json.dumps(conversation("no", answer)) for answer in (" ", "yes")]
    (tmp_path / "rows.jsonl").write_text("\n\n".join(rows))
    source = open_source(tmp_path / "rows.jsonl")
    parts = [dataclasses.replace(kept(source), choices=choices)]
    answers, bad = held_out.answers(model, processor, parts, rows=2, max_new_tokens=4)
    assert not answers and bad == {"empty text": 1, "unforeseen": 1}
    assert "the last: line 1 of rows.jsonl: empty text: " in caplog.text
    assert "the last: line 3 of rows.jsonl: Refused: 503" in caplog.text


def test_what_is_of_no_use_at_all_ends_nothing(folder, caplog):
    """Unless a bad sample is to."""
    parts = [kept([conversation("no", "")] * 3, "mute"), kept([conversation("no")], "good")]
    train = tuple(each.part for each in parts)
    mixture = Mixture(parts=train, processor=folder, buckets=(BUCKET,))
    seen = []

    class One:
        def means(self):
            return {"loss": 2.0, "tokens": 5.0}

    measure = lambda batch: seen.append(batch) or One()
    assert held_out.losses(parts, mixture, measure) == {"loss": 2.0} and len(seen) == 1
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.startswith("mute is not measured: none of 3 samples can be used, the last: row 2")
    assert held_out.losses(parts[:1], mixture, measure) == {}
    with pytest.raises(ValueError, match="part 'mute': row 0: empty text"):
        held_out.losses(parts, dataclasses.replace(mixture, fatal=True), measure)


def test_what_no_batch_has_room_for_is_told_once(folder, caplog):
    """It is answered, and so would be measured otherwise than the rest without a word."""
    rows = [conversation("no"), conversation("no " * 300), conversation("no " * 200)]
    parts = [kept(rows, "roomy")]
    mixture = Mixture(parts=(parts[0].part,), processor=folder, buckets=(BUCKET,))

    class One:
        def means(self):
            return {"loss": 2.0}

    for _ in range(2):
        assert held_out.losses(parts, mixture, lambda batch: One()) == {"loss": 2.0}
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.startswith("left out: roomy: 2 too long, the last: row 2: too long: fits no bucket")
