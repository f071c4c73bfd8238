"""What each process of tests/test_distributed.py runs, and what one process alone runs for comparison.

python -m torch.distributed.run --standalone --nproc-per-node 2 tests/distributed_worker.py tp|pp FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

import calidrop
from tiny import batch, generate, tiny

NEW = 18
SNAP, ADA = "snapkv(budget=24, recent=8)", "adakv(budget=24, recent=8)"
CASES: dict[str, tuple[str, dict]] = {
    recipe: (recipe, {})
    for recipe in [
        "full",
        SNAP,
        ADA,
        "adakv(budget=24, recent=8, every=8)",  # heads of unequal length are ranked again
        "tova(budget=24)",
        "h2o(budget=24)",
        "expected_attention(budget=24)",
        "pyramidkv(budget=24, recent=8)",
        "kivi(bits=4, group=16, residual=16)",
        f"{ADA}+kivi(bits=4, group=16)",
        f"{SNAP}+calidrop(recompute=0.0, decide='head')",
        f"{SNAP}+calidrop(recompute=0.0, decide='layer')",
        # so few tokens are evicted that some process has none of them
        "adakv(budget=47, recent=8, every=8)+calidrop(recompute=0.0, decide='layer')",
        f"{ADA}+calidrop(summary=4, offload=False)",
    ]
}
CASES["a prompt in chunks"] = (ADA, {"eager": True, "prefill_chunk_size": 20})
CASES["beam search"] = (SNAP, {"num_beams": 2})
CASES["assisted"] = (SNAP, {"rows": 1, "prompt_lookup_num_tokens": 3})
GATHERED = {recipe: (recipe, {}) for recipe in [ADA, f"{SNAP}+calidrop(recompute=0.0, decide='layer')"]}


def models() -> dict[str, tuple[Any, dict]]:
    """Per name a model and its cases. Two processes share llama's kv heads; olmo2's tensor parallel plan gathers the
    keys again, so that each process has all heads, and their number may be odd."""
    llama = tiny("llama", num_hidden_layers=4, hidden_size=128, num_attention_heads=8, num_key_value_heads=4)
    olmo2 = tiny("olmo2", num_attention_heads=6, num_key_value_heads=3)
    return {"llama": (llama, CASES), "olmo2": (olmo2, GATHERED)}


def run(model: Any, recipe: str, eager: bool = False, rows: int = 2, **kwargs: Any) -> dict[str, Any]:
    """Generate, and everything a process can say about its cache."""
    cache = calidrop.KVCache(model, recipe, eager=eager)
    inputs = batch(rows=rows, length=48, pads=(0, 7))
    tokens, logits = generate(model, inputs, cache, new=NEW, **kwargs)
    stores = [layer.state.store for layer in cache.layers]
    kept = [getattr(getattr(store, "kept", None), "held", None) for store in stores]
    counts = [store.recomputed() for store in stores if store is not None]
    return {
        "tokens": tokens,
        "logits": logits,
        "kept": [None if held is None else held.lens for held in kept],  # [B,H] of every layer held here
        "recomputed": [sum(n) for n in zip(*counts, strict=True)],
        "rate": cache.recompute_rate,
        "bytes": (cache.nbytes, cache.host_nbytes, cache.full_nbytes),
        "length": cache.get_seq_length(),
        "lines": len(cache.describe().splitlines()),
    }


def runs(model: Any, cases: dict) -> dict[str, dict[str, Any]]:
    return {name: run(model, recipe, **kwargs) for name, (recipe, kwargs) in cases.items()}


def main(mode: str, folder: Path) -> None:
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(tp_size=2) if mode == "tp" else DistributedConfig(pp_size=2)
    results = {}
    for name, cases in ({"llama": CASES, "olmo2": GATHERED} if mode == "tp" else {"llama": CASES}).items():
        model = AutoModelForCausalLM.from_pretrained(folder / name, distributed_config=config, dtype=torch.float32)
        results[name] = runs(model, cases)
    torch.save(results, folder / f"{mode}{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]))
