"""Which process is lost is known from the signs of life that it no longer gives."""

import itertools
import os
import socket
import subprocess
import sys

import jax
import pytest

from qwen2audio_jax.training import hosts
from qwen2audio_jax.training.settings import HostsConfig


class Ended(BaseException):
    """In the place of the end of this process."""


@pytest.fixture
def store(monkeypatch):
    """What three processes have told the service; number 1 is silent, this is number 2."""
    hosts._lost.cache_clear()
    told = {f"{hosts.NAMES}/{i}": f"process {i} of 3 on host-{i}" for i in range(3)}
    beats = itertools.count()

    class Client:
        def key_value_set(self, key, value, allow_overwrite):
            assert allow_overwrite
            told[key] = value

        def key_value_dir_get(self, folder):
            told[f"{hosts.LIFE}/1"] = "7"
            told.update({f"{hosts.LIFE}/{i}": str(next(beats)) for i in (0, 2)})
            return [(key, value) for key, value in told.items() if key.startswith(f"{folder}/")]

    def end(status):
        raise Ended(status)

    monkeypatch.setattr(hosts.distributed.global_state, "client", Client())
    monkeypatch.setattr(hosts, "joined", lambda: True)
    monkeypatch.setattr(hosts, "here", lambda: "process 2 of 3 on host-2")
    monkeypatch.setattr(hosts.jax, "process_index", lambda: 2)
    monkeypatch.setattr(hosts.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(hosts.os, "_exit", end)
    return told


def failing(error):
    with hosts.together():
        raise error


def test_who_is_silent_is_named_to_all(store, capsys):
    with pytest.raises(Ended, match="1"):
        failing(jax.errors.JaxRuntimeError("closed by peer\nmore"))
    line = "train: error: process 2 of 3 on host-2: lost process 1 of 3 on host-1: closed by peer\n"
    assert capsys.readouterr().err == line
    assert store[f"{hosts.LOST}/2"] == "process 1 of 3 on host-1"


def test_the_first_word_counts(store, capsys):
    """The one that has said it has ended since, and would be missed, too."""
    store[f"{hosts.LOST}/0"] = "process 1 of 3 on host-1"
    with pytest.raises(Ended):
        failing(OSError("cannot save step 4"))
    assert "lost process 1 of 3 on host-1: cannot save step 4" in capsys.readouterr().err


def test_where_nobody_is_silent_the_mistake_is_told_as_it_is(store, monkeypatch, capsys):
    """A step that fails here ends this process; what was given wrong is left to the program."""
    monkeypatch.setattr(hosts, "_silent", list)
    with pytest.raises(Ended):
        failing(jax.errors.JaxRuntimeError("INTERNAL: a kernel"))
    assert capsys.readouterr().err == "train: error: process 2 of 3 on host-2: INTERNAL: a kernel\n"
    hosts._lost.cache_clear()
    with pytest.raises(ValueError, match="a mistake"):
        failing(ValueError("a mistake"))
    assert f"{hosts.LOST}/2" not in store


def test_a_service_that_is_gone_was_the_first_process(store, monkeypatch, capsys):
    def gone(folder):
        raise jax.errors.JaxRuntimeError("UNAVAILABLE")

    monkeypatch.setattr(hosts, "_told", gone)
    with pytest.raises(Ended):
        failing(jax.errors.JaxRuntimeError("closed by peer"))
    assert "lost process 0, where all report: closed by peer" in capsys.readouterr().err


def test_signs_of_life_are_waited_for_once(store, monkeypatch):
    """However many contexts an error passes on its way out."""
    waited = []
    monkeypatch.setattr(hosts, "_silent", lambda: waited.append(1) or [])
    with pytest.raises(ValueError, match="a mistake"), hosts.together():
        failing(ValueError("a mistake"))
    assert waited == [1]


@pytest.fixture
def watch(store, monkeypatch):
    """Of the first process, after its first look."""
    monkeypatch.setattr(hosts.jax, "process_index", lambda: 0)
    watch = hosts.Watch(timeout=10)
    assert watch.lost(now=100.0) == ""
    return watch


def test_the_first_process_notices_who_is_silent(watch):
    """Also while all wait for that one, so that nothing fails."""
    assert watch.lost(now=109.0) == ""
    assert watch.lost(now=111.0) == "process 1 of 3 on host-1"


def test_who_has_left_is_not_lost(watch, store, monkeypatch):
    """It may be long until the first process has written what both have learned."""
    told = hosts._told
    left = lambda what: told(what) | ({1: hosts.LEFT} if what == hosts.LIFE else {})
    monkeypatch.setattr(hosts, "_told", left)
    assert watch.lost(now=101.0) == watch.lost(now=1000.0) == ""


def test_the_others_learn_of_it_from_whoever_noticed(store, capsys):
    """They end within a beat; nobody but the first looks for silence."""
    watch = hosts.Watch(timeout=10)
    assert watch.lost(now=0.0) == watch.lost(now=1000.0) == ""
    store[f"{hosts.LOST}/0"] = "process 1 of 3 on host-1"
    with pytest.raises(Ended, match="1"):
        watch.run()
    line = "process 2 of 3 on host-2: lost process 1 of 3 on host-1: no sign of life\n"
    assert capsys.readouterr().err.endswith(line)


def test_a_service_that_does_not_answer_is_asked_again(store, monkeypatch):
    """Nothing ends because of one answer that did not come."""
    beats = []

    def refuses(what, value):
        beats.append(value)
        raise jax.errors.JaxRuntimeError("UNAVAILABLE")

    watch = hosts.Watch(timeout=10)
    monkeypatch.setattr(hosts, "_tell", refuses)
    monkeypatch.setattr(watch._leaves, "wait", lambda seconds: len(beats) == 3)
    watch.run()
    assert beats == ["0", "1", "2"]


def test_who_shares_rows_counts_once(monkeypatch):
    """They read the same; where one left out what others heard, nothing is saved any more."""
    count = lambda samples, bad, why="": {
        "a": {"samples": samples, "bad": {"missing audio": [bad, why]} if bad else {}}
    }
    every = [count(9, 1, "row 3: gone"), count(7, 0), count(9, 1, "row 3: 404"), count(7, 0)]
    monkeypatch.setattr(hosts, "gathered", lambda counts: every)
    assert hosts.counted({}, [[0, 2], [1, 3]]) == every[:2]
    assert hosts.counted({}, [[0], [1], [2], [3]]) == every
    every[3] = count(6, 2)
    told = r"all \(left out: 0 by process 1, 2 by process 3\); what was saved before is whole"
    with pytest.raises(ValueError, match=told):
        hosts.counted({}, [[0, 2], [1, 3]])


@pytest.mark.parametrize("variable", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_one_of_several_does_not_train_as_if_alone(monkeypatch, variable):
    """All would write into one folder."""
    monkeypatch.setenv(variable, "1")
    hosts.alone()
    monkeypatch.setenv(variable, "4")
    with pytest.raises(ValueError, match=rf"one of 4 processes \({variable}\): wanted --distribut"):
        hosts.alone()
    monkeypatch.delenv(variable)
    monkeypatch.setattr(hosts.jax, "process_count", lambda: 2)  # as on TPUs of two hosts
    with pytest.raises(ValueError, match="devices are of 2 hosts: wanted --distributed"):
        hosts.alone()


def test_under_open_mpi_each_process_has_a_gpu(monkeypatch):
    """That of its number on its machine, whatever jax would find out by itself."""
    given = {}

    def initialize(**how):
        given.clear()
        given.update(how)
        raise RuntimeError("enough")

    def join(**how):
        with pytest.raises(ValueError, match="enough"):
            hosts.join(HostsConfig(**how))

    told = {"coordinator": "host-0:1234", "count": 16, "number": 11}
    monkeypatch.setattr(hosts.jax.distributed, "initialize", initialize)
    monkeypatch.delenv("JAX_LOCAL_DEVICE_IDS", raising=False)
    monkeypatch.delenv("OMPI_COMM_WORLD_LOCAL_RANK", raising=False)
    join(**told)
    assert not {"local_device_ids", "cluster_detection_method"} & set(given)
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "3")
    join(**told)
    assert given["local_device_ids"] == [3] and given["process_id"] == 11
    assert given["cluster_detection_method"] == "deactivate"
    monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "0")
    join(**told)
    assert given["local_device_ids"] is None
    join()  # of Open MPI 4, which says all
    assert "cluster_detection_method" not in given


def test_under_slurm_no_gpu_is_idle(monkeypatch):
    """A task has one GPU, its only one where it sees no other; more of them are refused."""
    config = HostsConfig()
    monkeypatch.delenv("JAX_LOCAL_DEVICE_IDS", raising=False)
    monkeypatch.setenv("SLURM_LOCALID", "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert hosts._gpus(config) == {}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")  # srun --gpus-per-task 1
    assert hosts._gpus(config) == {"local_device_ids": [0]}
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "8(x2),1")
    hosts._all_used()  # there are no GPUs here
    monkeypatch.setattr(hosts.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(hosts.jax, "local_device_count", lambda: 1)
    for node in "01":
        monkeypatch.setenv("SLURM_NODEID", node)
        hosts._all_used()
    monkeypatch.setenv("SLURM_NODEID", "2")
    with pytest.raises(ValueError, match=r"8 GPUs for 1 tasks, which would use 1: .*=0,1,2,3,4,5,"):
        hosts._all_used()
    monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "0,1,2,3,4,5,6,7")
    hosts._all_used()
    assert hosts._gpus(config) == {}


JOINS = """
import sys, jax
from qwen2audio_jax import compilation_cache
from qwen2audio_jax.training import hosts, settings
compilation_cache.keep()
where, number = sys.argv[1:]
hosts.join(settings.HostsConfig(coordinator=where, count=2, number=int(number)))
print(jax.config.jax_compilation_cache_dir, flush=True)
jax.distributed.shutdown()
"""


def test_programs_are_kept_where_all_find_them(tmp_path):
    """Else one would find a program that the others compile; on GPUs these would wait for it."""
    shared, own = str(tmp_path / "shared"), str(tmp_path / "own")
    for folders, kept in (([shared, shared], shared), ([shared, own], "None")):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            where = f"127.0.0.1:{free.getsockname()[1]}"
        started = [
            subprocess.Popen(
                [sys.executable, "-c", JOINS, where, str(number)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "QWEN2AUDIO_CACHE": folder, "JAX_PLATFORMS": "cpu"},
            )
            for number, folder in enumerate(folders)
        ]
        told = [each.communicate(timeout=300) for each in started]
        assert [out.strip() for out, _ in told] == [kept] * 2, told
        said = [line for _, err in told for line in err.splitlines() if "not kept" in line]
        assert len(said) == (kept == "None")
        assert not os.listdir(shared)
    assert f"process 1 of 2 on {hosts.platform.node()} does not see those in {shared}" in said[0]
