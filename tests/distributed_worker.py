"""What each process of tests/test_distributed.py runs, and what one process alone runs for comparison.

python -m torch.distributed.run --standalone --nproc-per-node 2 tests/distributed_worker.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

import calidrop
from calidrop.store import Split, Store
from tiny import batch, generate, soft, tiny

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
        "lazy_eviction(budget=24, window=8)",
        "expected_attention(budget=24)",
        "pyramidkv(budget=24, recent=8)",
        "kivi(bits=4, group=16, residual=16)",
        f"{ADA}+kivi(bits=4, group=16)",
        "snapkv(budget=24, recent=8, every=8)+kvcrush",
        "adakv(budget=24, recent=8, every=8)+kvcrush(share=0.5)",
        f"{ADA}+decoquant(bits=16)",  # unrounded: at 4 bits, runs that differ by 2e-7 do by a step
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
CASES["decoquant where a process keeps nothing"] = ("adakv(budget=9, recent=8)+decoquant(bits=16)", {"rows": 1})
GATHERED = {recipe: (recipe, {}) for recipe in [ADA, f"{SNAP}+calidrop(recompute=0.0, decide='layer')"]}

SHAPE = {
    "vocab_size": 98,
    "num_hidden_layers": 4,
    "hidden_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


def softs() -> dict[str, tuple[str, dict]]:
    """Soft tokens do not cross the stages of a pipeline."""
    recipe = f"judge_q(budget=24, file={soft(tiny('llama', **SHAPE))!r})"
    return {
        "judge_q": (recipe, {}),
        "judge_q in chunks": (f"{recipe}+calidrop(recompute=0.0)", {"prefill_chunk_size": 20}),
    }


def models() -> dict[str, tuple[Any, dict]]:
    """Per name a model and its cases. Two processes share llama's kv heads; olmo2's tensor parallel plan gathers the
    keys again, so that each process has all heads, and their number may be odd."""
    llama = tiny("llama", **SHAPE)  # an even vocabulary: older versions cannot share another one
    olmo2 = tiny("olmo2", vocab_size=98, num_attention_heads=6, num_key_value_heads=3)
    return {"llama": (llama, CASES), "olmo2": (olmo2, GATHERED), "soft": (llama, softs())}


def run(model: Any, recipe: str, eager: bool = False, rows: int = 2, **kwargs: Any) -> dict[str, Any]:
    """Generate, and everything a process can say about its cache."""
    cache = calidrop.KVCache(model, recipe, eager=eager)
    inputs = batch(rows=rows, length=48, pads=(0, 7))
    tokens, logits = generate(model, inputs, cache, new=NEW, **kwargs)
    stores = [layer.state.store for layer in cache.layers]
    counts = [store.recomputed() for store in stores if store is not None]
    return {
        "tokens": tokens,
        "logits": logits,
        "kept": [kept(store) for store in stores],
        "factors": [factor(store) for store in stores],
        "recomputed": [sum(n) for n in zip(*counts, strict=True)],
        "rate": cache.recompute_rate,
        "bytes": (cache.nbytes, cache.host_nbytes, cache.full_nbytes),
        "length": cache.get_seq_length(),
        "lines": len(cache.describe().splitlines()),
    }


def kept(store: Store | None) -> torch.Tensor | None:
    """How many tokens each head keeps, [B,H]; None for none at all: no eviction, or a layer of another process."""
    held = store.kept.tokens() if isinstance(store, Split) else []
    return torch.stack([t.valid.sum(-1) for t in held]).sum(0) if held else None


def factor(store: Store | None) -> torch.Tensor | None:
    """What decoquant's factor of keys comes from, whatever the signs of its rows are, [B,1,1,16,16]."""
    small = getattr(getattr(getattr(store, "kept", None), "of_keys", None), "small", None)
    return None if small is None else small.mT @ small


def runs(model: Any, cases: dict) -> dict[str, dict[str, Any]]:
    return {name: run(model, recipe, **kwargs) for name, (recipe, kwargs) in cases.items()}


def main(folder: Path) -> None:
    from transformers.distributed import DistributedConfig

    tensor, pipeline = DistributedConfig(tp_size=2), DistributedConfig(pp_size=2)
    results = {}
    for mode, name, config, cases in [
        ("tensor parallel", "llama", tensor, CASES),
        ("tensor parallel", "olmo2", tensor, GATHERED),
        ("tensor parallel", "soft", tensor, softs()),
        ("pipeline parallel", "llama", pipeline, CASES),
    ]:
        model = AutoModelForCausalLM.from_pretrained(folder / name, distributed_config=config, dtype=torch.float32)
        results[mode, name] = runs(model, cases)
    torch.save(results, folder / f"{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
