"""Whether decoding stays as small and as fast as it was: thousands of tokens generated under a budget.

python -m benchmarks.flat [--tokens 8192] [--budget 512] [--recipe R ...]

A random model with two layers of SmolLM2's shape (9 query and 3 kv heads of 64), one row, random tokens. Per recipe:
the most tokens a kv head ever held, the most bytes, and the median CPU time of a token in the first 1024 after the
budget was reached and in the last 1024. `full` shows what growing looks like.
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from calidrop import KVCache
from calidrop.layer import LayerKV
from calidrop.plugin import using

RECIPES = [
    "full",
    "streaming_llm(budget={0})",
    "snapkv(budget={0}, every=16)",
    "h2o(budget={0})",
    "tova(budget={0})",
    "lazy_eviction(budget={0})",
    "lazy_eviction(budget={0})+int4",
]
SPAN = 1024


def small() -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 2, "vocab_size": 1000}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 65536}
    return LlamaForCausalLM(LlamaConfig(**shape, **heads, initializer_range=0.1)).eval()


def held(layer: LayerKV) -> int:
    """The most tokens any kv head answers from."""
    s = layer.state
    stored = s.store.tokens() if s.store is not None else []
    return len(s.window) + max([0, *sum((t.valid.sum(-1) for t in stored), torch.zeros(1)).flatten().int().tolist()])


@torch.inference_mode()
def run(model: Any, recipe: str, tokens: int, prompt: int) -> tuple[list[int], list[int], list[float]]:
    """After each generated token: tokens held, bytes held, milliseconds it took."""
    cache = KVCache(model, recipe, eager=True)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 1000, (1, prompt + tokens), generator=draw)
    model(ids[:, :prompt], **using(cache))
    most, size, spent = [], [], []
    for i in range(prompt, prompt + tokens):
        start = time.thread_time()
        model(ids[:, i : i + 1], **using(cache))
        spent.append(1000 * (time.thread_time() - start))
        size.append(cache.nbytes)
        most.append(max(held(layer) for layer in cache.layers))
    return most, size, spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", action="append", default=[])
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = small()
    print(f"{'recipe':40} {'tokens':>7} {'kB':>8} {'ms, first 1024':>15} {'last 1024':>10} {'ratio':>6}")
    for recipe in args.recipe or [text.format(args.budget) for text in RECIPES]:
        most, size, spent = run(model, recipe, args.tokens, args.prompt)
        reached = max(0, args.budget - args.prompt)
        first, last = median(spent[reached : reached + SPAN]), median(spent[-SPAN:])
        print(
            f"{recipe:40} {max(most):7} {max(size) / 1e3:8.0f} {first:15.2f} {last:10.2f} {last / first:6.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
