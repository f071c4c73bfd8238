"""`python -m benchmarks.gpu` from end to end, interpreted and tiny: every section runs and every check passes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("there is no triton", allow_module_level=True)


@pytest.mark.slow
def test_every_section_runs(tmp_path):
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny", "--out", str(out)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert list(found) == ["environment", "checks", "bandwidth", "decoding", "largest"]
    assert not any(section["error"] for section in found.values())
    rows = {name: section["rows"] for name, section in found.items()}
    assert not [row for section in rows.values() for row in section if row.get("error", "").startswith(("Run", "Val"))]
    assert len(rows["checks"]) > 12 and all(row["passed"] for row in rows["checks"])
    assert {row["format"] for row in rows["bandwidth"]} >= {"copy", "sdpa", "exact", "int4", "kivi4", "fp8"}
    ours = [row for row in rows["decoding"] if "sdpa" not in row["recipe"]]
    assert len(ours) == 10 and all(row["by"] == ["the Triton kernel"] for row in ours)


def test_a_section_that_breaks_is_reported_and_the_rest_goes_on(tmp_path, capsys):
    import torch
    from benchmarks.gpu.run import Run

    run = Run(torch.device("cpu"), True, tmp_path / "x.json")

    def breaks(run):
        yield {"a": 1}
        raise KeyError("here")

    def endless(run):
        while True:
            yield run.guarded({"b": 2}, lambda: {"c": 1 / 0})

    run.section("one", 5, breaks)
    run.section("two", 0, endless)
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["one"]["rows"] == [{"a": 1}] and "KeyError: 'here'" in found["one"]["error"]
    assert found["two"]["rows"][0]["error"] == "ZeroDivisionError: division by zero"
    assert found["two"]["error"] == "stopped after 0 s"
    assert "-- one" in capsys.readouterr().out
