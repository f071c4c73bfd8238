"""Evictors where earlier layers make no error: how much of the true attention each layer loses, step by step.

python -m benchmarks.open_loop [--budget 512] [--recipe R ...] [--tokens 4096] [--text FILE] [--layers 6]

Queries, keys and values of one forward pass over a text (default: The Time Machine) are fed to single layers again, the
first 128 tokens as a prompt, the rest one by one. Per recipe, over the steps after the budget was first exceeded: the
attention weight that the full cache gives to evicted tokens, and the error of the output relative to its size, both
with the standard error over layers; and the most tokens a head held. Cheap: no step runs the model. For `lazy_eviction`
also what its paper calibrates by, over the tokens that are held: the part of them active in a step, the part never
active, and the 80th percentile of the longest silence (there: the window).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import calidrop
from benchmarks.flat import held
from calidrop import KVCache
from calidrop.layer import LayerKV
from calidrop.masks import PositionMask
from calidrop.methods import h2o, lazy_eviction, snapkv, streaming_llm, tova
from calidrop.parts import Part
from calidrop.plugin import using
from calidrop.recipe import Recipe, parse
from calidrop.terminal import read_text

PROMPT = 128


def defaults(n: int) -> list[Part]:
    lazy = [lazy_eviction(n, window=w, alpha=a) for a in (1e-4, 5e-4, 2e-3, 1e-2) for w in (16, 64, 128)]
    born = [lazy_eviction(n, alpha=a, birth=False) for a in (5e-4, 1e-2)]
    return [streaming_llm(n), snapkv(n, every=16), h2o(n), tova(n), *lazy, *born]


@torch.inference_mode()
def record(model: Any, ids: Tensor, layers: list[int]) -> list[tuple[Tensor, ...]]:
    """Of each layer q [1,Hq,N,D], k, v [1,H,N,D], o [1,Hq,N,D] and lse [1,Hq,N] of attention over everything."""
    n = ids.shape[1]
    cache, found = KVCache(model, snapkv(budget=n + 1, recent=n)), []
    model(ids, **using(cache), logits_to_keep=1)
    for i in layers:
        s = cache.layers[i].state
        q, k, v = s.obs.queries.q, s.window.k.value, s.window.v.value
        o = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        found.append((q, k, v, o, s.obs.lse))
    return found


@torch.inference_mode()
def replay(kv: LayerKV, recorded: tuple[Tensor, ...], budget: int) -> dict[str, float]:
    q, k, v, o, lse = recorded
    n, lost, error, most = q.shape[2], [], [], 0
    active: list[Tensor] = []
    for start, stop in [(0, PROMPT), *((i, i + 1) for i in range(PROMPT, n))]:
        at = slice(start, stop)
        kv.update(k[:, :, at], v[:, :, at])
        out = kv.attend(q[:, :, at], PositionMask(), q.shape[-1] ** -0.5, None, None)
        if stop <= budget + 1:
            continue
        lost.append(1 - (kv.state.obs.lse[:, :, -1] - lse[:, :, start]).exp().clamp(max=1).mean())
        error.append((out - o[:, :, at]).norm() / o[:, :, at].norm())
        most = max(most, held(kv))
        if "silent" in kv.state.window.stats:
            silent = [t.stats["silent"] for t in (*kv.state.store.tokens(), kv.state.window.tokens())]
            active.append((torch.cat(silent, 2) == 0).float().mean())
    told = {"lost": float(torch.stack(lost).mean()), "error": float(torch.stack(error).mean()), "most": float(most)}
    if active:
        longest = torch.cat([t.stats["longest"] for t in kv.state.store.tokens()], 2).float()
        told |= {"active": float(torch.stack(active).mean()), "never": float((longest == 0).float().mean())}
        told["silence"] = float(longest.quantile(0.8))
    return told


def line(recipe: Part | Recipe, told: list[dict[str, float]]) -> str:
    columns = {name: torch.tensor([x[name] for x in told]) for name in told[0]}
    lost, error = (f"{x.mean():.4f} ±{x.std() / len(x) ** 0.5:.4f}" for x in (columns["lost"], columns["error"]))
    text = f"{recipe!s:52} {lost} {error} {columns['most'].max():6.0f}"
    if "active" in columns:
        text += f"   {columns['active'].mean():6.1%} {columns['never'].mean():6.1%} {columns['silence'].mean():6.0f}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", action="append", default=[])
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=6, help="how many, at even strides")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = calidrop.load()
    ids = torch.tensor([tokenizer(read_text(args.text)[20000:], verbose=False)["input_ids"][: args.tokens]])
    every = model.config.num_hidden_layers
    layers = [i * every // args.layers + every // (2 * args.layers) for i in range(args.layers)]
    recorded = record(model, ids, layers)
    print(f"{'recipe':52} {'lost':>14} {'output error':>14} {'tokens':>6}   {'active':>6} {'never':>6} {'silence':>6}")
    for recipe in [parse(recipe) for recipe in args.recipe] or defaults(args.budget):
        fresh = KVCache(model, recipe, eager=True).layers
        told = [replay(fresh[i], x, args.budget) for i, x in zip(layers, recorded, strict=True)]
        print(line(recipe, told), flush=True)


if __name__ == "__main__":
    main()
