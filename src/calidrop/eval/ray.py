"""Jobs on a Ray cluster (`pip install 'calidrop[ray]'`). Every worker is an actor that holds the model; Ray restarts
one that is lost and gives its job out again. calidrop must be installed on the nodes."""

from __future__ import annotations

import importlib
import logging
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from calidrop.eval.cell import Job
from calidrop.eval.rows import Row
from calidrop.eval.workers import STRIKES, How, Workers, work

LOCAL = "local"


@contextmanager
def cluster(address: str, how: How, n: int | None = None, cpus: float = 1.0, gpus: float = 0.0) -> Iterator[Workers]:
    """address: "local" starts Ray on this machine; "auto" or HOST:PORT joins one that runs. n: workers; None: as many
    as there is room for. cpus, gpus: what each takes, a fraction of a GPU if several are to share one. Raises
    ValueError where Ray is missing or not reachable, has no room for a worker, or what one takes makes no sense."""
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError:
        raise ValueError("--ray needs Ray: pip install 'calidrop[ray]'") from None
    _sensible(cpus, gpus)
    _reach(address)
    start = {"num_cpus": n, "include_dashboard": False} if address == LOCAL else {}
    try:
        ray.init(None if address == LOCAL else address, logging_level=logging.ERROR, log_to_driver=False, **start)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ValueError(f"no Ray cluster at {address!r}: {str(error).splitlines()[0]}") from None
    try:
        have = ray.cluster_resources()
        room = int(min(have.get(name, 0) / need for name, need in (("CPU", cpus), ("GPU", gpus)) if need))
        if room < (n or 1):
            raise ValueError(
                f"no room for {n or 1} workers of {cpus:g} CPUs and {gpus:g} GPUs: {room} fit on the cluster"
            )
        yield lambda jobs: _run(ray, jobs, how, n or room, {"num_cpus": cpus, "num_gpus": gpus})
    finally:
        ray.shutdown()


def _sensible(cpus: float, gpus: float) -> None:
    """Ray would say so minutes later, and of an actor that it could not start."""
    if not cpus and not gpus:
        raise ValueError("a worker takes some of a CPU or a GPU, got 0 CPUs and 0 GPUs")
    for name, n in (("CPUs", cpus), ("GPUs", gpus)):
        if n < 0 or (n > 1 and n != int(n)):
            raise ValueError(f"a worker takes a fraction of one or a whole number of {name}, got {n:g}")


def _reach(address: str) -> None:
    """Ray itself tries for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError) as error:
        raise ValueError(f"no Ray cluster at {address!r}: {error}") from None


class Worker:
    def __init__(self, how: How):
        self.how = how

    def work(self, job: Job) -> list[Row]:
        return work(job, self.how)


def _run(ray: Any, jobs: Sequence[Job], how: How, n: int, needs: dict[str, float]) -> Iterator[list[Row]]:
    actor = ray.remote(Worker).options(max_restarts=-1, max_task_retries=STRIKES - 1, **needs)
    idle = [actor.remote(how) for _ in range(min(n, len(jobs)))]
    waiting, running = list(jobs), {}
    while waiting or running:
        while waiting and idle:
            job, worker = waiting.pop(0), idle.pop()
            running[worker.work.remote(job)] = job, worker
        (done,), _ = ray.wait(list(running))
        job, worker = running.pop(done)
        idle.append(worker)
        try:
            yield ray.get(done)
        except ray.exceptions.RayError as error:
            yield [job.failed(recipe, error) for recipe in job.keys]
