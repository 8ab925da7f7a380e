"""What was saved comes back to the bit, or the last that was whole does, and says so."""

import contextlib
import multiprocessing
import os
import pathlib
import random
import shutil
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from disk import small_files

from qwen2audio_jax import sharding
from qwen2audio_jax.training import hosts
from qwen2audio_jax.training.checkpoint import CHECKPOINTS, SCORES, Checkpoints

HURRY = False  # processes of their own compile as always, and are to give the same bits
OPTIMIZER = optax.adamw(1e-2)
WIDTH = 512


def fresh():
    """A state of every kind of leaf that a run has; its matrix takes a megabyte."""
    params = {
        "matrix": jax.random.normal(jax.random.key(0), (WIDTH, WIDTH)),
        "half": jnp.linspace(-1, 1, 24, dtype=jnp.bfloat16).reshape(8, 3),
    }
    still = {"mask": jnp.array([True, False, True]), "step": jnp.zeros((), jnp.int32)}
    return still | {"params": params, "opt_state": OPTIMIZER.init(params)}


def advance(state):
    """One step; what it computes is random, so that no two checkpoints are alike."""
    key = jax.random.fold_in(jax.random.key(1), state["step"])
    noise = lambda x: jax.random.normal(key, x.shape, x.dtype)
    grads = jax.tree.map(noise, state["params"])
    updates, opt_state = OPTIMIZER.update(grads, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    return state | {"params": params, "opt_state": opt_state, "step": state["step"] + 1}


step = jax.jit(advance, donate_argnums=0)


def abstract(state, place=None):
    describe = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place or x.sharding)
    return jax.tree.map(describe, state)


def after(steps):
    state = fresh()
    for _ in range(steps):
        state = step(state)
    return state


def assert_same_bits(left, right):
    def same(x, y):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))

    jax.tree.map(same, left, right)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with the steps 1 and 2."""
    folder = tmp_path_factory.mktemp("run")
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, after(1), {"seen": [10, 20]})
    checkpoints.save(2, after(2), {"seen": [30, 40]})
    checkpoints.close()
    return folder


@pytest.fixture(scope="module")
def spawn():
    """Starts processes that have what they need imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["optax", "pytest", "qwen2audio_jax.training.checkpoint"])
    return context


@pytest.fixture
def copy(run, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(run, tmp_path / "run")


def test_every_bit_comes_back(tmp_path):
    """Steps are donated and go on while it is saved; the latest and the best are kept."""
    checkpoints = Checkpoints(tmp_path, keep=2, best="wer")
    assert checkpoints.restore(abstract(fresh())) is None and checkpoints.best is None
    state = fresh()
    for i, wer in enumerate([0.5, 0.1, float("nan"), 0.3, 0.2], 1):
        state = step(state)
        checkpoints.save(i, state, {"seen": [i, 255]})
        if i != 4:
            checkpoints.add_scores(i, {"wer": wer})
        for _ in range(10):
            state = step(state)
        state = after(i)
    checkpoints.close()

    checkpoints = Checkpoints(tmp_path, keep=2, best="wer")
    assert checkpoints.steps == [2, 4, 5] and checkpoints.best == 2
    for i in checkpoints.steps:
        restored = checkpoints.restore(abstract(fresh()), i)
        assert restored.step == i and restored.data == [{"seen": [i, 255]}]
        assert_same_bits(restored.state, after(i))
    assert checkpoints.restore(abstract(fresh())).step == 5
    checkpoints.save(5, state, {"seen": "what is there already stays"})
    checkpoints.close()
    assert Checkpoints(tmp_path).restore(abstract(fresh())).data == [{"seen": [5, 255]}]


def test_the_first_host_says_what_there_is(run, tmp_path, monkeypatch):
    """Another one, which sees late what was saved last, waits for it: all read the same."""
    folder, last = tmp_path / CHECKPOINTS, run / CHECKPOINTS / "2"
    shutil.copytree(run / CHECKPOINTS, folder, ignore=lambda _, names: {"2"} & {*names})
    shutil.copytree(last, tmp_path / "late")
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.agreed() == checkpoints.steps == [1]
    monkeypatch.setattr(hosts, "by_first", lambda make: [1, 2])
    monkeypatch.setattr(hosts, "joined", lambda: True)
    threading.Timer(1, (tmp_path / "late").rename, [folder / "2"]).start()
    restored = checkpoints.restore(abstract(fresh()))
    assert restored.step == 2 and restored.data == [{"seen": [30, 40]}]
    checkpoints.close()


def test_a_host_that_cannot_save_waits_for_no_other(run, tmp_path, monkeypatch):
    """Which are amid the same save: it says so and ends, and all end with it."""
    shutil.copytree(run / CHECKPOINTS, tmp_path / CHECKPOINTS)
    checkpoints = Checkpoints(tmp_path)
    still = checkpoints._orbax

    def fail():
        raise OSError("Disk quota exceeded")

    def wait(*_, **__):
        raise AssertionError("the others are waited for")

    monkeypatch.setattr(still, "wait", fail)
    monkeypatch.setattr(still, "close", wait)
    monkeypatch.setattr(checkpoints, "_open", wait)
    monkeypatch.setattr(hosts, "joined", lambda: True)
    with pytest.raises(OSError, match="Disk quota exceeded; step 2 is still there"):
        checkpoints.wait()
    checkpoints.close()
    monkeypatch.undo()
    still.close()


def test_another_sharding_gets_the_same_bits(run, tmp_path):
    """From one device to eight, and from eight to one, checksums included."""
    mesh = sharding.mesh(fsdp=8)
    place = jax.sharding.NamedSharding(mesh, jax.P())
    split = jax.sharding.NamedSharding(mesh, jax.P("fsdp"))
    many = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=split if x.ndim == 2 and x.shape[0] % 8 == 0 else place
        ),
        fresh(),
    )
    restored = Checkpoints(run).restore(many)
    assert restored.step == 2 and restored.data == [{"seen": [30, 40]}]
    assert restored.state["params"]["matrix"].sharding == split
    assert_same_bits(restored.state, after(2))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, restored.state, None)
    checkpoints.wait()
    assert_same_bits(checkpoints.restore(abstract(fresh())).state, after(2))


# What is measured when it is saved already


def bytes_of(folder, number):
    """All of a checkpoint but what was measured."""
    files = (file for file in files_of(folder, number) if file.parent.name != "metrics")
    return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


def add_scores(checkpoints, number, wer):
    """Says what was measured, and waits until that is beside the checkpoint."""
    checkpoints.add_scores(number, {"wer": wer})
    checkpoints.wait()


def test_late_scores_leave_the_checkpoint_alone(copy):
    """Nor do they need its room; those of a disk without any can be put there later."""
    before = bytes_of(copy, 2)
    with contextlib.closing(Checkpoints(copy, keep=1, best="wer")) as checkpoints:
        with small_files(0), pytest.raises(OSError) as caught:
            add_scores(checkpoints, 2, 0.5)
        message = str(caught.value)
        assert message.startswith(f"cannot save what was measured to {checkpoints.folder}/2/")
        assert "File too large" in message and message.endswith("; step 2 is still there")
        assert not checkpoints.measured(2) and checkpoints.best is None
        with small_files(1000):
            add_scores(checkpoints, 2, 0.5)
        assert checkpoints.measured(2) and checkpoints.best == 2
    assert bytes_of(copy, 2) == before
    assert_same_bits(Checkpoints(copy).restore(abstract(fresh())).state, after(2))


def test_scores_of_an_earlier_start_are_surpassed(tmp_path):
    """The best stays, another one does not; what is known is not measured again."""
    open_ = lambda: contextlib.closing(Checkpoints(tmp_path, keep=1, best="wer"))
    with open_() as checkpoints:
        checkpoints.save(1, after(1), None)
        add_scores(checkpoints, 1, 0.5)
        checkpoints.save(2, after(2), None)
    with open_() as checkpoints:
        add_scores(checkpoints, 2, 0.1)
        assert (checkpoints.steps, checkpoints.best) == ([1, 2], 2)
        add_scores(checkpoints, 2, 0.9)  # it is known
        checkpoints.save(3, after(3), None)
        add_scores(checkpoints, 3, 0.3)
    with open_() as checkpoints:
        assert (checkpoints.steps, checkpoints.best) == ([2, 3], 2)
        assert_same_bits(checkpoints.restore(abstract(fresh()), 2).state, after(2))


def test_what_is_measured_while_it_is_saved_is_put_beside_it(tmp_path):
    """By the next save, or at the end, before it is decided what stays."""
    open_ = lambda: contextlib.closing(Checkpoints(tmp_path, keep=1, best="wer"))
    with open_() as checkpoints:
        for number, wer in ((1, 0.2), (2, 0.5), (3, 0.1)):
            checkpoints.save(number, after(number), None)
            checkpoints.add_scores(number, {"wer": wer})
            assert not checkpoints.measured(number)
        assert (checkpoints.steps, checkpoints.best) == ([1, 3], 1)
        checkpoints.wait()
        assert checkpoints.best == 3
        checkpoints.save(4, after(4), None)
        checkpoints.add_scores(4, {"wer": 0.3})
        checkpoints.add_scores(9, {"wer": 0.0})  # of a step that is not saved
    with open_() as checkpoints:
        assert (checkpoints.steps, checkpoints.best) == ([3, 4], 3)
        assert checkpoints.measured(4)


def killed_late(folder):
    """A process that is killed where what was measured would appear."""
    checkpoints = Checkpoints(folder)
    kill = lambda *paths, **how: os.kill(os.getpid(), signal.SIGKILL)
    os.replace = os.rename = kill
    add_scores(checkpoints, 2, 0.5)
    checkpoints.close()


def test_a_process_killed_while_it_adds_scores_loses_nothing(spawn, copy):
    before = bytes_of(copy, 2)
    process = spawn.Process(target=killed_late, args=(copy,))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert bytes_of(copy, 2) == before
    with contextlib.closing(Checkpoints(copy, best="wer")) as checkpoints:
        assert checkpoints.steps == [1, 2] and not checkpoints.measured(2)
        add_scores(checkpoints, 2, 0.5)
        assert checkpoints.best == 2
        assert_same_bits(checkpoints.restore(abstract(fresh())).state, after(2))


@pytest.mark.parametrize("content", [b"", b'{"wer": 0.', b"[1]", b'{"wer": "low"}', b"\xff\xfe"])
def test_damaged_scores_are_no_damaged_checkpoint(copy, caplog, content):
    """They are named and set aside, so that it can be measured anew."""
    with contextlib.closing(Checkpoints(copy)) as checkpoints:
        add_scores(checkpoints, 2, 0.5)
    scores = copy / CHECKPOINTS / "2" / SCORES
    scores.write_bytes(content)
    with contextlib.closing(Checkpoints(copy, best="wer")) as checkpoints:
        assert f"{scores} is damaged, now called metrics.damaged: " in caplog.text
        assert checkpoints.steps == [1, 2] and not checkpoints.measured(2)
        assert checkpoints.restore(abstract(fresh())).step == 2
        add_scores(checkpoints, 2, 0.4)
        assert checkpoints.best == 2


# Damage


def files_of(folder, number):
    files = (folder / CHECKPOINTS / str(number)).rglob("*")
    return sorted(file for file in files if file.is_file() and file.stat().st_size)


def largest(folder, number):
    return max(files_of(folder, number), key=lambda file: file.stat().st_size)


def flip(file, bit):
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


DAMAGES = {
    "a bit flips in an array": lambda f: flip(largest(f, 2), 8 * 500_000 + 3),
    "an array's file is cut": lambda f: largest(f, 2).write_bytes(
        largest(f, 2).read_bytes()[:1000]
    ),
    "an array's file is lost": lambda f: largest(f, 2).unlink(),
    "all of its files are lost": lambda f: shutil.rmtree(f / CHECKPOINTS / "2" / "state"),
    "a bit flips in the data's state": lambda f: flip(
        f / CHECKPOINTS / "2" / "data" / "host-0", 8 * 25
    ),
    "its metadata are lost": lambda f: (f / CHECKPOINTS / "2" / "_CHECKPOINT_METADATA").unlink(),
    "it is empty": lambda f: (
        shutil.rmtree(f / CHECKPOINTS / "2"),
        (f / CHECKPOINTS / "2").mkdir(),
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_last_whole_checkpoint_is_used(copy, caplog, damage):
    """The damaged one is named and set aside; the run goes on from the one before it."""
    DAMAGES[damage](copy)
    checkpoints = Checkpoints(copy)
    restored = checkpoints.restore(abstract(fresh()))
    assert restored.step == 1 and restored.data == [{"seen": [10, 20]}]
    assert_same_bits(restored.state, after(1))
    if (copy / CHECKPOINTS / "2.damaged").exists():
        messages = [r.getMessage() for r in caplog.records if r.name.startswith("qwen2audio")]
        assert len(messages) == 1 and "\n" not in messages[0]
        assert f"{copy / CHECKPOINTS / '2'} is damaged, now called 2.damaged: " in messages[0]
    else:
        assert damage in ("it is empty", "its metadata are lost")
    checkpoints.save(2, after(2), {"seen": "again"})
    checkpoints.close()
    assert Checkpoints(copy).restore(abstract(fresh())).data == [{"seen": "again"}]


def test_a_damaged_one_that_is_asked_for_is_set_aside(copy):
    """As the best is, which is then the best of the others."""
    flip(largest(copy, 2), 8 * 500_000 + 3)
    with contextlib.closing(Checkpoints(copy)) as checkpoints:
        with pytest.raises(ValueError, match="holds no checkpoint that is whole: step 2"):
            checkpoints.restore(abstract(fresh()), 2)
        assert checkpoints.steps == [1]
        assert checkpoints.restore(abstract(fresh()), 1).step == 1


def test_no_flipped_bit_is_believed(copy):
    """Wherever a bit flips, what comes back is one of the two states that were saved."""
    rng = random.Random(0)
    (copy / CHECKPOINTS / "2").rename(copy / "good")
    steps = []
    for _ in range(10):
        shutil.rmtree(copy / CHECKPOINTS / "2", ignore_errors=True)
        shutil.copytree(copy / "good", copy / CHECKPOINTS / "2")
        file = rng.choice([file for file in files_of(copy, 2) if file.parent.name != "metrics"])
        flip(file, rng.randrange(8 * file.stat().st_size))
        restored = Checkpoints(copy).restore(abstract(fresh()))
        assert_same_bits(restored.state, after(restored.step))
        assert restored.data == [{"seen": [30, 40] if restored.step == 2 else [10, 20]}]
        steps.append(restored.step)
    assert 1 in steps


def test_nothing_whole_is_an_error_and_nothing_is_touched(copy):
    for number in (1, 2):
        largest(copy, number).write_bytes(b"")
    with pytest.raises(ValueError, match=r"no checkpoint that is whole: step 2: .*; step 1: ") as e:
        Checkpoints(copy).restore(abstract(fresh()))
    assert "\n" not in str(e.value)
    assert {path.name for path in (copy / CHECKPOINTS).iterdir()} == {"1", "2"}


def test_another_state_is_an_error_and_nothing_is_touched(copy):
    """A run of another model or optimizer is no damage: the leaves are named, both shapes shown."""
    other = abstract(fresh())
    other["params"]["matrix"] = jax.ShapeDtypeStruct((4, WIDTH), jnp.float32)
    other["ema"] = other.pop("mask")
    with pytest.raises(ValueError) as caught:
        Checkpoints(copy).restore(other)
    for words in (
        f"{CHECKPOINTS}/2 holds another state: mask is unknown; ema is missing; ",
        "params.matrix is float32[512, 512], wanted float32[4, 512]",
    ):
        assert words in str(caught.value)
    assert {path.name for path in (copy / CHECKPOINTS).iterdir()} == {"1", "2"}


# Processes that end before their time


def train(folder, steps):
    """A run that saves every step, and goes on where it was."""
    checkpoints = Checkpoints(folder, keep=1)
    state, seen = fresh(), 0
    if restored := checkpoints.restore(abstract(state)):
        state, seen = restored.state, restored.data[0]["seen"]
    for i in range(seen, steps):
        state = step(state)
        checkpoints.save(i + 1, state, {"seen": i + 1})
    checkpoints.close()
    return state


def fill_disk(folder, answer):
    """A run whose disk has no room for its second checkpoint."""
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, after(1), {"seen": 1})
    checkpoints.wait()
    with small_files(WIDTH * 100):
        try:
            checkpoints.save(2, after(2), {"seen": 2})
            checkpoints.wait()
            answer.send("saved")
        except OSError as error:
            answer.send(str(error))
        deadline = time.monotonic() + 60
        while any("tmp" in path.name for path in (folder / CHECKPOINTS).iterdir()):
            assert time.monotonic() < deadline  # it is cleared away beside the training
            time.sleep(0.05)
    checkpoints.save(3, after(3), {"seen": 3})
    checkpoints.close()


def steps_in(folder):
    paths = (folder / CHECKPOINTS).iterdir() if (folder / CHECKPOINTS).is_dir() else []
    return [int(path.name) for path in paths if path.name.isdigit()]


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(spawn, tmp_path):
    """Killed at five random moments while it saves and deletes, with one checkpoint kept."""
    rng, last, torn = random.Random(0), 0, 0
    for _ in range(5):
        process = spawn.Process(target=train, args=(tmp_path, 10**6))
        process.start()
        deadline = time.monotonic() + 120
        while max(steps_in(tmp_path), default=0) <= last:
            assert process.is_alive() and time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        process.join()
        last = max(steps_in(tmp_path))
        torn += any("tmp" in path.name for path in (tmp_path / CHECKPOINTS).iterdir())
    assert torn
    assert_same_bits(train(tmp_path, last + 2), after(last + 2))


def test_a_full_disk_is_one_error_and_loses_nothing(spawn, tmp_path):
    """The last checkpoint stays, the torn one is cleared away, and a later one can be saved."""
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=fill_disk, args=(pathlib.Path(tmp_path), theirs))
    process.start()
    assert ours.poll(120)
    message = ours.recv()
    assert message.startswith(f"cannot save step 2 to {tmp_path / CHECKPOINTS}: "), message
    assert message.endswith("; step 1 is still there") and "\n" not in message
    assert "File too large" in message
    process.join()
    assert process.exitcode == 0
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps == [1, 3]
    for number in (1, 3):
        restored = checkpoints.restore(abstract(fresh()), number)
        assert_same_bits(restored.state, after(number))
