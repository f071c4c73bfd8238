"""Decoding of models whose weights are not at hand: a few layers of their shapes, with random weights, which are as
fast.

python -m benchmarks.shapes [--shape deepseek-v2-lite] [--layers N] [--contexts 4096] [--batches 1] [--dtype bfloat16]
                            [--recipe R ...] [--compiled] [--prefill] [--rounds 3] [--steps 4] [--json OUT]

Attention is of the model's shape; what is behind it in a layer is one dense layer as wide as the experts that a token
takes, and the vocabulary is small. Rows are those of `benchmarks.decode` or (`--prefill`) `benchmarks.prefill`, over
tokens drawn at random.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

import calidrop
from benchmarks import prefill
from benchmarks.decode import Bench, rows
from calidrop import ops

DENSE = {"first_k_dense_replace": 99, "n_routed_experts": 8, "num_experts_per_tok": 2, "rope_parameters": None}
SHAPES: dict[str, tuple[str, int, dict[str, Any]]] = {  # model type, layers, what differs from its defaults
    "deepseek-v2-lite": ("deepseek_v2", 4, {
        **DENSE, "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None,
        "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "intermediate_size": 8 * 1408,
    }),
    "glm-4.7-flash": ("glm4_moe_lite", 4, {**DENSE, "intermediate_size": 5 * 1536}),
    "gemma-3n-e2b": ("gemma3n_text", 15, {"intermediate_size": 8192, "hidden_size_per_layer_input": 256}),
    "llama-3.1-8b": ("llama", 4, {
        "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
    }),
}  # fmt: skip
RECIPES = ["full", "int8", "int4", "snapkv(budget=512)", "snapkv(budget=512)+calidrop", "snapkv(budget=512)+int4"]
WORDS = 8192


def made(shape: str, layers: int | None, dtype: torch.dtype, **changes: Any) -> Any:
    """A model of so many layers (None: a few). changes: to its config."""
    kind, usual, given = SHAPES[shape]
    n = layers or usual
    given = {**given, "num_hidden_layers": n, "vocab_size": WORDS, "max_position_embeddings": 1 << 17, **changes}
    if kind == "gemma3n_text":  # a third of its layers ask the keys and values of others
        given |= {"vocab_size_per_layer_input": WORDS, "num_kv_shared_layers": n // 3}
        given |= {"intermediate_size": [given["intermediate_size"]] * n, "activation_sparsity_pattern": [0.0] * n}
    elif "first_k_dense_replace" in given:
        given |= {"mlp_layer_types": ["dense"] * n}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **given), dtype=dtype).eval()
    calidrop.fast_linear(model)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="deepseek-v2-lite")
    parser.add_argument("--layers", type=int, help="default: a few")
    parser.add_argument("--contexts", default="4096")
    parser.add_argument("--batches", default="1", help="each a multiple of the one before")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--recipe", action="append", help="default: a selection")
    parser.add_argument("--compiled", action="store_true", help="every recipe compiled too; minutes at the first step")
    parser.add_argument("--prefill", action="store_true", help="time prompts, one row each, rather than steps")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="of each cache in each round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    model = made(args.shape, args.layers, getattr(torch, args.dtype))
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    layers = model.config.num_hidden_layers
    machine = f"{args.shape}, {layers} layers; {versions}, {args.dtype}, {args.threads} threads"
    print(f"{machine}; {ops.backend(torch.device('cpu'))}")
    decoding = f"{'context':>7} {'batch':>5} {'cache':56} {'best ms':>9} {'median ms':>9} {'MB':>8} {'times':>7}"
    print(prefill.HEAD if args.prefill else decoding)
    recipes = args.recipe or RECIPES
    found, bench = [], None if args.prefill else Bench(model, recipes, args.compiled)
    for context in map(int, args.contexts.split(",")):
        ids = torch.randint(3, WORDS, (1, context), generator=torch.Generator().manual_seed(1))
        if bench is None:
            found += prefill.measure(model, ids, recipes, args.rounds)
            prefill.show(found[-len(recipes) - 1 :])
            continue
        batches = [int(b) for b in args.batches.split(",")]
        found += rows(bench, ids, batches, args.rounds, args.steps, partial(print, flush=True))
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "rows": [asdict(row) for row in found]}, indent=1))


if __name__ == "__main__":
    main()
