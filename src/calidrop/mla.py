"""Multi-head latent attention (DeepSeek, GLM-4.7-Flash, Mistral 4): what is cached is one latent a token and what
carries its position, [R + P] numbers that all heads share, and keys and values of a head are linear in them.

transformers makes keys and values of all cached latents at every step. Here queries go to the latents instead, which is
the same product in another order (DeepSeek-V2, arXiv 2405.04434, sec. 2.1.2): a token is one key of R + P numbers for
all query heads, and its own value; the mean of latents that a head is answered becomes its value at the
end. Prompts are attended as transformers does, by their own keys and values.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from calidrop import ops
from calidrop.attention import Partial, Queries, merge, with_sink
from calidrop.layer import LayerKV
from calidrop.masks import PositionMask
from calidrop.ops.piece import Piece
from calidrop.parts import Plan
from calidrop.plugin import Handle, compiling
from calidrop.tokens import Tokens

NEEDED = ("expand_kv", "kv_b_proj", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def latent_modules(model: nn.Module) -> dict[int, nn.Module]:
    """The attention of each layer that caches latents."""
    found = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and all(hasattr(module, name) for name in NEEDED):
            found[index] = module
    return found


class Up:
    """What makes keys and values of latents: views of the weights of a layer. keys: [H,N,R], values: [H,Dv,R]."""

    def __init__(self, module: Any):
        weight, n, dim = module.kv_b_proj.weight, module.qk_nope_head_dim, module.v_head_dim
        if weight.is_meta:
            raise RuntimeError("multi-head latent attention: the weights of kv_b_proj are not in memory (offloaded)")
        both = weight.unflatten(0, (-1, n + dim))
        self.keys, self.values, self.rank = both[:, :n], both[:, n:], module.kv_lora_rank

    def absorbed(self, q: Tensor) -> Tensor:
        """Queries [B,H,T,N+P] as they ask latents: [B,H,T,R+P]."""
        n = self.keys.shape[1]
        return torch.cat([_by_head(q[..., :n], self.keys), q[..., n:]], -1)

    def valued(self, o: Tensor) -> Tensor:
        """Means of latents [B,H,T,R+P] as means of values [B,H,T,Dv]."""
        return _by_head(o[..., : self.rank].to(self.values.dtype), self.values.transpose(1, 2))


def _by_head(x: Tensor, matrix: Tensor) -> Tensor:
    """x: [B,H,T,n], matrix: [H,n,m] -> [B,H,T,m]."""
    B, _, T, _ = x.shape
    return torch.bmm(x.transpose(0, 1).flatten(1, 2), matrix).unflatten(1, (B, T)).transpose(0, 1)


_known: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()  # what `refusal` said


def refusal(module: nn.Module) -> str:
    """Why its latents cannot be asked; "" where they can."""
    if module not in _known:
        _known[module] = _refusal(module)
    return _known[module]


def _refusal(module: Any) -> str:
    proj = module.kv_b_proj
    weight = getattr(proj, "weight", None)
    if not isinstance(proj, nn.Linear) or not isinstance(weight, Tensor) or not weight.is_floating_point():
        return f"kv_b_proj is a {type(proj).__name__} without plain weights"
    if proj.bias is not None:
        return "kv_b_proj has a bias"
    if weight.is_meta:
        return ""
    up, draw = Up(module), torch.Generator().manual_seed(0)
    z, p = (
        torch.randn(1, 1, 3, n, generator=draw, dtype=torch.float32, device="cpu").to(weight)
        for n in (up.rank, module.qk_rope_head_dim)
    )
    with torch.no_grad():  # whatever a module does beside this one linear layer would show
        found = module.expand_kv(z, p)
        rows = p.expand(1, len(up.keys), *p.shape[2:])
        want = torch.cat([z @ up.keys.transpose(1, 2), rows], -1), z @ up.values.transpose(1, 2)
    for x, y in zip(found, want, strict=True):
        near = 0.02 * float(y.float().square().mean().sqrt())
        if x.shape != y.shape or not torch.allclose(x.float(), y.float(), atol=near, rtol=0.02):
            return "its keys and values are something else than kv_b_proj makes of latents"
    return ""


def let_through(kind: Any) -> None:
    """Lets `Handle`s through where modules of a class expand what a cache gave them."""
    original = kind.expand_kv
    if hasattr(original, "original"):
        return

    @functools.wraps(original)
    def expand_kv(self: Any, kv_nope: Any, k_rot: Any) -> Any:
        given = compiling() or isinstance(kv_nope, Handle)
        return (kv_nope, k_rot) if given else original(self, kv_nope, k_rot)

    expand_kv.original = original  # type: ignore[attr-defined]
    kind.expand_kv = expand_kv


class LatentKV(LayerKV):
    """Latents. Stores see a layer with one kv head, whose values are its keys."""

    def __init__(self, module: nn.Module, make: Callable[[], Plan], reach: int | None = None, eager: bool = False):
        self.module = weakref.ref(module)
        super().__init__(make, reach, eager)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """key_states: the latents [B,1,T,R], value_states: what carries positions [B,1,T,P]."""
        k = torch.cat([key_states, value_states], -1)
        return super().update(k, k[..., :0], *args, **kwargs)

    def answers(self, v: Tensor) -> int:
        return self._of().v_head_dim

    def _of(self) -> Any:
        module = self.module()
        if module is None:
            raise RuntimeError("the model of this cache is gone")
        return module

    def attend(self, q: Tensor, mask: PositionMask, scale: float, softcap: float | None, sink: Tensor | None) -> Tensor:
        self.up, self.q = Up(self._of()), q
        try:
            return super().attend(self.up.absorbed(q), mask, scale, softcap, sink)
        finally:
            del self.up, self.q

    def _asked(
        self, qs: Queries, new: Tokens, sink: Tensor | None, parts: list[Partial | Piece]
    ) -> tuple[Tensor, Tensor, ops.Heard | None]:
        o, lse, heard = super()._asked(qs, new, sink, parts)
        return self.up.valued(o), lse, heard

    def _block(
        self, qs: Queries, new: Tokens, before: int, sink: Tensor | None, sums: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        s = self.state
        parts = s.store.attend(qs) if s.store else []
        if before:
            parts.append(ops.attend(qs, s.window.tokens().slice(0, before)))
        own = replace(qs, q=self.q[:, :, : len(qs)])  # what is a prompt comes first
        k, v = self._of().expand_kv(*new.k.split((self.up.rank, new.k.shape[-1] - self.up.rank), -1))
        t = Tokens(k, v, new.pos.expand(*k.shape[:3]), dense=new.dense)
        found, mass = ops.prompt_with_mass(own, t) if sums else (ops.prompt(own, t), None)
        if parts:
            o, lse = ops.joined(qs, parts)
            found = merge([(self.up.valued(o), lse), found])
        return *with_sink(own, found, sink), None if mass is None else mass.mean(1, keepdim=True)
