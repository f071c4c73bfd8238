"""Where jobs are run: here, in processes of this machine, or (`ray`) on a cluster. All give rows as they come; the one
who asked writes them."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.connection import wait as wait_for
from typing import Any

from calidrop.eval.cell import Job, measure
from calidrop.eval.rows import Row

Workers = Callable[[Sequence[Job]], Iterator[list[Row]]]
STRIKES = 2  # a job that was running when a worker died so many times is to blame


@dataclass(frozen=True)
class How:
    """device, dtype: as `calidrop.load` takes them. threads: of torch, per worker. Raises ValueError for what torch
    does not know."""

    device: str | None = None
    dtype: str | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        import torch

        from calidrop.models import check_dtype

        check_dtype(self.dtype)
        if self.device is not None:
            try:
                torch.empty(0, device=self.device)
            except (RuntimeError, AssertionError) as error:  # the latter where torch was built without it
                raise ValueError(f"device {self.device!r}: {str(error).splitlines()[0]}") from None


@lru_cache(1)
def load(name: str, how: How) -> tuple[Any, Any]:
    import torch

    from calidrop import models

    if how.threads is not None:
        torch.set_num_threads(how.threads)
    return models.load(name, device=how.device, dtype=how.dtype)


def work(job: Job, how: How) -> list[Row]:
    """All rows of a job; with the error where not even the model or the tokens were there."""
    return list(stream(job, how))


def stream(job: Job, how: How) -> Iterator[Row]:
    try:
        yield from measure(*load(job.model, how), job)
    except Exception as error:
        yield from (job.failed(recipe, error) for recipe in job.keys)


def here(how: How) -> Workers:
    def run(jobs: Sequence[Job]) -> Iterator[list[Row]]:
        for job in jobs:
            for row in stream(job, how):
                yield [row]

    return run


def end_with_parent() -> None:
    """In a worker: do not go on with a job that nobody waits for any more."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait_for([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def processes(n: int, how: How) -> Workers:
    """n processes. Those that die are replaced, and what they did is done again, until a job has died STRIKES times."""

    def run(jobs: Sequence[Job]) -> Iterator[list[Row]]:
        waiting, strikes = list(jobs), dict.fromkeys(range(len(jobs)), 0)
        index = {id(job): i for i, job in enumerate(jobs)}
        while waiting:
            running: dict[Future, Job] = {}
            with ProcessPoolExecutor(n, multiprocessing.get_context("spawn"), end_with_parent) as pool:
                try:
                    while waiting or running:
                        while waiting and len(running) < n:  # no more, so that those running are the suspects
                            running[pool.submit(work, waiting[0], how)] = waiting[0]
                            waiting.pop(0)  # only now: submitting fails where a worker has just died
                        for done in wait(running, return_when=FIRST_COMPLETED).done:
                            rows = done.result()
                            running.pop(done)
                            yield rows
                except BrokenProcessPool:
                    for job in running.values():
                        strikes[index[id(job)]] += 1
                        if strikes[index[id(job)]] < STRIKES:
                            waiting.append(job)
                        else:
                            yield [job.failed(recipe, "the process that ran it died") for recipe in job.keys]

    return run
