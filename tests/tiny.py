"""Tiny random models of many families. Weights are drawn wide, so that greedy tokens are decisive."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
import transformers

from calidrop.cache import layers_of
from calidrop.methods._artefact import facts, key_samples
from calidrop.methods.judge_q import SoftTokens
from calidrop.plugin import using

COMMON = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 24},
    "gemma2": {
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "attn_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 16,
    },
    "gemma3_text": {
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "query_pre_attn_scalar": 16,
    },
    "phi3": {"head_dim": 8},
    "gpt_oss": {
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo2": {},
}


def tiny(family: str = "llama", **changes) -> torch.nn.Module:
    config = transformers.AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **changes})
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    if family == "gpt_oss":  # sinks start at zero or unset memory; give them something to do
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.sinks)
    return model


def batch(rows: int = 2, length: int = 61, pads: tuple[int, ...] = (0, 13), seed: int = 0) -> dict:
    """Random left-padded prompts."""
    ids = torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads[:rows]):
        mask[row, :pad] = 0
        ids[row, :pad] = 0
    return {"input_ids": ids, "attention_mask": mask}


def row(inputs: dict, i: int) -> dict:
    """Row i alone, without its pads."""
    keep = inputs["attention_mask"][i].bool()
    return {name: x[i : i + 1, keep] for name, x in inputs.items()}


def generate(model, inputs: dict, cache=None, new: int = 24, **kwargs):
    """Greedy; returns (tokens [B,new], logits [B,new,vocab] or None)."""
    out = model.generate(
        **inputs,
        **using(cache),
        **{"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, "output_logits": True, **kwargs},
        return_dict_in_generate=True,
    )
    logits = torch.stack(out.logits, 1) if out.logits else None
    return out.sequences[:, inputs["input_ids"].shape[1] :], logits


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def soft(model: torch.nn.Module | None = None, n: int = 5, **meta) -> str:
    """A file of random soft tokens for judge_q, for `model` or for any of the shape in `meta`. The name depends on the
    arguments alone, so that every process of a test run names its recipes alike."""
    if model is not None:
        layers = [layer for layer, reach in layers_of(model) if reach is None]
        meta = facts(layers, model.config.hidden_size) | meta
        samples = key_samples(layers)
    else:
        samples = torch.zeros(meta["layers"], 64)
    folder = Path(tempfile.gettempdir()) / "calidrop-tests"
    folder.mkdir(exist_ok=True)
    file = folder / f"{'-'.join(f'{name}-{x}' for name, x in meta.items())}-{n}.safetensors"
    rows = torch.randn(n, meta["hidden"], generator=torch.Generator().manual_seed(5)) * 0.5
    beside = file.with_name(f"{file.name}.{os.getpid()}")
    SoftTokens({"model": "tiny", **meta}, rows, samples).save(beside)
    beside.replace(file)
    return str(file)
