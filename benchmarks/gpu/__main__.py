"""python -m benchmarks.gpu [--out FILE] [--only SECTION ...] [--layers N] [--device cpu --tiny]

Under eight minutes on an H100, no downloads. Sections: checks, bandwidth, decoding, largest, and tune when it is named.
"""

from __future__ import annotations

import argparse
import importlib.metadata as metadata
import os
import platform
from pathlib import Path

import torch

from benchmarks.gpu.run import Run


def environment(run: Run):
    row = {n: metadata.version(n) for n in ("torch", "transformers", "triton")} | {"python": platform.python_version()}
    if run.device.type == "cuda":
        of = torch.cuda.get_device_properties(run.device)
        row |= {"device": of.name, "processors": of.multi_processor_count, "memory_gb": of.total_memory / 1e9,
                "capability": f"{of.major}.{of.minor}", "cuda": torch.version.cuda}  # fmt: skip
    else:
        row |= {"device": "cpu, interpreted"}
    print("  ".join(f"{n} {x}" for n, x in row.items()), flush=True)
    yield row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON, written after every section")
    parser.add_argument("--only", nargs="+", metavar="SECTION")
    parser.add_argument("--layers", type=int, help="of the model, for a dry run")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="shapes for the interpreter")
    args = parser.parse_args()
    if args.device == "cpu":  # read when triton and the kernels are first asked for
        os.environ |= {"TRITON_INTERPRET": "1", "CALIDROP_KERNEL": "triton"}
    from benchmarks.gpu import bandwidth, checks, model

    run = Run(torch.device(args.device), args.tiny, args.out, args.layers)
    if run.device.type == "cuda":
        run.device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(0)
    # seconds: a section that takes longer stops after the row it is at
    sections = {
        "environment": (10, environment),
        "checks": (130, checks.checks),
        "bandwidth": (90, bandwidth.bandwidth),
        "decoding": (150, model.decoding),
        "largest": (75, model.largest),
        "tune": (150, bandwidth.tune),
    }
    for name in args.only or [n for n in sections if n != "tune"]:
        run.section(name, *sections[name])
    rows = [row for section in run.found.values() for row in section["rows"]]
    failed = [row for row in rows if row.get("passed") is False]
    broken = [n for n, section in run.found.items() if "Traceback" in section["error"]]
    errors = [r for r in rows if r.get("error") and "fit" not in r["error"] and "host" not in r["error"]]
    print(f"\n{len(failed)} checks failed, {len(errors)} rows with errors, sections that broke: {broken or 'none'}")
    for row in failed + errors:
        print("  ", {n: x for n, x in row.items() if x is not None})
    return bool(failed or broken)


if __name__ == "__main__":
    raise SystemExit(main())
