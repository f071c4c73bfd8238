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
from calidrop.abreast import Abreast
from calidrop.cache import KVCache
from calidrop.compare import now
from calidrop.eval.peers import PEERS, is_peer
from calidrop.plugin import using
from calidrop.recipe import parse
from calidrop.state import held_bytes
from calidrop.support import check_model, plain

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
        return forward(self.model, self.cache, ids[None])[0]


class Ours(Subject):
    cache: KVCache

    def __init__(self, cache: KVCache, model: Any, logits: Tensor, prefill_s: float):
        super().__init__(model, logits, prefill_s)
        self.cache = cache

    def saved(self) -> Any:
        return [layer.state.fork() for layer in self.cache.layers_here], self.cache.states()

    def restore(self, saved: Any) -> None:
        forks, states = saved
        for layer, state in zip(self.cache.layers_here, forks, strict=True):
            layer.state = state.fork()  # writes behind what was saved, over what the last one wrote
        self.cache.put_states(states)

    def feed(self, ids: Tensor) -> Tensor:
        if not plain(self.cache.config()):  # what other layers keep does not know of recorded passes
            return torch.stack([self.step(int(token)) for token in ids])
        return feed(self.model, self.cache, [self.cache], ids)[0]

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


class Band:
    """Filled caches that answer side by side: several recipes' in the batch of one forward pass, or a single one."""

    def __init__(self, subjects: Sequence[Subject]):
        self.subjects, self.model = subjects, subjects[0].model
        self.caches = [s.cache for s in subjects if isinstance(s, Ours)]
        if len(subjects) > 1 and len(self.caches) < len(subjects):
            raise ValueError("caches of other libraries answer one by one")
        self.logits = torch.stack([s.logits for s in subjects])  # [subjects,vocabulary]

    def saved(self) -> Any:
        return [s.saved() for s in self.subjects]

    def restore(self, saved: Any) -> None:
        for s, x in zip(self.subjects, saved, strict=True):
            s.restore(x)

    def feed(self, ids: Tensor) -> Tensor:
        """The same tokens [n] to all. -> [subjects,n,vocabulary]"""
        if len(self.subjects) == 1:
            return self.subjects[0].feed(ids)[None]
        return feed(self.model, Abreast(self.caches), self.caches, ids)

    def step(self, tokens: Sequence[int]) -> Tensor:
        """To each its own token. -> [subjects,vocabulary]"""
        if len(self.subjects) == 1:
            return self.subjects[0].step(tokens[0])[None]
        return forward(self.model, Abreast(self.caches), torch.tensor(tokens, device=self.model.device)[:, None])[:, -1]


def feed(model: Any, cache: Cache, caches: Sequence[KVCache], ids: Tensor) -> Tensor:
    """Recorded as in assisted decoding: one pass, yet every token a step of its own. cache: of all `caches`, a row
    each. ids: [n] -> [caches,n,vocabulary]"""
    out = []
    for block in ids.split(BLOCK):
        for each in caches:
            each.activate_past_recording()
        out.append(forward(model, cache, block.expand(len(caches), -1)))
        for each in caches:
            each.deactivate_past_recording()
    return torch.cat(out, 1)


def end_tokens(model: Any) -> set[int]:
    ends = model.generation_config.eos_token_id
    return set(ends if isinstance(ends, list) else [ends])


def forward(model: Any, cache: Cache, ids: Tensor) -> Tensor:
    """[rows,n] -> [rows,n,vocabulary]"""
    return model(ids, **using(cache), use_cache=True).logits


def fill(model: Any, names: Sequence[str], ids: Tensor) -> list[Subject]:
    """Run the prompt [n] under every name: once for all recipes that can share it."""
    ids = ids[None]
    if len(names) == 1 and is_peer(names[0]):
        cache = PEERS[names[0]](model)
        with _sdpa(model):
            return [Peer(cache, model, *_alone(model, cache, ids))]
    caches = [KVCache(model, name, eager=True) for name in names]
    if len(caches) == 1 and (caches[0].recipe.alone or not plain(caches[0].config())):
        return [Ours(caches[0], model, *_alone(model, caches[0], ids))]
    filled = tee.prefill(model, caches, ids)
    return [Ours(cache, model, filled.logits[0], s) for cache, s in zip(caches, filled.seconds, strict=True)]


def together(model: Any, most: int) -> int:
    """How many recipes can share a prompt, of so many."""
    return most if plain(check_model(model)) else 1


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
