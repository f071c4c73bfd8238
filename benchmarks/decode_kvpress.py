"""Steps of kvpress' presses, timed in an environment of its own that `benchmarks.decode --kvpress PYTHON` starts.

python -m venv kv && kv/bin/pip install kvpress==0.5.5
python -m benchmarks.decode --kvpress kv/bin/python --contexts 8192 --batches 4

Takes nothing of calidrop. Reads a job as JSON on stdin: model (folder), dtype, ids [T], batch, threads, rounds, steps,
kept tokens. Writes JSON: the versions, and per press, and for none under "DynamicCache", the seconds of each step and
the bytes held.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from contextlib import nullcontext
from typing import Any

import torch


def main() -> None:
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    torch.set_grad_enabled(False)
    import kvpress
    from transformers import AutoModelForCausalLM, DynamicCache

    model: Any = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"])).eval()
    heads = [layer.self_attn for layer in model.model.layers]
    ids = torch.tensor([job["ids"]]).expand(job["batch"], -1)
    share = 1 - job["kept"] / ids.shape[1]
    presses: dict[str, Any] = {
        "DynamicCache": None,
        "SnapKVPress": kvpress.SnapKVPress(share),
        "AdaKVPress(SnapKVPress)": kvpress.AdaKVPress(kvpress.SnapKVPress(share)),
    }
    caches, masked = {}, {}
    for name, press in presses.items():
        caches[name] = DynamicCache(config=model.config)
        for head in heads:
            head.masked_key_indices = None
        with press(model) if press else nullcontext():
            model(ids, past_key_values=caches[name], logits_to_keep=1)
        masked[name] = [head.masked_key_indices for head in heads]  # what a press by head hides at every step
    token, seen = ids[:, -1:], ids.shape[1]
    seconds: dict[str, list[float]] = {name: [] for name in presses}
    for i in range(job["rounds"]):
        for name, cache in caches.items():
            for head, hidden in zip(heads, masked[name], strict=True):
                head.masked_key_indices = hidden
            for j in range(
                job["steps"] + 1
            ):  # the first brings back what the others pushed out of the processor's caches
                at = torch.full_like(token, seen + i * (job["steps"] + 1) + j)
                start = time.perf_counter()
                model(token, past_key_values=cache, position_ids=at, logits_to_keep=1)
                seconds[name] += [time.perf_counter() - start] if j else []
    held = {
        name: sum(x.untyped_storage().nbytes() for layer in cache.layers for x in (layer.keys, layer.values))
        for name, cache in caches.items()
    }
    versions = {name: importlib.metadata.version(name) for name in ("kvpress", "torch", "transformers")}
    json.dump({"versions": versions, "seconds": seconds, "bytes": held}, sys.stdout)


if __name__ == "__main__":
    main()
