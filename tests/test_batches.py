"""Batches are full, whatever lengths there are; and nothing that was drawn waits for ever."""

import dataclasses
import json
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("grain")

from qwen2audio_jax.data import batches, reading
from qwen2audio_jax.data.chats import from_messages
from qwen2audio_jax.data.mixture import Mixture, Part
from qwen2audio_jax.data.pack import Bucket, Group, Sample, Text

# As a pod's, but small: as much sound a batch, in many short clips or in few long ones.
SIZES = ((24, 104), (12, 204), (4, 604))
BUCKETS = tuple(Bucket(rows=2, tokens=400, clips=clips, frames=t) for clips, t in SIZES)
VALID = ((20, 100), (110, 200), (210, 600))  # frames of clips that belong there


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Samples without sound, of which each bucket has its part."""

    parts: tuple[float, ...]
    host: int

    def __getitem__(self, key: int) -> Sample:
        rng = np.random.default_rng((self.host, key))
        bucket = int(np.searchsorted(np.cumsum(self.parts), rng.random()))
        valid = int(rng.integers(*VALID[bucket]))
        ids = np.zeros(valid // 4 + int(rng.integers(3, 12)), np.int32)
        text = Text(ids=ids, learned=ids > 0)
        return Sample(
            texts=(text,),
            pictures=(np.zeros((1, 1), np.float32),),
            valid=(valid,),
            bucket=bucket,
            part="n",
        )


@pytest.fixture
def made(monkeypatch):
    """Makes an iterator of groups of samples as they are, rather than as arrays."""
    silent = SimpleNamespace(mels=1, tokenizer=SimpleNamespace(pad_id=0))
    monkeypatch.setattr(Mixture, "opened", lambda mixture: silent)
    itself = lambda group, kind, **_: {"group": np.array(group, object)}
    monkeypatch.setattr(Group, "arrays", itself)
    monkeypatch.setattr(batches._Groups, "_next_sample", lambda its: its._samples[its._position])

    def make(*parts: float, rows: int = 10**6, **how) -> batches._Groups:
        drawn = lambda mixture: Drawn(parts, mixture.host)
        monkeypatch.setattr(Mixture, "samples", drawn)
        source = (Part(name="n", source=range(rows), compile=from_messages),)
        mixture = Mixture(parts=source, processor="", buckets=BUCKETS, **how)
        return batches._Groups(mixture.weighted() if mixture.hosts > 1 else mixture, 0)

    return make


def take(groups: batches._Groups, count: int) -> Iterator[Group]:
    return (next(groups)["group"].item() for _ in range(count))


def fill(group: Group) -> float:
    clips = sum(len(each.pictures) for each in group.samples())
    return clips / group.bucket.clips / len(group.batches)


@pytest.mark.parametrize("long", [0.02, 0.003])
def test_batches_of_several_hosts_are_full(made, long):
    """However rare a length is: those of it have their turns, and nothing piles up meanwhile."""
    groups, fills, learned = made(0.8 - long, 0.2, long, hosts=2), [], 0
    for group in take(groups, 1500):
        fills.append(fill(group))
        learned += sum(each.bucket == 2 for each in group.samples())
        assert sum(map(len, groups._waiting)) < 12
    assert np.mean(fills) > 0.97 and min(fills) > 0.25
    drawn = groups.get_state()["position"]
    assert learned > 0.8 * long * drawn


def test_hosts_come_to_the_same_buckets(made):
    """Without a word to each other, whatever each has drawn, and also after another start."""
    ours, theirs = (made(0.7, 0.2, 0.1, hosts=2, host=host) for host in (0, 1))
    turns = [[group.bucket for group in take(groups, 60)] for groups in (ours, theirs)]
    assert turns[0] == turns[1] and len(set(turns[0])) == 3
    again = made(0.7, 0.2, 0.1, hosts=2, host=1)
    again.set_state(ours.get_state())
    assert [g.bucket for g in take(again, 9)] == [g.bucket for g in take(theirs, 9)]


@pytest.mark.parametrize(
    ("rows", "long", "accumulate", "steps"), [(500, 0.01, 4, 30), (10**6, 0.001, 1, 220)]
)
def test_what_is_rare_is_learned(made, rows, long, accumulate, steps):
    """In some passes over few samples, though one pass has too few long ones for a batch; of a
    million samples likewise, as nobody makes so many steps."""
    groups, learned, fills = made(1 - long, 0.0, long, rows=rows, accumulate=accumulate), 0, []
    for group in take(groups, steps):
        fills.append(fill(group))
        learned += sum(each.bucket == 2 for each in group.samples())
    state = groups.get_state()
    drawn = sum(groups._samples[key].bucket == 2 for key in range(state["position"]))
    assert learned > 0.4 * drawn > 1, (learned, drawn)
    assert np.mean(fills) > 0.97
    told = state["counts"]["n"]
    assert told["samples"] + told["waiting"] == state["position"]
    assert batches.report(state["counts"], {"n": rows}).endswith(f" {told['waiting']}")


@pytest.mark.parametrize("hosts", [1, 2])
def test_groups_that_were_filled_up_go_on(made, hosts):
    """From each state on the same samples come, in the same places."""
    make = lambda: made(0.92, 0.07, 0.01, rows=200, hosts=hosts)
    places = lambda group: [[[s.valid for s in row] for row in rows] for rows in group.batches]
    whole, states, given = make(), [], []
    for _ in range(60):
        states.append(json.dumps(whole.get_state()))
        (group,) = take(whole, 1)
        given.append((group.bucket, group.keys, places(group)))
    foreign = lambda g: {whole._samples[key].bucket for key in g[1]} != {BUCKETS.index(g[0])}
    if hosts == 1:  # on several, buckets have weights
        assert any(map(foreign, given))
    for start in range(0, 60, 7):
        again = make()
        again.set_state(json.loads(states[start]))
        assert again.get_state() == json.loads(states[start])
        wanted = given[start : start + 9]
        assert [(g.bucket, g.keys, places(g)) for g in take(again, len(wanted))] == wanted


def test_clips_that_ctc_leaves_out_are_counted(made, monkeypatch):
    """And told, where it is learned at all."""
    monkeypatch.setattr(Sample, "unspelt", 1)
    for words in (True, False):
        groups = made(1.0, 0.0, 0.0, words=words)
        (group,) = take(groups, 1)
        counts = groups.get_state()["counts"]
        line = f"n: {len(group.keys)} clips are not in ctc"
        assert (line in batches.report(counts, {"n": 9})) == words


def test_what_takes_long_to_read_is_shown(monkeypatch, capsys):
    """In the order that was asked for; what is quick says nothing."""
    assert list(reading.each("abc", [2, 0, 1], "reading")) == ["c", "a", "b"]
    assert not capsys.readouterr().err
    monkeypatch.setattr(reading, "LONG", -1.0)
    assert list(reading.each("abc", [2, 0, 1], "reading")) == ["c", "a", "b"]
    assert "reading: 3/3 samples" in capsys.readouterr().err


def test_of_many_keys_few_are_taken_up_at_a_time():
    """A million would fill memory before the first sample came."""
    taken = []

    class Keys(list):
        def __iter__(self):
            for key in super().__iter__():
                taken.append(key)
                yield key

    read = reading.each(range(1000), Keys(range(1000)), "reading")
    assert next(read) == 0 and len(taken) <= reading.AHEAD
    assert [*read] == [*range(1, 1000)]
