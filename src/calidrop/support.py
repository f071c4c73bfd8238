"""Which models work, and what a cache must know of them."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import DynamicCache

from calidrop.mla import latent_modules, refusal
from calidrop.rope import Rope
from calidrop.rotary import rotations

# Models whose attention does not hand keys and values to the attention interface untouched.
REFUSED = {
    "falcon": "its attention does not use transformers' attention interface",
    "bloom": "its attention does not use transformers' attention interface (ALiBi)",
    "mpt": "its attention does not use transformers' attention interface (ALiBi)",
    "gptj": "its attention does not use transformers' attention interface",
    "codegen": "its attention does not use transformers' attention interface",
    "gpt_neo": "its attention does not use transformers' attention interface",
    "diffllama": "it reshapes cached keys and values inside the layer",
    "jetmoe": "it reshapes cached keys and values inside the layer",
    "mllama_text_model": "its layers with cross-attention look into the cache for the keys of images",
    "minimax": "its linear layers need a cache of a class of their own",
}
KNOWN_LAYERS = ("full_attention", "sliding_attention", "chunked_attention", "hybrid", "hybrid_sliding")
HYBRIDS = 5, 17  # the first version of transformers with which the others of these are tested
BOTH = ("hybrid", "hybrid_sliding")  # which have keys and values, and a state of constant size
WITHOUT_KEYS = ("linear_attention", "conv", "moe", "mlp")  # what they keep, if anything, does not grow


def check_model(model: Any) -> Any:
    """The decoder's config. Raises ValueError that names the model and the reason when it cannot work."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "set_attn_implementation"):
        raise ValueError(f"expected a transformers model, got {type(model).__name__}")
    text = config.get_text_config(decoder=True)
    reason = REFUSED.get(text.model_type)
    if reason is None and getattr(config, "is_encoder_decoder", False):
        reason = "encoder-decoder models are not supported"
    if reason is None and caches_latents(text):
        reason = _unlike(model, text)
    if reason is None and not _uses_interface(model, text):
        reason = "its attention does not use transformers' attention interface"
    if reason is None:
        unknown = sorted(set(getattr(text, "layer_types", None) or ()) - {*KNOWN_LAYERS, *WITHOUT_KEYS})
        if unknown:
            reason = f"it has layers of kind {', '.join(unknown)}"
        elif not layer_kinds(text):
            reason = "none of its layers has keys and values of its own"
        elif not plain(text) and tuple(map(int, transformers.__version__.split(".")[:2])) < HYBRIDS:
            least = ".".join(map(str, HYBRIDS))
            reason = f"layers of its kinds need transformers {least}, got {transformers.__version__}"
    if reason is not None:
        raise ValueError(f"{type(model).__name__} ({text.model_type}) is not supported: {reason}")
    return text


def _unlike(model: Any, text: Any) -> str | None:
    """Why its multi-head latent attention is none that is known."""
    modules = latent_modules(model)
    if len({x.kv_lora_rank + x.qk_rope_head_dim for x in _each(text)}) > 1:
        return "its layers cache latents of several sizes"
    if any(i not in modules for i in layer_kinds(text)):
        return "its multi-head latent attention is not made as transformers 5.17 and newer make it"
    if any(layer_kinds(text).values()):
        return "layers with multi-head latent attention that see a window are not known"
    if getattr(text, "index_topk", None):
        return "an indexer of its own picks the tokens that are attended to"
    return next((f"multi-head latent attention: {why}" for m in modules.values() if (why := refusal(m))), None)


def caches_latents(config: Any) -> bool:
    """Whether its layers with keys and values cache latents in place of these (multi-head latent attention)."""
    return any(getattr(x, "kv_lora_rank", None) for x in _each(config))


def _uses_interface(model: Any, text: Any) -> bool:
    """Whether attention goes through transformers' interface. Most hybrid models do not say, so what they are made of
    is asked; should it be wrong, `plugin.Handle` raises where keys are touched."""
    if getattr(model, "_supports_attention_backend", False):
        return True
    made_in = {type(module).__module__ for module in model.modules()}
    known = any(hasattr(sys.modules[name], "ALL_ATTENTION_FUNCTIONS") for name in made_in)
    return known and not plain(text)


def others(config: Any) -> dict[int, Any]:
    """Layers without keys and values, by their index: what transformers keeps of them, which does not grow."""
    found = [i for i, kind in enumerate(_kinds(config)) if kind in WITHOUT_KEYS]
    made = DynamicCache(config=config).layers if found else []
    return {i: made[i] for i in found}


def states(config: Any) -> dict[int, int]:
    """Layers with keys and values that keep a state of constant size too, by their index: how many parts it has."""
    many = getattr(config, "number_of_conv_states", 1)
    return {i: many for i, kind in enumerate(_kinds(config)) if kind in BOTH}


def stateful(config: Any) -> list[str]:
    """The kinds of those of its layers that keep no keys and values, or something beside them."""
    return [kind for kind in _kinds(config) if kind in (*WITHOUT_KEYS, *BOTH)]


def sharing(config: Any) -> dict[int, int]:
    """Layers with keys and values that other layers ask too, by their index: how many ask them, the layer itself
    included (Gemma 3n, Gemma 4: the last layers ask those of the last of their kind before them)."""
    return {own: 1 + n for own, n in Counter(sharers(config).values()).items()}


def sharers(config: Any) -> dict[int, int]:
    """Which layer's keys and values those without any of their own ask, by their index."""
    kinds, first = _kinds(config), _first_shared(config)
    last = {kind: i for i, kind in enumerate(kinds[:first])}
    return {i: last.get(kind, -1) for i, kind in enumerate(kinds) if i >= first}


def _first_shared(config: Any) -> int:
    """The index of the first layer that has no keys and values of its own, but asks another's."""
    return len(_kinds(config)) - (getattr(config, "num_kv_shared_layers", None) or 0)


def plain(config: Any) -> bool:
    """Whether its layers keep keys and values of their own, as they are, and nothing else."""
    return not stateful(config) and not sharing(config) and not caches_latents(config)


def check_plain(model: Any, what: str) -> None:
    """Raises ValueError for what is not there for other models."""
    text = check_model(model)
    name = f"{type(model).__name__} ({text.model_type})"
    if kinds := sorted(set(stateful(text))):
        raise ValueError(
            f"{what} needs layers with keys and values and nothing else; {name} has layers of kind {', '.join(kinds)}"
        )
    if caches_latents(text):
        raise ValueError(f"{what} needs keys and values; {name} caches latents (multi-head latent attention)")
    if n := sum(asking - 1 for asking in sharing(text).values()):
        raise ValueError(
            f"{what} needs layers with keys and values of their own; {n} layers of {name} ask those of others"
        )


def layer_kinds(config: Any) -> dict[int, int | None]:
    """Layers with keys and values of their own, by their index: None where attention reaches back without bound, else
    how many tokens it reaches."""
    window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    reach = {"sliding_attention": window, "hybrid_sliding": window, "chunked_attention": chunk}
    own = _kinds(config)[: _first_shared(config)]
    return {i: reach.get(kind) for i, kind in enumerate(own) if kind not in WITHOUT_KEYS}


def heads_of(config: Any) -> list[tuple[int, int, int]]:
    """Per layer: query heads, kv heads and head dim; of latents, one head of all that is cached."""
    found = []
    for x in _each(config):
        q_heads = x.num_attention_heads
        if caches_latents(x):
            found.append((q_heads, 1, x.kv_lora_rank + x.qk_rope_head_dim))
            continue
        kv_heads = getattr(x, "num_key_value_heads", None) or q_heads
        found.append((q_heads, kv_heads, getattr(x, "head_dim", None) or x.hidden_size // q_heads))
    return found


def _each(config: Any) -> Sequence[Any]:
    """The config of each layer: what may differ is not said of all together."""
    return getattr(config, "per_layer_config", None) or [config] * config.num_hidden_layers


def check_alike(config: Any, what: str) -> None:
    """Raises ValueError where layers with keys and values differ in their heads."""
    heads = heads_of(config)
    shapes = sorted({heads[i][1:] for i in layer_kinds(config)})
    if len(shapes) > 1:
        told = ", ".join(f"{n} kv heads of {dim}" for n, dim in shapes)
        raise ValueError(f"{what} needs layers of one shape; those of {config.model_type} have {told}")


def in_chunks(config: Any) -> bool:
    """Whether some layers see only the chunk of the sequence that they are in."""
    return "chunked_attention" in _kinds(config) and bool(config.attention_chunk_size)


def _kinds(config: Any) -> list[str]:
    window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    usual = "sliding_attention" if window else "chunked_attention" if chunk else "full_attention"
    return getattr(config, "layer_types", None) or [usual] * config.num_hidden_layers


def ropes_of(model: Any) -> dict[int, Rope]:
    """How the layers that see all rotate their keys: those that do so as `Rope` does, which may be not at all."""
    text = check_model(model)
    decoder = model.get_decoder()  # not all of the model: vision towers have frequencies of their own
    if caches_latents(text):
        return {}
    heads, whole = heads_of(text), [i for i, reach in layer_kinds(text).items() if reach is None]
    ropes = rotations(decoder, text, whole)
    return {i: rope for i, rope in ropes.items() if 2 * len(rope.inv_freq) <= heads[i][2]}


def attention_modules(model: nn.Module) -> dict[int, nn.Module]:
    """The attention of each layer that has a key projection to itself."""
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and isinstance(getattr(module, "k_proj", None), nn.Module):
            found.setdefault(index, module)
    return found


def key_sample(attention: nn.Module | None) -> Tensor | None:
    """Some of its key weights, fp32 [64]; None where they are quantized or not in memory."""
    weight: Any = getattr(getattr(attention, "k_proj", None), "weight", None)
    if not isinstance(weight, Tensor) or weight.is_meta or not weight.is_floating_point():
        return None
    return weight.detach()[0, :64].float().clone()
