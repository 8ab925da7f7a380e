"""The loop trains once a batch, keeps a history, and an interrupted run ends with the same bits."""

import contextlib
import dataclasses
import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
from flax import nnx

from qwen2audio_jax import Qwen2Audio, sharding
from qwen2audio_jax.training import hosts, loop
from qwen2audio_jax.training import log as logs
from qwen2audio_jax.training import loss as losses
from qwen2audio_jax.training.checkpoint import Checkpoints
from qwen2audio_jax.training.learner import Learner
from qwen2audio_jax.training.log import Log
from qwen2audio_jax.training.meter import Meter
from qwen2audio_jax.training.optimizer import OptimizerConfig
from qwen2audio_jax.training.settings import LoopConfig, Lora

STEPS = 5
SPARSE = {"save_every": 100, "evaluate_every": 100}


class Counted:
    """Batches that differ, and know where they are; one of them may bring a signal."""

    def __init__(self, signal_at=None, parts=1):
        self.number, self.signal_at, self.parts = 0, signal_at, parts

    def __iter__(self):
        return self

    def __next__(self):
        self.number += 1
        if self.number == self.signal_at:
            os.kill(os.getpid(), signal.SIGTERM)
        batch = small.inputs([9] * 8, total=16, length=6)
        batch["input_ids"][:, -1] = 10 + self.number
        batch["labels"] = np.where(batch["attention_mask"] == 1, batch["input_ids"], -100)
        if self.parts > 1:
            return {k: x.reshape(self.parts, -1, *x.shape[1:]) for k, x in batch.items()}
        return batch

    def get_state(self):
        return {"0": self.number}

    def set_state(self, states):
        self.number = states["0"]


def learner(loss=losses.next_token, *, model=0, ema_decay=0.0, **how):
    """Of the model of some seed."""
    averaged = {"ema_decay": ema_decay}
    optimizer = OptimizerConfig(learning_rate=0.01, steps=STEPS, warmup_steps=1, **averaged)
    return Learner(Qwen2Audio(small.CONFIG, rngs=nnx.Rngs(model)), optimizer, loss, **how)


def test_every_batch_is_one_step_of_the_history():
    """The model moves, and each row says how fast and from where."""
    one, log = learner(), Log(None)
    before = np.asarray(one.model().projector.kernel[...]).copy()
    assert loop.train(one, Counted(), log=log) is None
    assert not np.array_equal(before, one.model().projector.kernel[...])
    assert [row["step"] for row in log.rows] == [1, 2, 3, 4, 5]
    wanted = {"loss", "accuracy", "tokens", "grad_norm", "skipped", "learning_rate", "seconds"}
    assert all(wanted <= set(row) for row in log.rows)
    assert {"tokens_per_second", "audio_seconds_per_second"} <= set(log.rows[-1])
    assert "mfu" not in log.rows[-1]  # nobody knows what a CPU could do
    rates = [0, 0.01, 0.01 * (1 + 0.5**0.5) / 2, 0.005]
    np.testing.assert_allclose([row["learning_rate"] for row in log.rows[:4]], rates, rtol=1e-5)
    assert log.rows[-1]["loss"] < log.rows[0]["loss"]


@pytest.mark.slow
def test_what_is_held_out_may_be_measured_before_the_first_step(tmp_path):
    """Once: a run that goes on does not measure its beginning again."""
    config = LoopConfig(save_every=100, evaluate_every=4, evaluate_first=True, best="accuracy")
    batches = Counted(signal_at=3)

    def go():
        evaluate = lambda: {"accuracy": float(batches.number)}
        with (
            contextlib.closing(Log(tmp_path)) as log,
            contextlib.closing(Checkpoints(tmp_path)) as checkpoints,
        ):
            how = {"log": log, "checkpoints": checkpoints, "evaluate": evaluate}
            return loop.train(learner(), batches, config, **how), log.rows

    assert go()[0] == signal.SIGTERM
    batches.signal_at = None
    ended, rows = go()
    assert ended is None
    seen = [(row["step"], row["eval/accuracy"]) for row in rows if "eval/accuracy" in row]
    assert seen == [(0, 0), (4, 4), (5, 5)]


class Few(Counted):
    """Of two parts, one of which has few rows."""

    def passes(self):
        return {"many": 0.01 * self.number, "few": 1.5 * self.number}


def test_how_often_rows_will_be_read_is_told_once(monkeypatch, capsys):
    """When some steps have shown it; nothing is told of rows that are read once at most."""
    monkeypatch.setattr(loop, "SETTLED", 2)
    loop.train(learner(), Few())
    assert capsys.readouterr().err.count(f"{STEPS} steps will read few about 7.5 times\n") == 1
    monkeypatch.setattr(Few, "passes", lambda self: {"many": 0.01 * self.number})
    loop.train(learner(), Few())
    assert "steps will read" not in capsys.readouterr().err


class Slow(Counted):
    """Batches that come long after the device has done with the one before."""

    def __next__(self):
        time.sleep(0.3)
        return super().__next__()


def test_a_device_that_waits_for_data_is_told_of():
    """Where batches are there at once it computes while the next one is put in line. Behind a
    checkpoint it has nothing to do until one comes; the first is told apart."""
    rows = {}
    for kind in (Slow, Counted):
        log = Log(None)
        loop.train(learner(), kind(), LoopConfig(**{**SPARSE, "save_every": 2}), log=log)
        rows[kind] = [row["waited"] for row in log.rows]
        slow = kind is Slow
        assert [0.3 <= row.get("first_batch", 0) < 3 for row in log.rows][:2] == [slow, False]
    assert len(rows[Slow]) > 3 and all(0.3 <= seconds < 3 for seconds in rows[Slow][1:])
    assert rows[Slow][0] == 0 and sum(rows[Counted]) < 0.3


def reference(model, batch, *, reference):
    """Of the model beside itself as it was, as in DPO."""
    sums, before = (losses.next_token(each, batch) for each in (model, reference))
    return sums.replace(loss=(sums.loss - before.loss) ** 2 + sums.loss)


WAYS = {
    "all": {},
    "average and reference": {"loss": reference, "reference": True, "ema_decay": 0.9},
    "adapters": {
        "adapters": Lora(r=2, lora_dropout=0.3, modules_to_save=("multi_modal_projector",)),
        "accumulate": 2,
    },
}


@pytest.mark.parametrize(
    "way",
    ["all", *(pytest.param(way, marks=pytest.mark.slow) for way in WAYS if way != "all")],
)
def test_a_run_that_was_ended_ends_with_the_same_bits(tmp_path, way):
    """SIGTERM saves; what goes on from there, dropout and moments too, is what would have been."""
    how = WAYS[way]
    parts = how.get("accumulate", 1)
    config = LoopConfig(**SPARSE)

    def run(folder, **stop):
        checkpoints, log = Checkpoints(folder), Log(folder)
        one = learner(**how)
        ended = loop.train(
            one, Counted(parts=parts, **stop), config, log=log, checkpoints=checkpoints
        )
        log.close()
        checkpoints.close()
        return ended, one, checkpoints.steps

    ended, whole, _ = run(tmp_path / "whole")
    assert ended is None
    ended, _, steps = run(tmp_path / "parts", signal_at=3)
    assert ended == signal.SIGTERM and steps == [3]
    with open(tmp_path / "parts" / logs.LOG, "a") as file:
        file.write('{"step": 4, "loss": 0.0}\n{"step": 5, "lo')  # of steps that were never saved
    ended, resumed, _ = run(tmp_path / "parts")
    assert ended is None

    jax.tree.map(np.testing.assert_array_equal, whole.state, resumed.state)
    rows = [logs.read(tmp_path / name / logs.LOG) for name in ("whole", "parts")]
    exact = [[(row["step"], row["loss"], row["grad_norm"]) for row in each] for each in rows]
    assert exact[0] == exact[1]


def test_a_signal_beside_the_last_checkpoint_waits_for_it(tmp_path, monkeypatch):
    """It is written behind the last step, and would be torn; all is done then, and told so."""
    save, wait, met = Checkpoints.save, Checkpoints.wait, []

    def saves(self, *args):
        save(self, *args)
        met.append("saving")

    def waits(self):
        if met == ["saving"]:
            met.append("a signal")
            os.kill(os.getpid(), signal.SIGTERM)
        wait(self)

    monkeypatch.setattr(Checkpoints, "save", saves)
    monkeypatch.setattr(Checkpoints, "wait", waits)
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        assert (
            loop.train(learner(), Counted(), LoopConfig(**SPARSE), checkpoints=checkpoints) is None
        )
        assert checkpoints.steps == [STEPS] and met == ["saving", "a signal"]


def test_moments_are_where_their_parameters_are():
    """Spread over devices as those are; what belongs to none is everywhere."""
    state = learner(mesh=sharding.mesh(data=4, fsdp=2)).state
    kernel = state.params["projector"]["kernel"].get_value()
    assert "fsdp" in kernel.sharding.spec
    alike = [x for x in jax.tree.leaves(state.opt_state) if x.shape == kernel.shape]
    assert len(alike) == 2 and all(x.sharding == kernel.sharding for x in alike)
    assert state.step.sharding.is_fully_replicated


@pytest.mark.slow
def test_a_projector_learns_whole_beside_adapters():
    """At its own rate, on a mesh, in a short arithmetic; what comes out has both, its base
    neither."""
    own = OptimizerConfig(
        learning_rate=0.0, decoder_learning_rate=1e-2, steps=STEPS, warmup_steps=1
    )
    own = dataclasses.replace(own, projector_learning_rate=1e-3)
    model = Qwen2Audio(small.EVEN, rngs=nnx.Rngs(0), dtype="bfloat16")
    how = {"mesh": sharding.mesh(data=4, fsdp=2), "dtype": "bfloat16"}
    adapters = Lora(r=2, modules_to_save=("multi_modal_projector",))
    one = Learner(model, own, losses.next_token, adapters=adapters, **how)
    before = jax.tree.map(np.asarray, one.state.params)
    assert "fsdp" in one.state.params["projector"]["kernel"].sharding.spec
    for number in range(2):
        one.step(next(Counted()), number)
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), before, one.state.params)
    assert 0 < moved["projector"]["kernel"] < 2e-3 < moved["decoder.blocks.mlp.up"]["lora_B"]
    assert before["projector"]["kernel"].dtype == np.float32
    merged = one.merged().projector.kernel[...]
    np.testing.assert_array_equal(
        merged, one.state.params["projector"]["kernel"].astype("bfloat16")
    )
    np.testing.assert_array_equal(one.base().projector.kernel[...], before["projector"]["kernel"])


def test_a_run_that_is_farther_than_its_last_step_is_refused(tmp_path):
    """Rather than called done, with a model of more steps than were asked for."""
    one = learner()
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        loop.save(one, Counted(), checkpoints, 9, Meter(one, LoopConfig(), Log(None), None, done=0))
        checkpoints.wait()
        told = f"is of 9 steps: wanted optimizer.steps of at least as many, got {STEPS}$"
        with pytest.raises(ValueError, match=told):
            loop.train(learner(), Counted(), LoopConfig(**SPARSE), checkpoints=checkpoints)


def test_what_comes_out_is_the_average_of_the_steps_there_were():
    """However slow it is; where it began is in it but as what a warm-up's first step leads to.
    Adapters' likewise."""
    for how in ({}, {"adapters": Lora(r=2)}):
        config = OptimizerConfig(learning_rate=0.01, steps=STEPS, warmup_steps=1, ema_decay=0.999)
        model = Qwen2Audio(small.CONFIG, rngs=nnx.Rngs(0))
        one, seen = Learner(model, config, losses.next_token, **how), []
        for number, batch in zip(range(3), Counted(), strict=False):
            one.step(batch, number)
            seen.append(jax.tree.map(np.asarray, one.state.params))
        mean = jax.tree.map(lambda *each: np.mean(each, axis=0), *seen)
        for a, b in zip(*map(jax.tree.leaves, (one.averaged(), mean)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_a_base_that_has_changed_is_refused(tmp_path):
    """Adapters of one model do not go on beside another."""
    adapted = {"adapters": Lora(r=2)}
    checkpoints = Checkpoints(tmp_path)
    one = learner(**adapted)
    loop.save(one, Counted(), checkpoints, 1, Meter(one, LoopConfig(), Log(None), None, done=0))
    checkpoints.wait()
    other = Qwen2Audio(small.CONFIG, rngs=nnx.Rngs(1))
    other = Learner(other, one.optimizer, losses.next_token, **adapted)
    with pytest.raises(ValueError, match="beside other parameters than --model has now"):
        loop.resume(other, Counted(), checkpoints)
    checkpoints.close()


def test_another_model_is_refused_though_all_of_it_trains(tmp_path):
    """What was drawn may be drawn otherwise, and adapters are told apart where they begin with
    some."""
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        one = learner()
        assert loop.resume(one, Counted(), checkpoints) == 0
        one.state = one.state.replace(params=jax.tree.map(jnp.negative, one.state.params))
        loop.save(one, Counted(), checkpoints, 1, Meter(one, LoopConfig(), Log(None), None, done=0))
        checkpoints.wait()
        with pytest.raises(ValueError, match="began with other parameters than --model has now"):
            loop.resume(learner(model=1), Counted(), checkpoints)
        assert loop.resume(learner(model=1, drawn=True), Counted(), checkpoints) == 1
    assert learner(adapters=Lora(r=2)).began is None
    some = learner(adapters=Lora(r=2)).state.params
    assert learner(adapters=Lora(r=2), start=some).began is not None


def test_what_is_drawn_is_no_part_of_a_reference():
    """New adapters, however wide, answer as their base; another base does not."""
    pytest.importorskip("grain")
    from qwen2audio_jax.training import reference

    narrow, wide = (reference._identity(learner(adapters=Lora(r=r))) for r in (2, 4))
    assert narrow == wide != reference._identity(learner(adapters=Lora(r=2), model=1))
    whole, other = (reference._identity(learner(model=n, drawn=True)) for n in (0, 1))
    assert whole != other  # which answer by what was drawn


@pytest.mark.parametrize(
    ("done", "window", "traced"),
    [(0, (2, 3), [2, 3]), (2, (2, 3), [3]), (3, (4, 9), [4, 5]), (3, (2, 3), []), (0, None, [])],
)
def test_what_is_left_of_a_profile_is_traced(monkeypatch, capsys, done, window, traced):
    """In a run that goes on behind its first step; one that is past is told of."""
    tracing, seen = [], []

    @contextlib.contextmanager
    def trace(folder):
        tracing.append(folder)
        yield
        tracing.clear()

    monkeypatch.setattr(loop, "_trace", trace)
    with Meter(learner(), LoopConfig(), Log(None), None, done=done) as meter:
        for number in loop._traced(range(done, STEPS), window, meter):
            seen += [number + 1] * len(tracing)
    assert seen == traced and not tracing
    told = "no profile: steps 2 to 3 are past, it goes on behind 3" in capsys.readouterr().err
    assert told == (window is not None and not traced)


def test_gradients_that_are_no_numbers_stop_the_training(tmp_path):
    """After some in a row, naming the step and the last good checkpoint, which stays the last."""

    def breaks(model, batch):
        broken = jnp.isin(batch["input_ids"][0, -1], jnp.array([12, 14, 15]))
        sums = losses.next_token(model, batch)
        return sums.replace(loss=sums.loss * jnp.where(broken, jnp.nan, 1.0))

    checkpoints = Checkpoints(tmp_path)
    config = LoopConfig(save_every=1, evaluate_every=100, bad_steps=2)
    log, one = Log(tmp_path), learner(breaks)
    own = {"encoder_learning_rate": 0.02, "decoder_learning_rate": 0.0}
    one.optimizer = dataclasses.replace(one.optimizer, **own)
    with pytest.raises(FloatingPointError) as caught:
        loop.train(one, Counted(), config, log=log, checkpoints=checkpoints)
    message = str(caught.value)
    assert "the loss is nan" in message and "at step 5, the 2. in a row" in message
    assert f"the last good checkpoint is {checkpoints.folder / '3'}, and --changing " in message
    assert "optimizer.learning_rate optimizer.encoder_learning_rate lets the run go on" in message
    assert checkpoints.steps == [1, 3]
    assert [row["skipped"] for row in log.rows] == [0, 1, 1, 2, 3]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(one.state.params))
    log.close()
    checkpoints.close()


def broken_at(*words):
    """The loss, and no number where a batch ends with one of these words: 11 is the first's."""

    def breaks(model, batch):
        sums = losses.next_token(model, batch)
        broken = jnp.isin(batch["input_ids"][0, -1], jnp.array(words))
        return sums.replace(loss=sums.loss * jnp.where(broken, jnp.nan, 1.0))

    return breaks


@pytest.mark.slow
def test_a_step_that_moved_nothing_loses_none_before_it(tmp_path, capsys):
    """A signal there saves, and so does the end; else the next step that moves is saved."""
    config, breaks = LoopConfig(save_every=3, evaluate_every=100), broken_at(13, 15)

    def run(name, **stop):
        with (
            contextlib.closing(Log(tmp_path / name)) as log,
            contextlib.closing(Checkpoints(tmp_path / name, keep=9)) as checkpoints,
        ):
            one, evaluate = learner(breaks), lambda: {"wer": 0.5}
            how = {"log": log, "checkpoints": checkpoints, "evaluate": evaluate}
            ended = loop.train(one, Counted(**stop), config, **how)
            return ended, one.state, checkpoints.steps, checkpoints.measured(STEPS)

    ended, whole, steps, measured = run("whole")
    assert ended is None and steps == [4, 5] and measured
    assert "step 3 moved nothing: the next one that does is saved" in capsys.readouterr().err
    ended, _, steps, _ = run("parts", signal_at=3)
    assert ended == signal.SIGTERM and steps == [3]
    ended, state, steps, measured = run("parts")
    assert ended is None and steps == [3, 5] and measured
    jax.tree.map(np.testing.assert_array_equal, whole, state)
    assert int(state.skipped) == 2


def test_the_log_has_the_rate_that_was_used(tmp_path):
    """A step that is skipped does not move the schedule, also where a run goes on behind it; parts
    with one of their own have theirs."""

    class Noting(Learner):
        def step(self, batch, number):
            counts = [x for _, x in optax.tree.get_all_with_path(self.state.opt_state, "count")]
            used.append(float(self.optimizer.schedule()(int(max(counts)))))
            return super().step(batch, number)

    used, own = [], {"encoder_learning_rate": 0.04, "decoder_learning_rate": 0.0}
    optimizer = OptimizerConfig(learning_rate=0.01, steps=STEPS, warmup_steps=1, **own)
    for signal_at in (3, None):
        model = Qwen2Audio(small.CONFIG, rngs=nnx.Rngs(0))
        with (
            contextlib.closing(Log(tmp_path)) as log,
            contextlib.closing(Checkpoints(tmp_path)) as checkpoints,
        ):
            batches = Counted(signal_at=signal_at)
            how = {"log": log, "checkpoints": checkpoints}
            one = Noting(model, optimizer, broken_at(12))
            loop.train(one, batches, LoopConfig(**SPARSE), **how)
    assert [row["skipped"] for row in log.rows] == [0, 1, 1, 1, 1]
    assert [row["learning_rate"] for row in log.rows] == used
    assert used[1] == used[2] > used[3] > used[4]
    np.testing.assert_allclose(
        [row["encoder_learning_rate"] for row in log.rows], 4 * np.array(used)
    )
    assert "decoder_learning_rate" not in log.rows[0] and used[1] > 0


class Dropping(Counted):
    """Batches that leave samples out, for a second reason from the third one on."""

    @property
    def counts(self):
        late = {"too long": [1, "row 8: 31 s"]} if self.number > 2 else {}
        return {"speech": {"bad": {"missing audio": [self.number, "row 7: gone"], **late}}}


def test_what_is_left_out_is_told_when_it_begins(capsys):
    """Once for each reason; the log counts."""
    log = Log(None)
    loop.train(learner(), Dropping(), log=log)
    told = capsys.readouterr().err
    assert told.count("speech: left out, missing audio: row 7: gone") == 1
    assert told.count("speech: left out, too long: row 8: 31 s") == 1
    assert [row["bad/missing audio"] for row in log.rows] == [1, 2, 3, 4, 5]
    assert [row.get("bad/too long") for row in log.rows] == [None, None, 1, 1, 1]


def test_what_other_hosts_leave_out_is_counted_too(monkeypatch, capsys):
    """From one checkpoint to the next as of the last one; then the row has what all met."""
    ours, theirs = ({"speech": {"bad": {"missing audio": [n, f"row {n}"]}}} for n in (2, 7))
    theirs["speech"]["bad"]["too long"] = [1, "row 8: 31 s"]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts, "gathered", lambda counts: [counts, theirs])
    one, log = learner(), Log(None)
    with Meter(one, LoopConfig(), log, None, done=0) as meter:
        for number in (1, 2, 3):
            batch = next(Counted())
            meter.add(number, batch, one.step(batch, number), ours)
            if number == 2:
                meter.settle(ours)
    assert [row["bad/missing audio"] for row in log.rows] == [2, 9, 9]
    assert [row.get("bad/too long") for row in log.rows] == [None, 1, 1]
    assert capsys.readouterr().err.count("speech: left out, too long: row 8: 31 s") == 1


class Killed(BaseException):
    """What no program survives."""


@pytest.mark.parametrize("killed", [pytest.param("in it", marks=pytest.mark.slow), "behind it"])
def test_a_step_is_saved_before_it_is_measured(tmp_path, killed):
    """What is killed meanwhile measures first when it goes on, and ends as if nothing had been."""
    config = LoopConfig(save_every=2, evaluate_every=2, keep=1)
    figures = {2: 0.1, 4: 0.5, 5: 0.3}

    def run(name, dies=False):
        folder, measured = tmp_path / name, []
        with (
            contextlib.closing(Log(folder)) as log,
            contextlib.closing(Checkpoints(folder, keep=1, best="wer")) as checkpoints,
        ):
            batches, one = Counted(), learner()

            def evaluate():
                checkpoints.wait()
                assert batches.number == checkpoints.steps[-1]
                measured.append(batches.number)
                if dies and killed == "in it":
                    raise Killed
                return {"wer": figures[batches.number]}

            def add_scores(step, scores):
                raise Killed

            if dies and killed == "behind it":
                checkpoints.add_scores = add_scores
            how = {"log": log, "checkpoints": checkpoints, "evaluate": evaluate}
            with pytest.raises(Killed) if dies else contextlib.nullcontext():
                loop.train(one, batches, config, **how)
            known = [(row["step"], row["eval/wer"]) for row in log.rows if "eval/wer" in row]
        return measured, one.state, (checkpoints.steps, checkpoints.best), known

    measured, whole, kept, known = run("whole")
    assert measured == [2, 4, 5] and kept == ([2, 5], 2) and known == [*figures.items()]
    assert run("parts", dies=True)[0] == [2]
    measured, state, kept, known = run("parts")
    assert measured == [2, 4, 5] and kept == ([2, 5], 2) and known == [*figures.items()]
    jax.tree.map(np.testing.assert_array_equal, whole, state)


@pytest.mark.parametrize("ends", ["signal", "error"])
def test_an_evaluation_that_is_ended_loses_no_steps(tmp_path, ends):
    """What it stands between is saved: a signal leaves little time, and an error may recur."""
    done = []

    def evaluate():
        if ends == "error":
            raise KeyError("no such answer")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        done.append(True)

    config = LoopConfig(save_every=100, evaluate_every=3)
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        train = lambda: loop.train(
            learner(), Counted(), config, checkpoints=checkpoints, evaluate=evaluate
        )
        if ends == "signal":
            assert train() == signal.SIGTERM and not done
        else:
            with pytest.raises(KeyError):
                train()
            checkpoints.wait()
        assert checkpoints.steps == [3]


@pytest.mark.parametrize("ends", ["signal", "error"])
def test_the_last_evaluation_is_made_up_for(tmp_path, ends):
    """A run that was ended in it is not done; the next start measures, and knows the best."""

    def ended():
        if ends == "error":
            raise KeyError("no such answer")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    config = LoopConfig(save_every=100, evaluate_every=100)
    with contextlib.closing(Checkpoints(tmp_path, best="wer", mode="min")) as checkpoints:
        train = lambda evaluate: loop.train(
            learner(), Counted(), config, checkpoints=checkpoints, evaluate=evaluate
        )
        if ends == "signal":
            assert train(ended) == signal.SIGTERM
        else:
            with pytest.raises(KeyError):
                train(ended)
            checkpoints.wait()
        assert (checkpoints.steps, checkpoints.best) == ([STEPS], None)
        made = os.stat(checkpoints.folder / str(STEPS) / "state").st_mtime_ns
        assert train(lambda: {"wer": 0.5}) is None
        assert (checkpoints.steps, checkpoints.best) == ([STEPS], STEPS)
        assert train(lambda: pytest.fail("it is known")) is None
        # it was not saved anew
        assert os.stat(checkpoints.folder / str(STEPS) / "state").st_mtime_ns == made


def test_batches_that_fail_lose_no_steps(tmp_path):
    class Failing(Counted):
        def __next__(self):
            if self.number == 3:
                raise RuntimeError("a worker process ended")
            return super().__next__()

    config = LoopConfig(save_every=100, evaluate_every=100)
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        with pytest.raises(RuntimeError, match="a worker process ended"):
            loop.train(learner(), Failing(), config, checkpoints=checkpoints)
        checkpoints.wait()
        assert checkpoints.steps == [3]


def test_what_nothing_can_train_is_refused():
    still = OptimizerConfig(learning_rate=0.0)
    model = Qwen2Audio(small.CONFIG, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="nothing trains"):
        Learner(model, still, losses.next_token)
    with pytest.raises(ValueError, match=r"target_modules name .*, whose learning rate is 0"):
        Learner(model, still, losses.next_token, adapters=Lora(r=1))
    own = OptimizerConfig(projector_learning_rate=1e-3)
    with pytest.raises(ValueError, match=r"projector_learning_rate is of nothing that trains: .*"):
        Learner(model, own, losses.next_token, adapters=Lora(r=1))
    whole = Lora(r=1, modules_to_save=("multi_modal_projector",))
    began = Learner(model, own, losses.next_token, adapters=whole).state.params["projector"]
    np.testing.assert_array_equal(began["kernel"], model.projector.kernel[...])
    with pytest.raises(ValueError, match="the batches ended after 0 of 5 steps"):
        loop.train(learner(), [])
