"""A cache under examination: a recipe's, or another library's. Both are fed and asked in the same way."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from calidrop import tee
from calidrop.cache import KVCache
from calidrop.compare import now
from calidrop.eval.peers import PEERS, is_peer
from calidrop.plugin import using
from calidrop.recipe import parse
from calidrop.state import held_bytes

BLOCK = 32  # tokens of one recorded pass: every step's state is kept until its end


class Subject(ABC):
    """Filled with a prompt. logits: after its last token, [vocabulary]. prefill_s: attending and compressing it."""

    cache: Cache

    def __init__(self, model: Any, logits: Tensor, prefill_s: float):
        self.model, self.logits, self.prefill_s = model, logits, prefill_s

    @abstractmethod
    def saved(self) -> Any:
        """For `restore`, any number of times."""

    @abstractmethod
    def restore(self, saved: Any) -> None: ...

    @abstractmethod
    def feed(self, ids: Tensor) -> Tensor:
        """Tokens [n], as decoded one by one. -> the logits after each, [n,vocabulary]."""

    @abstractmethod
    def step(self, token: int) -> Tensor:
        """One token in a forward pass of its own. -> [vocabulary]"""

    @abstractmethod
    def measured(self) -> dict[str, Any]:
        """The bytes held, and how often evicted tokens were asked."""

    def _forward(self, ids: Tensor) -> Tensor:
        return self.model(ids[None], **using(self.cache), use_cache=True).logits[0]


class Ours(Subject):
    cache: KVCache

    def __init__(self, cache: KVCache, model: Any, logits: Tensor, prefill_s: float):
        super().__init__(model, logits, prefill_s)
        self.cache = cache

    def saved(self) -> Any:
        return [layer.state.fork() for layer in self.cache._mine]

    def restore(self, saved: Any) -> None:
        for layer, state in zip(self.cache._mine, saved, strict=True):
            layer.state = state.fork()  # writes behind what was saved, over what the last one wrote

    def feed(self, ids: Tensor) -> Tensor:
        """Recorded as in assisted decoding: one pass, yet every token a step of its own."""
        out = []
        for block in ids.split(BLOCK):
            self.cache.activate_past_recording()
            out.append(self._forward(block))
            self.cache.deactivate_past_recording()
        return torch.cat(out)

    def step(self, token: int) -> Tensor:
        return self._forward(torch.tensor([token], device=self.model.device))[-1]

    def measured(self) -> dict[str, Any]:
        c = self.cache
        return {"device_bytes": c.nbytes, "host_bytes": c.host_nbytes, "full_bytes": c.full_nbytes,
                "recompute_rate": c.recompute_rate}  # fmt: skip


class Peer(Subject):
    def __init__(self, cache: Cache, model: Any, logits: Tensor, prefill_s: float):
        super().__init__(model, logits, prefill_s)
        self.cache = cache

    def saved(self) -> Any:
        return copy.deepcopy(self.cache)

    def restore(self, saved: Any) -> None:
        self.cache = copy.deepcopy(saved)

    def feed(self, ids: Tensor) -> Tensor:
        return torch.stack([self.step(int(token)) for token in ids])

    def step(self, token: int) -> Tensor:
        with _sdpa(self.model):
            return self._forward(torch.tensor([token], device=self.model.device))[-1]

    def measured(self) -> dict[str, Any]:
        held = held_bytes([vars(layer) for layer in self.cache.layers])
        return {"device_bytes": held, "host_bytes": 0, "full_bytes": None, "recompute_rate": 0.0}


def fill(model: Any, names: Sequence[str], ids: Tensor) -> list[Subject]:
    """Run the prompt [n] under every name: once for all recipes that can share it."""
    ids = ids[None]
    if len(names) == 1 and is_peer(names[0]):
        cache = PEERS[names[0]](model)
        with _sdpa(model):
            return [Peer(cache, model, *_alone(model, cache, ids))]
    caches = [KVCache(model, name, eager=True) for name in names]
    if len(caches) == 1 and caches[0].recipe.alone:
        return [Ours(caches[0], model, *_alone(model, caches[0], ids))]
    filled = tee.prefill(model, caches, ids)
    return [Ours(cache, model, filled.logits[0], s) for cache, s in zip(caches, filled.seconds, strict=True)]


def groups(names: Sequence[str], most: int) -> list[list[str]]:
    """Which share a prompt: at most so many recipes at once. Behind them, one by one, those that cannot, and peers."""
    alone = [name for name in names if is_peer(name) or parse(name).alone]
    shared = [name for name in names if name not in alone]
    return [shared[i : i + most] for i in range(0, len(shared), most)] + [[name] for name in alone]


def _alone(model: Any, cache: Cache, ids: Tensor) -> tuple[Tensor, float]:
    start = now(ids)
    logits = model(ids, **using(cache), use_cache=True, logits_to_keep=1).logits[0, -1]
    return logits, now(ids) - start


@contextmanager
def _sdpa(model: Any) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
