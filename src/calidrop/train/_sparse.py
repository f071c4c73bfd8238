"""Whole sequences attended as if they had been generated under a compressed cache, with gradients.

What row t of a layer sees is decided by the compressions before it: what each kv head still held, and what came since.
`Trace` notes that while generating; `SparseCache` takes it from there, or finds it by running the layer's own
`LayerKV` over the queries and keys at hand, one block of `every` tokens after another. Both look at a layer right
*after* a compression: that is what the next rows are generated with.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LogitsProcessor
from transformers.cache_utils import Cache, CacheLayerMixin

from calidrop import attention as oracle
from calidrop.cache import KVCache, layers_of
from calidrop.layer import LayerKV
from calidrop.masks import PositionMask
from calidrop.parts import Evictor, Layer, Plan
from calidrop.plugin import ATTENTION, Handle, using
from calidrop.recipe import Recipe, parse
from calidrop.support import check_model, check_plain


def check_sparse(recipe: Any) -> Recipe:
    """A recipe whose effect is which tokens are seen, and nothing else."""
    whole = parse(recipe)
    if len(whole.parts) != 1 or not isinstance(whole.parts[0], Evictor):
        raise ValueError(
            f"training needs a recipe that only says which tokens stay, like g_kv(budget=512), got {whole}"
        )
    return whole


def held(kv: LayerKV) -> Tensor:
    """bool [B,H,columns so far]: what a layer's next query sees of it."""
    s = kv.state
    parts = [t.pos for t in s.store.tokens()] if s.store is not None else []
    pos = torch.cat([*parts, s.window.tokens().pos] if len(s.window) else parts, 2)
    out = torch.zeros(*pos.shape[:2], s.seen + 1, dtype=torch.bool, device=pos.device)
    return out.scatter_(2, torch.where(pos >= 0, pos, s.seen).long(), True)[..., : s.seen]


def stacked(live: list[Tensor], columns: int) -> Tensor:
    """[B,H,n] of several compressions, with n growing -> [B,compressions,H,columns]."""
    return torch.stack([F.pad(x, (0, columns - x.shape[-1])) for x in live], 1)


class Trace(LogitsProcessor):
    """Given to `generate` with a cache: notes what every layer holds after every compression."""

    def __init__(self, cache: KVCache):
        self.layers: list[LayerKV] = [layer for layer in cache.layers_here if layer.reach is None]
        self.noted: list[list[Tensor]] = [[] for _ in self.layers]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for kv, noted in zip(self.layers, self.noted, strict=True):
            if kv.state.age == 0:  # compressed, or about to be: nothing was generated since
                noted.append(held(kv))
        return scores

    def live(self, columns: int) -> Tensor:
        """bool [B,compressions,layers,H,columns]"""
        seen = self.layers[0].state.seen
        return torch.stack([stacked(noted, max(columns, seen)) for noted in self.noted], 2)[..., :columns]


class SparseLayer(CacheLayerMixin):
    """One layer, for one forward pass over a prompt of `prompt` columns and what was generated after it."""

    def __init__(self, make: Any, reach: int | None, prompt: int, live: Tensor | None):
        super().__init__()
        self.kv = LayerKV(make, reach, eager=True, replay=True)
        self.reach, self.prompt, self.live = reach, prompt, live
        self.config: weakref.ref | None = None
        self.pending: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.pending = (key_states, value_states)
        return Handle(self), Handle(self)

    def get_seq_length(self, *args: Any) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return int(query_length), 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.13

    def attend(self, q: Tensor, mask: PositionMask, scale: float, softcap: float | None, sink: Tensor | None) -> Tensor:
        assert self.pending is not None
        (k, v), self.pending = self.pending, None
        B, H, N, _ = k.shape
        if self.prompt > N:
            raise ValueError(f"a sparse pass takes the prompt and what follows at once: {self.prompt} columns, got {N}")
        pos, of_heads = mask.positions(B, H, 0, N, k.device)
        qs = oracle.Queries(q, pos, scale, softcap, mask.visible)
        seen = oracle.visible(qs, of_heads)
        if self.reach is None:
            if self.live is None:
                self.live = self._replayed(q, k, v, mask, scale, softcap, sink)
            seen = seen & self._rows(self.live, N)
        if softcap is None and sink is None:
            seen = seen | (pos < 0)[:, None, :, None]  # a pad sees something, or its gradient is NaN
            group = q.shape[1] // H
            k, v, seen = (x.repeat_interleave(group, 1) for x in (k, v, seen))
            return F.scaled_dot_product_attention(q, k, v, seen, scale=scale)
        both = oracle.Queries(q, pos, scale, softcap, lambda *_: seen)
        o, lse = oracle.attend(both, k, v, of_heads)
        if sink is not None:
            o = o * torch.sigmoid(lse - sink.float()[:, None])[..., None]
        return o.to(q.dtype)

    def _rows(self, live: Tensor, n: int) -> Tensor:
        """bool [B,H,n,n]: what rows may see by the compressions before them. live: [B,compressions,H,n]."""
        at = torch.arange(n, device=live.device)
        every = self.kv.plan.every or n
        block = (at - self.prompt).div(every, rounding_mode="floor")  # negative in the prompt
        own = at >= (self.prompt + block * every)[:, None]  # [rows,columns]
        left = live[:, block.clamp(min=0)].transpose(1, 2)  # [B,H,rows,columns]
        return left | own | (block < 0)[:, None]

    @torch.no_grad()
    def _replayed(self, q: Tensor, k: Tensor, v: Tensor, mask: PositionMask, *args: Any) -> Tensor:
        self.kv.reset()
        mask = copy.copy(mask)
        mask.start = None  # one mask for all of these calls
        n, live, start = q.shape[2], [], 0
        every = self.kv.plan.every or n
        for stop in [*range(self.prompt, n, every), n]:
            self.kv.update(k[:, :, start:stop], v[:, :, start:stop])
            self.kv.attend(q[:, :, start:stop], mask, *args)
            live.append(held(self.kv))
            start = stop
        self.kv.reset()
        return stacked(live, n)


class SparseCache(Cache):
    """Makes one forward pass over whole sequences (pads, prompt, answer, pads) see what generation under `recipe` saw.

    prompt: the columns of pads and prompt, the same for all rows. live: what a `Trace` noted, [B,compressions,layers,H,
    columns]; None finds it out. Keeps nothing of the sequence; a new one for every pass.
    """

    def __init__(self, model: nn.Module, recipe: Any, prompt: int, live: Tensor | None = None):
        check_plain(model, "training on what a recipe leaves")
        whole, config, layers = check_sparse(recipe), check_model(model), []
        for layer, reach in layers_of(model):
            noted = None if live is None or reach is not None else live[:, :, layer.index]
            layers.append(SparseLayer(_maker(whole, layer, reach), reach, prompt, noted))
            layers[-1].config = weakref.ref(config)
        super().__init__(layers=layers)
        if config._attn_implementation != ATTENTION:
            model.set_attn_implementation(ATTENTION)  # type: ignore[operator]


def _maker(recipe: Recipe, layer: Layer, reach: int | None) -> Any:
    return lambda: Plan(None, 0, None, 1) if reach is not None else recipe.plan(layer)


@contextmanager
def under(model: nn.Module, cache: Cache) -> Iterator[None]:
    """Calls of the causal model take this cache, whoever makes them. Its decoder is hooked: PEFT and TRL call `forward`
    of what is around it."""
    decoder: nn.Module = model.base_model  # type: ignore[assignment]
    hook = decoder.register_forward_pre_hook(lambda _, args, kwargs: (args, kwargs | using(cache)), with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
