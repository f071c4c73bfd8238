"""A run whose jobs take for ever, as a program of its own: to be killed (test_eval_workers.py)."""

import time

from calidrop.eval import workers


def work(job: int, how: None) -> None:
    print("begun", flush=True)
    time.sleep(600)


if __name__ == "__main__":
    workers.work = work  # type: ignore[assignment]
    for _ in workers.processes(2, None)([1, 2]):  # type: ignore[arg-type, list-item]
        pass
