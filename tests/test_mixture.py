"""The order of samples is a function of the seed; nothing is lost, and nothing in silence."""

import dataclasses
import json
import multiprocessing
import os
import re
import signal

import jax
import numpy as np
import pytest
import soundfile
import words
from jax.experimental import multihost_utils

pytest.importorskip("grain")

from qwen2audio_jax import mel
from qwen2audio_jax.data import workers
from qwen2audio_jax.data.chats import from_messages, from_preference
from qwen2audio_jax.data.example import BadSample
from qwen2audio_jax.data.feeds import Feeds
from qwen2audio_jax.data.instruction import Task
from qwen2audio_jax.data.mixture import Mixture, Part
from qwen2audio_jax.data.pack import Bucket, Sample
from qwen2audio_jax.data.sources import open_source
from qwen2audio_jax.processor import Processor

TASK = Task.parse("[AUDIO:audio] What is that sound? -> [TEXT:text]")
SHORT = Bucket(rows=2, tokens=90, clips=5, frames=60)
LONG = Bucket(rows=2, tokens=160, clips=4, frames=110)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    return str(words.made_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def clips(tmp_path_factory, chirp) -> list[dict]:
    """Twelve clips of 0.2 to 1 s; one that is not there, one that is no sound, one without text."""
    folder = tmp_path_factory.mktemp("clips")
    for i in range(12):
        soundfile.write(folder / f"{i}.wav", chirp(0.2 + 0.07 * i, i), 16_000)
    (folder / "noise.wav").write_bytes(b"no sound at all")
    rows = [{"audio": str(folder / f"{i}.wav"), "text": f"yes {i}"} for i in range(12)]
    rows.insert(3, {"audio": str(folder / "absent.wav"), "text": "yes"})
    rows.insert(7, {"audio": str(folder / "noise.wav"), "text": "yes"})
    rows.insert(9, {"audio": rows[0]["audio"], "text": " "})
    return rows


def text_only(record, processor):
    """Compiles {"n": number} to an answer that tells it."""
    messages = [
        {"role": "user", "content": "no"},
        {"role": "assistant", "content": f"{record['n']}"},
    ]
    return from_messages({"messages": messages}, processor)


def numbers(count, start=0):
    return [{"n": n} for n in range(start, start + count)]


def told(batch, tokenizer) -> list[int]:
    """The numbers that a batch of `text_only` teaches, in order."""
    processor = Processor.from_pretrained(tokenizer)
    segments = batch["segment_ids"].reshape(-1, batch["segment_ids"].shape[-1])
    labels = batch["labels"].reshape(segments.shape)
    found = []
    for row, ids in zip(labels, segments, strict=True):
        for number in range(1, ids.max(initial=0) + 1):
            found.append(int(processor.decode(row[(ids == number) & (row >= 0)])[0]))
    return found


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def take(batches, count):
    return [next(batches) for _ in range(count)]


def test_interrupted_is_uninterrupted(tokenizer, clips):
    """Packed, augmented, in two shapes: from a state on, also in other processes, the same bits.

    The counts go on too; and slots are as many as states, however augmentation stretched a clip.
    """
    chats = [
        {
            "messages": [
                {"role": "user", "content": "no"},
                {"role": "assistant", "content": f"yes {i}"},
            ]
        }
        for i in range(5)
    ]
    hear = Part(
        name="hear", source=clips, compile=TASK.compile, weight=0.8, augmented=0.6, masked=0.5
    )
    chat = Part(name="chat", source=chats, compile=from_messages, weight=0.2)
    mixture = Mixture(parts=(hear, chat), processor=tokenizer, buckets=(SHORT, LONG), seed=5)
    whole = iter(mixture)
    expected, counts = take(whole, 14), whole.counts
    whole.close()
    assert {batch["input_ids"].shape[1] for batch in expected} == {90, 160}
    audio_id = Processor.from_pretrained(tokenizer).tokenizer.audio_id
    for batch in expected:
        slots = (batch["input_ids"] == audio_id).sum()
        assert mel.audio_tokens(batch["feature_attention_mask"].sum(axis=1)).sum() == slots

    first = iter(mixture)
    assert all(map(same, take(first, 5), expected[:5]))
    state = json.loads(json.dumps(first.get_state()))
    first.close()

    second = iter(Mixture(**{**vars(mixture), "workers": 2}))
    second.set_state(state)
    assert all(map(same, take(second, 4), expected[5:9]))
    state = json.loads(json.dumps(second.get_state()))
    second.close()

    third = iter(mixture)
    third.set_state(state)
    assert all(map(same, take(third, 5), expected[9:]))
    assert third.counts == counts and "missing audio" in counts["hear"]["bad"]
    third.close()


def test_bad_samples_are_counted_by_reason(tokenizer, clips):
    """All good ones are given, all others told; `fatal` ends at the first."""
    part = Part(name="hear", source=clips, compile=TASK.compile)
    small = Bucket(rows=2, tokens=90, clips=5, frames=90)  # the longest two clips do not fit
    mixture = Mixture(parts=(part,), processor=tokenizer, buckets=(small,), epochs=1)
    batches = iter(mixture)
    batches_given = list(batches)
    learned = lambda batch: sum(
        len(set(segments[labels >= 0].tolist()))
        for segments, labels in zip(batch["segment_ids"], batch["labels"], strict=True)
    )
    counts = batches.counts["hear"]
    reasons = {reason: count for reason, (count, _) in counts["bad"].items()}
    assert reasons == {"missing audio": 1, "corrupt audio": 1, "empty text": 1, "too long": 2}
    assert counts["samples"] == sum(map(learned, batches_given)) == 10
    report = batches.report()
    assert re.search(rf"hear +10 100.00% +{15 / len(clips):.2f} ", report)
    assert "1 missing audio, the last: row 3" in report and "absent.wav" in report
    batches.close()
    fatal = iter(Mixture(**{**vars(mixture), "fatal": True}))
    with pytest.raises(ValueError, match="part 'hear': "):
        list(fatal)
    fatal.close()


def test_rows_of_any_kind_are_counted(tokenizer):
    """Of no fields, with a reference's figures that are none, or with what nobody foresaw."""
    pair = {"messages": [{"role": "user", "content": "no"}], "chosen": "yes", "rejected": "no"}
    strange = {**pair, "chosen": {"role": "assistant", "content": 5}}
    figures = lambda a, b: pair | {"ref_chosen_logps": a, "ref_rejected_logps": b}
    rows = [figures(-1, -2), [1], None, figures("x", -1), figures(float("nan"), -1), strange]

    def compile(record, processor):
        return record.absent if record is strange else from_preference(record, processor)

    part = Part(name="n", source=rows, compile=compile)
    mixture = Mixture(
        parts=(part,), processor=tokenizer, buckets=(SHORT,), epochs=1, references=True
    )
    batches = iter(mixture)
    assert len(list(batches)) == 1
    reasons = {name: count for name, (count, _) in batches.counts["n"]["bad"].items()}
    assert reasons == {"bad row": 2, "no reference": 2, "unforeseen": 1}
    batches.close()


def test_a_row_without_a_reference_is_counted_where_one_is_wanted(tokenizer):
    """Whichever comes first; where none is wanted, nobody looks at the figures."""
    pair = {"messages": [{"role": "user", "content": "no"}], "chosen": "yes", "rejected": "no"}
    known = pair | {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}
    part = Part(name="n", source=[pair, known, known], compile=from_preference)
    how = {"parts": (part,), "processor": tokenizer, "buckets": (SHORT,), "shuffle": False}
    for references, bad in ((True, {"no reference": 1}), (False, {})):
        batches = iter(Mixture(**how, epochs=1, references=references))
        assert all(("ref_chosen_logps" in batch) == references for batch in batches)
        counts = batches.counts["n"]
        assert {reason: count for reason, (count, _) in counts["bad"].items()} == bad
        assert counts["samples"] == 3 - len(bad)
        batches.close()


def test_a_worker_that_is_killed_is_said_in_one_line(tokenizer):
    """As by a system that is out of memory."""
    part = Part(name="n", source=numbers(50), compile=text_only)
    batches = iter(Mixture(parts=(part,), processor=tokenizer, buckets=(SHORT,), workers=1))
    next(batches)
    for child in multiprocessing.active_children():
        if child.name.startswith("grain"):
            child.kill()
    with pytest.raises(ChildProcessError, match=r"killed .*: wanted fewer --data.workers, got 1"):
        take(batches, 1000)
    batches.close()


def test_workers_leave_sigterm_to_the_trainer(tokenizer):
    """It comes to all processes of a job; the trainer goes on to a step that others agree on.
    Whoever has to end a worker, as multiprocessing at exit, kills it."""
    part = Part(name="n", source=numbers(50), compile=text_only)
    how = {"parts": (part,), "processor": tokenizer, "buckets": (SHORT,), "epochs": 1}
    batches, plain = iter(Mixture(**how, workers=1)), iter(Mixture(**how))
    assert same(next(batches), next(plain))
    [child] = (each for each in multiprocessing.active_children() if "grain" in each.name)
    os.kill(child.pid, signal.SIGTERM)
    assert all(same(*both) for both in zip(batches, plain, strict=True))
    batches.close()
    plain.close()
    batches = iter(Mixture(**how, workers=1))
    next(batches)
    [child] = (each for each in multiprocessing.active_children() if "grain" in each.name)
    workers._end_those_left()
    child.join(10)
    assert child.exitcode == -signal.SIGKILL
    batches.close()


@pytest.mark.parametrize(
    ("workers", "shares"), [(5, [2, 1, 1, 1]), (4, [1] * 4), (2, [1] * 4), (0, [0] * 4)]
)
def test_feeds_share_a_process_s_workers(tokenizer, workers, shares, monkeypatch):
    """None of them is without, if there are any; what comes is the same."""
    grain = pytest.importorskip("grain")
    made, options = [], grain.MultiprocessingOptions
    counted = lambda count, **how: made.append(count) or options(0, **how)  # in threads
    monkeypatch.setattr(grain, "MultiprocessingOptions", counted)
    part = Part(name="n", source=numbers(50), compile=text_only)
    how = {"parts": (part,), "processor": tokenizer, "buckets": (SHORT,), "hosts": 8}
    feeds, plain = Feeds(Mixture(**how, workers=workers), 1, 2), Feeds(Mixture(**how), 1, 2)
    assert all(same(next(feeds), next(plain)) for _ in range(2))
    feeds.close()
    plain.close()
    assert sorted(made) == sorted([*shares, 0, 0, 0, 0])


@pytest.mark.slow
def test_workers_that_are_killed_are_all_told_of(tokenizer):
    part = Part(name="n", source=numbers(50), compile=text_only)
    how = {"parts": (part,), "processor": tokenizer, "buckets": (SHORT,), "hosts": 2, "workers": 1}
    feeds = Feeds(Mixture(**how))
    next(feeds)
    children = [each for each in multiprocessing.active_children() if "grain" in each.name]
    assert len(children) == 2
    for child in children:
        child.kill()
    with pytest.raises(ChildProcessError, match=r"got 1, which are 2 processes for 2 feeds$"):
        take(feeds, 1000)
    feeds.close()


def test_only_what_is_no_samples_fault_ends_a_run(tokenizer, tmp_path):
    """Whatever else is raised is counted, whoever's type it is, under the line it stands in."""

    class Refused(Exception):
        """As gcsfs and protobuf have their own."""

    errors = (RuntimeError("cut"), Refused("503"), StopIteration(), ImportError("x"), MemoryError())
    (tmp_path / "rows.jsonl").write_text('\n{"n": 0}\n\n{"n": 1}\n{"n": 2}\n{"n": 3}\n{"n": 4}')

    def fail(record, processor):
        raise errors[record["n"]]

    part = Part(name="n", source=open_source(tmp_path / "rows.jsonl"), compile=fail)
    mixture = Mixture(parts=(part,), processor=tokenizer, buckets=(SHORT,), shuffle=False)
    samples = mixture.samples()
    bad = [samples[i] for i in range(3)]
    assert [(each.reason, each.message) for each in bad] == [
        ("unforeseen", "line 2 of rows.jsonl: RuntimeError: cut"),
        ("unforeseen", "line 4 of rows.jsonl: Refused: 503"),
        ("unforeseen", "line 5 of rows.jsonl: StopIteration: "),
    ]
    for i in (3, 4):
        with pytest.raises(type(errors[i])):
            samples[i]


def test_clips_keep_the_time_that_texts_tell(tokenizer, clips):
    """In answers and in questions, of conversations and of pairs: at another speed it is untrue."""
    times, pair = "<|0.10|>yes<|0.20|>", {"chosen": "yes", "rejected": "no"}
    kept, free = (True, np.True_, 1, np.int64(1)), (False, None, np.False_, 0)
    ask = lambda text: [{"role": "user", "content": [{"audio": clips[5]["audio"]}, {"text": text}]}]
    answer = lambda text: [{"role": "assistant", "content": text}]
    rows = [
        clips[5] | {"text": times},
        clips[5],
        {"messages": ask("What?") + answer("<|0|>")},
        {"messages": ask("What?") + answer("<|en|>yes")},
        {"messages": ask("no<|0.5|>")} | pair,
        {"messages": ask("What?")} | pair,
        {"messages": ask("What?")} | pair | {"rejected": times},
        *(clips[5] | {"timed": each} for each in (*kept, *free)),
    ]

    def valid(row):
        compile = TASK.compile if "text" in row else from_messages
        compile = from_preference if "chosen" in row else compile
        part = Part(name="n", source=[row], compile=compile, augmented=1.0)
        samples = Mixture(parts=(part,), processor=tokenizer, buckets=(LONG,)).samples()
        return {samples[i].valid for i in range(8)}

    found = [len(valid(row)) for row in rows]
    assert [count == 1 for count in found[:7]] == [True, False, True, False, True, False, True]
    # as a row says of itself
    assert [count == 1 for count in found[7:]] == [True] * len(kept) + [False] * len(free)


@pytest.mark.parametrize("timed", ["yes", 2, float("nan"), [True]], ids=repr)
def test_whether_a_clip_keeps_its_time_is_said_in_no_other_way(tokenizer, clips, timed):
    """Where clips may be changed, who says it in vain hears of it."""
    row = clips[5] | {"timed": timed}
    for augmented in (0.0, 0.1):
        part = Part(name="n", source=[row], compile=TASK.compile, augmented=augmented)
        mixture = Mixture(parts=(part,), processor=tokenizer, buckets=(LONG,))
        made = mixture.samples()[0]
        if augmented:
            assert made.reason == "bad row" and "'timed': wanted true or false" in made.message
        else:
            assert isinstance(made, Sample)


def unusable(record, processor):
    raise BadSample("empty text", "nothing is said")


def test_no_night_is_spent_on_nothing(tokenizer, monkeypatch):
    """A mixture without a single usable sample says so, once through or for ever."""
    monkeypatch.setattr("qwen2audio_jax.data.batches.HOPELESS", 50)
    part = Part(name="mute", source=numbers(7), compile=unusable)
    mixture = Mixture(parts=(part,), processor=tokenizer, buckets=(SHORT,))
    for epochs, message in ((1, "none of 7 samples can be used"), (None, "50 samples in a row")):
        batches = iter(Mixture(**{**vars(mixture), "epochs": epochs}))
        with pytest.raises(ValueError, match=f"{message}.*nothing is said"):
            next(batches)
        batches.close()


def test_what_ends_is_read_to_its_end(tokenizer, monkeypatch):
    """However many are bad in a row, as where a folder of clips is gone."""
    monkeypatch.setattr("qwen2audio_jax.data.batches.HOPELESS", 5)
    late = lambda record, made: (text_only if record["n"] >= 20 else unusable)(record, made)
    part = Part(name="late", source=numbers(23), compile=late)
    mixture = Mixture(parts=(part,), processor=tokenizer, buckets=(SHORT,), epochs=1, shuffle=False)
    assert told_by(tokenizer, mixture) == [20, 21, 22]


def told_by(tokenizer, mixture, count=None):
    batches = iter(mixture)
    made = list(batches) if count is None else take(batches, count)
    batches.close()
    return [number for batch in made for number in told(batch, tokenizer)]


def test_an_epoch_is_every_sample_once(tokenizer):
    """In an order of the seed's, another one in each epoch; as written without shuffling."""
    part = Part(name="n", source=numbers(20), compile=text_only)
    bucket = Bucket(rows=4, tokens=60, clips=0, frames=0)
    mixture = Mixture(parts=(part,), processor=tokenizer, buckets=(bucket,), epochs=2, pack=False)
    flat = lambda **more: told_by(tokenizer, Mixture(**{**vars(mixture), **more}))
    order = flat()
    assert sorted(order[:20]) == sorted(order[20:]) == list(range(20))
    assert order[:20] != order[20:] and order != flat(seed=1) and order == flat()
    assert flat(shuffle=False, epochs=1) == list(range(20))
    assert sorted(flat(pack=True, accumulate=2)) == sorted(order)


def test_weights_are_kept_and_measured(tokenizer):
    """Of three parts with weights 5, 3 and 2; a part's own order heeds no other part."""
    parts = [
        Part(name=name, source=numbers(50, 100 * i), compile=text_only, weight=weight)
        for i, (name, weight) in enumerate((("a", 5.0), ("b", 3.0), ("c", 2.0)))
    ]
    bucket = Bucket(rows=10, tokens=60, clips=0, frames=0)
    make = lambda *parts: Mixture(parts=parts, processor=tokenizer, buckets=(bucket,), pack=False)
    batches = iter(make(*parts))
    order = [number for batch in take(batches, 20) for number in told(batch, tokenizer)]
    measured = {name: count["samples"] / 200 for name, count in batches.counts.items()}
    assert measured == pytest.approx({"a": 0.5, "b": 0.3, "c": 0.2}, abs=0.01)
    batches.close()
    alone = told_by(tokenizer, make(parts[1]), 4)
    assert [n for n in order if 100 <= n < 200][:40] == alone


def test_hosts_keep_step(tokenizer):
    """Each has samples of its own, and at every step a batch of the other's shape."""
    long = "yes " * 30
    rows = [{"n": f"{n}" if n % 3 else f"{n} {long}"} for n in range(60)]

    def compile(record, processor):
        return text_only(record, processor)

    part = Part(name="n", source=rows, compile=compile)
    small = Bucket(rows=3, tokens=60, clips=0, frames=0, weight=2.0)
    large = Bucket(rows=3, tokens=200, clips=0, frames=0, weight=1.0)
    mixture = Mixture(
        parts=(part,), processor=tokenizer, buckets=(small, large), pack=False, hosts=2
    )
    made = [take(iter(Mixture(**{**vars(mixture), "host": host})), 8) for host in (0, 1)]
    shapes = [[batch["input_ids"].shape for batch in each] for each in made]
    assert shapes[0] == shapes[1] and len(set(shapes[0])) == 2
    given = [
        {row.tobytes() for batch in each for row in batch["labels"] if (row >= 0).any()}
        for each in made
    ]
    assert len(given[0]) > 15 and not given[0] & given[1]


def test_buckets_have_their_turn_as_often_as_samples_need_them(tokenizer):
    """Of two hosts: what one sample in twenty needs comes rarely, and hardly anything is empty."""
    long = "yes " * 30
    rows = [{"n": f"{n}" if n % 20 else f"{n} {long}"} for n in range(200)]
    part = Part(name="n", source=rows, compile=text_only)
    sizes = ((4, 60), (4, 200), (4, 400))
    buckets = tuple(Bucket(rows=r, tokens=t, clips=0, frames=0) for r, t in sizes)
    mixture = Mixture(parts=(part,), processor=tokenizer, buckets=buckets, pack=False, hosts=2)
    weights = [bucket.weight for bucket in mixture.weighted().buckets]
    assert weights[2] < weights[1] < weights[0] / 10
    made = take(iter(mixture), 30)
    assert sum((batch["labels"] < 0).all() for batch in made) <= 1


def measured(tokenizer, *unreadable):
    """Of two hosts, with buckets whose weights the first samples tell, as far as they are read."""
    rows = [{"n": n} for n in range(30)]

    def compile(record, processor):
        if record["n"] in unreadable:
            raise BadSample("missing audio", "503")
        return text_only({"n": "yes " * 30 * (record["n"] % 2) + "no"}, processor)

    sizes = ((4, 60), (4, 200))
    buckets = tuple(Bucket(rows=r, tokens=t, clips=0, frames=0) for r, t in sizes)
    part = Part(name="n", source=rows, compile=compile)
    return Mixture(parts=(part,), processor=tokenizer, buckets=buckets, pack=False, hosts=2)


def weights_of(mixture):
    return [bucket.weight for bucket in mixture.buckets]


def test_one_process_measures_for_all(tokenizer, monkeypatch):
    """Whatever another cannot read, all come to the same buckets."""
    wanted = weights_of(measured(tokenizer).weighted())
    assert wanted != weights_of(measured(tokenizer, 1, 3).weighted())
    nobody = measured(tokenizer, *range(30))
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    told = lambda own: np.array(wanted, np.float32)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", told)
    assert weights_of(nobody.weighted()) == wanted


def test_a_run_goes_on_with_the_weights_that_it_began_with(tokenizer):
    """Also where a sample that they were measured with cannot be read now; given ones count."""
    whole, again = Feeds(measured(tokenizer)), Feeds(measured(tokenizer, 29))
    assert weights_of(whole.mixture) != weights_of(again.mixture)
    next(whole)
    states = json.loads(json.dumps(whole.get_state()))
    again.set_state(states)
    assert again.get_state()["1"]["mixture"] == states["1"]["mixture"]
    shapes = [[next(feeds)["input_ids"].shape for _ in range(20)] for feeds in (whole, again)]
    assert shapes[0] == shapes[1] and len(set(shapes[0])) == 2
    given = [dataclasses.replace(b, weight=1.0) for b in measured(tokenizer).buckets]
    other = Feeds(dataclasses.replace(measured(tokenizer), buckets=tuple(given)))
    with pytest.raises(ValueError, match="cannot resume: buckets was"):
        other.set_state(states)
    for each in (whole, again, other):
        each.close()


def test_feeds_are_dealt_to_however_many_processes(tokenizer):
    """Two processes' rows, one below the other, are those of one; so are states taken midway."""
    part = Part(name="n", source=numbers(50), compile=text_only)
    mixture = Mixture(parts=(part,), processor=tokenizer, buckets=(SHORT,), hosts=2)
    alone, pair = Feeds(mixture), [Feeds(mixture, number, 2) for number in (0, 1)]
    for _ in range(3):
        wanted, parts = next(alone), [next(feeds) for feeds in pair]
        for name, x in wanted.items():
            np.testing.assert_array_equal(x, np.concatenate([part[name] for part in parts]))
    passes = alone.passes()["n"]
    assert passes == sum(count["samples"] for count in alone.counts.values()) / 50 > 0
    assert sum(feeds.passes()["n"] for feeds in pair) / 2 == pytest.approx(passes)
    states = {k: v for feeds in pair for k, v in feeds.get_state().items()}
    again = Feeds(mixture)
    again.set_state(json.loads(json.dumps(states)))
    np.testing.assert_array_equal(next(again)["input_ids"], next(alone)["input_ids"])
    with pytest.raises(ValueError, match=r"wanted the state of feed 1 .*, got those of 0"):
        Feeds(mixture).set_state({"0": states["0"]})
    with pytest.raises(ValueError, match="divides the 2 feeds of the data, got 3"):
        Feeds(mixture, 0, 3)
    for each in (alone, again, *pair):
        each.close()


def test_pairs_are_drawn_from_preferences(tokenizer, clips):
    """Chosen and rejected over one set of clips, with the reference's figures where they are."""
    rows = [
        {
            "messages": [{"role": "user", "content": [{"type": "audio", "audio": clip["audio"]}]}],
            "chosen": "yes",
            "rejected": "no",
            "ref_chosen_logps": -1.5,
            "ref_rejected_logps": -2.5,
        }
        for clip in clips[:3]
    ]
    part = Part(name="prefer", source=rows, compile=from_preference)
    mixture = Mixture(
        parts=(part,),
        processor=tokenizer,
        buckets=(LONG,),
        epochs=1,
        shuffle=False,
        references=True,
    )
    batches = iter(mixture)
    one, two = list(batches)
    batches.close()
    assert one["rows"].tolist() == [0, 1] and two["rows"].tolist() == [2, -1]
    assert one["ref_rejected_logps"].tolist() == [-2.5, -2.5]
    processor = Processor.from_pretrained(tokenizer)
    assert processor.decode(one["chosen_labels"][:1])[0].strip() == "yes"
    assert processor.decode(one["rejected_labels"][:1])[0].strip() == "no"


def test_a_run_goes_on_without_what_is_gone(tokenizer, clips, monkeypatch):
    """Of the samples that wait for the rest of their batch, one can no longer be read and one has
    become longer: both are counted, and the others come as they would have."""
    rows = [dict(row) for row in clips if row["text"].startswith("yes ")]
    part = Part(name="hear", source=rows, compile=TASK.compile)
    buckets = [dataclasses.replace(bucket, rows=8) for bucket in (SHORT, LONG)]
    mixture = Mixture(parts=(part,), processor=tokenizer, buckets=tuple(buckets), seed=5)
    whole = iter(mixture)
    next(whole)
    state, waits = whole.get_state(), [0, 0]
    while min(waits) < 2:
        next(whole)
        state = json.loads(json.dumps(whole.get_state()))
        waits = [sum(map(len, groups)) for groups in state["waiting"]]
    whole.close()
    samples = mixture.samples()
    gone, changed = (samples[state["waiting"][bucket][0][0]] for bucket in (1, 0))
    rows[gone.row] = {**rows[gone.row], "audio": "nowhere.wav"}
    rows[changed.row] = {**rows[changed.row], "audio": clips[-1]["audio"]}
    again = iter(mixture)
    again.set_state(state)
    bad = again.counts["hear"]["bad"]
    assert bad["missing audio"][0] >= 1 and bad["changed"][0] >= 1
    assert "has another length than when it waited" in bad["changed"][1]
    left = [sum(map(len, groups)) for groups in again.get_state()["waiting"]]
    assert sum(left) == sum(waits) - bad["missing audio"][0] - bad["changed"][0]
    next(again)
    again.close()
    fatal = iter(dataclasses.replace(mixture, fatal=True))
    with pytest.raises(ValueError, match=r"part .hear.: row .*: it has another length"):
        fatal.set_state({**state, "mixture": fatal.get_state()["mixture"]})
    fatal.close()


def test_another_mixture_s_state_is_refused(tokenizer):
    """The message names what differs."""
    part = Part(name="n", source=numbers(5), compile=text_only)
    mixture = Mixture(parts=(part,), processor=tokenizer, buckets=(SHORT,))
    state = iter(mixture).get_state()
    with pytest.raises(ValueError, match="cannot resume: seed was 0, is 1"):
        iter(Mixture(**{**vars(mixture), "seed": 1})).set_state(state)
    grown = Part(name="n", source=numbers(6), compile=text_only)
    told = "cannot resume: n had rows 5, has 6: wanted the same, or another --out that begins with"
    with pytest.raises(ValueError, match=told):
        iter(Mixture(**{**vars(mixture), "parts": (grown,)})).set_state(state)
    other = Mixture(**{**vars(mixture), "parts": (dataclasses.replace(grown, name="m"),)})
    with pytest.raises(ValueError, match=r"cannot resume: parts was .*5.* is .*6"):
        iter(other).set_state(state)
    half = (SHORT, dataclasses.replace(LONG, weight=3.0))
    with pytest.raises(ValueError, match=r"each of the buckets or for none, got .* 2x160,4x110@3"):
        Mixture(**{**vars(mixture), "buckets": half})
    with pytest.raises(ValueError, match="one part on one host"):
        Mixture(**{**vars(mixture), "epochs": 1, "hosts": 2})


def test_real_digits(tokenizer, shared_data):
    """The recorded digits make whole batches, none of them bad."""
    source = open_source(f"{shared_data / 'fsdd' / 'manifest.jsonl'}:test")
    part = Part(name="digits", source=source, compile=TASK.compile)
    bucket = Bucket(rows=4, tokens=160, clips=24, frames=130)
    batches = iter(Mixture(parts=(part,), processor=tokenizer, buckets=(bucket,)))
    made = take(batches, 3)
    assert not batches.counts["digits"]["bad"]
    assert all(batch["segment_ids"].max() > 1 for batch in made)
    batches.close()
