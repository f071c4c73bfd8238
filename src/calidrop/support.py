"""Which models work, and what a cache must know of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from calidrop.rope import Rope

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
}
INTERLEAVED = ("cohere", "cohere2", "glm", "glm4", "glm4_moe", "ernie4_5", "llama4_text", "gptj", "helium")
KNOWN_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")


def check_model(model: Any) -> Any:
    """The decoder's config. Raises ValueError that names the model and the reason when it cannot work."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "set_attn_implementation"):
        raise ValueError(f"expected a transformers model, got {type(model).__name__}")
    text = config.get_text_config(decoder=True)
    reason = REFUSED.get(text.model_type)
    if reason is None and getattr(config, "is_encoder_decoder", False):
        reason = "encoder-decoder models are not supported"
    if reason is None and getattr(text, "kv_lora_rank", None):
        reason = "multi-head latent attention caches latents, not keys and values"
    if reason is None and (getattr(text, "num_kv_shared_layers", None) or 0) > 0:
        reason = "its layers share keys and values"
    if reason is None and not getattr(model, "_supports_attention_backend", False):
        reason = "its attention does not use transformers' attention interface"
    if reason is None:
        unknown = sorted(set(getattr(text, "layer_types", None) or ()) - set(KNOWN_LAYERS))
        if unknown:
            reason = f"it has layers of kind {', '.join(unknown)}"
    if reason is not None:
        raise ValueError(f"{type(model).__name__} ({text.model_type}) is not supported: {reason}")
    return text


def layer_kinds(config: Any) -> list[int | None]:
    """Per layer: None where attention reaches back without bound, else how many tokens it reaches."""
    window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    return [{"sliding_attention": window, "chunked_attention": chunk}.get(kind) for kind in _kinds(config)]


def in_chunks(config: Any) -> bool:
    """Whether some layers see only the chunk of the sequence that they are in."""
    return "chunked_attention" in _kinds(config) and bool(config.attention_chunk_size)


def _kinds(config: Any) -> list[str]:
    window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    usual = "sliding_attention" if window else "chunked_attention" if chunk else "full_attention"
    return getattr(config, "layer_types", None) or [usual] * config.num_hidden_layers


def rope_of(model: Any) -> Rope | None:
    """The rotary frequencies of the full-attention layers; None if there are none, or not in half-split layout."""
    if check_model(model).model_type in INTERLEAVED:
        return None
    for module in model.modules():
        for name in ("full_attention_inv_freq", "inv_freq"):
            freq = getattr(module, name, None)
            if isinstance(freq, Tensor):
                return Rope(freq.detach().float())
    return None


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
