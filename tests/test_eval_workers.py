"""Other processes, local and on Ray: the same rows, whoever dies."""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from calidrop.eval.run import Ask, run
from calidrop.eval.workers import How, here, processes
from words import byte_model

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
HOW = How(threads=1)
TEXT = "Alice was beginning to get very tired of sitting by her sister on the bank. " * 40
TIMES = ("prefill_s", "decode_ms_per_token", "decode_ratio")


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    folder = byte_model(tmp_path_factory.mktemp("bytes"))
    recipes = ("snapkv(budget=40, recent=8)", "kivi(bits=2, group=16, residual=16)")
    return Ask((folder,), recipes, ("needle",), lengths=(320,), samples=6, questions=("seen", "later"), text=TEXT)


@pytest.fixture(scope="module")
def expected(ask, tmp_path_factory):
    return told(run(ask, HOW, tmp_path_factory.mktemp("runs") / "here", here(HOW), "here"))


def told(table):
    """Without the times, and to the digits that another thread's order of sums leaves."""
    rows = [dataclasses.asdict(line) for line in table]
    for row in rows:
        assert row["errors"] == 0
        assert row["n"] == 6
        for name in TIMES:
            assert row.pop(name) > 0
        row.update({name: round(row[name], 5) for name in ("score", "low", "high", "nll", "kl", "kl_p95")})
    return sorted(rows, key=lambda row: (row["question"], row["recipe"]))


def killing(workers, find):
    """Kill one of the processes that `find` names once the first rows are there."""
    killed = []

    def run(jobs):
        for rows in workers(jobs):
            yield rows
            if not killed and len(jobs) > 2:
                killed.append(find())
                os.kill(killed[0], signal.SIGKILL)

    return run, killed


def children(word):
    """Processes under this one with the word in their command."""
    found = [p for p in psutil.Process().children(recursive=True) if word in " ".join(p.cmdline())]
    return min(found, key=lambda p: p.create_time()).pid


def test_processes(ask, expected, tmp_path):
    workers, killed = killing(processes(2, HOW), lambda: children("multiprocessing.spawn"))
    assert told(run(ask, HOW, tmp_path / "run", workers, "killed")) == expected
    assert killed


def test_a_job_that_kills_its_process_is_given_up(ask, tmp_path, monkeypatch):
    """Each time it is tried, its process dies: an error, not a hang."""
    workers = processes(1, HOW)
    monkeypatch.setattr("calidrop.eval.workers.work", die)
    one = dataclasses.replace(ask, samples=1, questions=("seen",))
    table = run(one, HOW, tmp_path / "run", workers, "dies")
    assert [line.errors for line in table] == [1, 1, 1]


def die(*_):
    os._exit(3)


def test_no_worker_outlives_the_run():
    program = [sys.executable, str(Path(__file__).with_name("sleeping_workers.py"))]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as parent:
        try:
            assert parent.stdout is not None
            assert [parent.stdout.readline() for _ in range(2)] == ["begun\n"] * 2
            found = psutil.Process(parent.pid).children()
            assert len(found) >= 2
            assert parent.poll() is None
        finally:
            parent.kill()
    _, alive = psutil.wait_procs(found, timeout=10)
    assert not alive


def test_ray(ask, expected, tmp_path):
    pytest.importorskip("ray")
    from calidrop.eval.ray import cluster

    with cluster("local", HOW, 2) as pool:
        workers, killed = killing(pool, lambda: children("ray::Worker"))
        assert told(run(ask, HOW, tmp_path / "run", workers, "killed")) == expected
        assert killed


def test_no_cluster():
    pytest.importorskip("ray")
    from calidrop.eval.ray import cluster

    with pytest.raises(ValueError, match=r"no Ray cluster at '127\.0\.0\.1:1'"), cluster("127.0.0.1:1", HOW):
        pass
    for cpus, gpus, why in ((0, 0, "some of a CPU"), (1.5, 0, "of CPUs, got 1.5"), (1, 2.5, "of GPUs, got 2.5")):
        with pytest.raises(ValueError, match=why), cluster("auto", HOW, 1, cpus, gpus):
            pass
    with pytest.raises(ValueError, match="no room for 1 workers of 1 CPUs and 2 GPUs"), cluster("local", HOW, 1, 1, 2):
        pass
