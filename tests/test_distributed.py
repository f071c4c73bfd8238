"""Two processes, tensor or pipeline parallel, generate what one does, and say the same of their caches."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version

from calidrop import KVCache, load
from calidrop.parallel import HeadGroup
from distributed_worker import models, runs
from tiny import tiny

WORKER = Path(__file__).with_name("distributed_worker.py")
EXAMPLE = Path(__file__).parents[1] / "examples/tensor_parallel.py"


def torchrun(processes: int, script: Path, *arguments: str) -> str:
    """What the processes print. Where they wait for each other for ever, they are ended."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [str(script), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, **pipes, start_new_session=True) as process:
        try:
            output, _ = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)  # torchrun ends its workers
            output, _ = process.communicate(timeout=60)
            output += "\n(took more than 300 s)"
    assert process.returncode == 0, output[-6000:]
    return output


def check_answers(one: dict, ranks: list[dict], tolerance: float) -> None:
    for rank in ranks:
        if one["logits"] is not None and one["logits"].shape == rank["logits"].shape:
            torch.testing.assert_close(rank["logits"], one["logits"], atol=tolerance, rtol=0)
        assert torch.equal(rank["tokens"], one["tokens"])
        assert rank["length"] == one["length"]
        assert rank["lines"] == one["lines"]  # describe() works, whatever layers are here
        assert 0 <= rank["rate"] <= 1


def check_shares(one: dict, ranks: list[dict], twice: float = 0.01) -> None:
    """Both processes together hold what one does, and did what it did."""
    nbytes, *others = zip(*(rank["bytes"] for rank in ranks), strict=True)
    assert [sum(n) for n in others] == list(one["bytes"][1:])
    assert one["bytes"][0] <= sum(nbytes) <= (1 + twice) * one["bytes"][0]  # positions of queries and the like
    assert [sum(n) for n in zip(*(rank["recomputed"] for rank in ranks), strict=True)] == one["recomputed"]


def tolerance(case: str) -> float:
    """Two processes add up hidden channels in another order. Where that moves a key or value across the middle between
    two codes of a quantizer, the difference is a step of it; about every other run has one. (decoquant is not rounded
    here; its factors are compared.)"""
    return 2e-2 if "kivi" in case else 2e-4


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.17"), reason="its DistributedConfig is another one")
@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path):
    # One test, because the imports of the two processes cost more than all its cases together.
    alone = {}
    for name, (model, cases) in models().items():
        model.save_pretrained(tmp_path / name)
        alone[name] = runs(model, cases)
    torchrun(2, WORKER, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    uneven = nothing = factors = 0
    for mode, name in ranks[0]:
        for case, one in alone[name].items():
            print(mode, name, case)  # shown with a failure
            both = [rank[mode, name][case] for rank in ranks]
            if name == "olmo2":  # both hold all heads, and must not take them for a half
                check_answers(one, both, tolerance(case))
                for rank in both:
                    assert all(rank[what] == one[what] for what in ("bytes", "recomputed", "rate"))
                    assert all(torch.equal(a, b) for a, b in zip(rank["kept"], one["kept"], strict=True))
                continue
            check_answers(one, both, tolerance(case))
            check_shares(one, both, twice=0.2 if "decoquant" in case else 0.01)  # its small factors are in both
            for whole, *here in zip(one["factors"], *(rank["factors"] for rank in both), strict=True):
                for factor in (x for x in here if x is not None):
                    torch.testing.assert_close(factor, whole, atol=1e-4, rtol=1e-4)
                    factors += 1
            for layer, whole in enumerate(one["kept"]):
                here, there = (rank["kept"][layer] for rank in both)
                if mode == "pipeline parallel":
                    here, there = (here, there) if layer < 2 else (there, here)
                    assert there is None
                    assert whole is None or torch.equal(here, whole)
                elif whole is not None:  # every head keeps what it does in one process
                    here, there = (torch.zeros_like(whole[:, :2]) if kept is None else kept for kept in (here, there))
                    assert torch.equal(torch.cat([here, there], 1), whole)
                    nothing += not here.any() or not there.any()
                    uneven += case.startswith("adakv") and int((here.sum(1) != there.sum(1)).sum())
    assert uneven > 8, "adakv did not share its budget across processes"
    assert factors == 2 * 4 * 3, "decoquant: two cases of four layers, in both processes or in one of two stages"
    assert nothing > 0, "no case where a process keeps nothing of a layer"


def test_kv_heads_must_divide(monkeypatch):
    group = HeadGroup()
    group.size = 2
    monkeypatch.setattr(HeadGroup, "of", lambda model: group)
    with pytest.raises(ValueError, match="3 kv heads cannot be spread evenly over 2 processes"):
        KVCache(tiny(num_key_value_heads=3))


def test_load_takes_either_a_device_or_processes(tmp_path):
    with pytest.raises(ValueError, match="got device='cpu' too"):
        load(str(tmp_path), device="cpu", distributed_config=object())


@pytest.mark.slow
@pytest.mark.skipif(Version(transformers.__version__) < Version("5.17"), reason="its DistributedConfig is another one")
@pytest.mark.parametrize("arguments", ["3", "2 --pipeline"])  # the default model has 3 kv heads
def test_example(arguments):
    processes, *options = arguments.split()
    output = torchrun(int(processes), EXAMPLE, *options)
    assert output.count("adakv(budget=64, recent=16)+calidrop: ") == int(processes)
    assert ("in another process" in output) == bool(options)
    assert " banana." in output
