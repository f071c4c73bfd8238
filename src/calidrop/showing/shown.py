"""What recipes hold of a text, read off real caches after a real prefill."""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calidrop.cache import KVCache
from calidrop.compare import Progress
from calidrop.eval.subject import Ours, end_tokens, fill, groups, together
from calidrop.holding import FORMS, Form, places
from calidrop.pages import render
from calidrop.parts import Part, check_int
from calidrop.recipe import Recipe, parse
from calidrop.showing.pieces import Piece, beginning, written
from calidrop.support import check_alike, check_model

TOGETHER = 8  # recipes that share a prefill at most: all their caches are there at once


@dataclass(frozen=True)
class Held:
    """One recipe's cache at the end. made: what it generated. kinds: (form, in words), best form first; table: uint8
    [layers,kv heads,columns], which of the kinds every token is of. asked: how often a head went back to what was
    evicted."""

    recipe: str
    made: list[Piece]
    kinds: list[tuple[Form, str]]
    table: Tensor
    device_bytes: int
    host_bytes: int
    full_bytes: int
    asked: float

    @property
    def per_head(self) -> Tensor:
        """int64 [layers,kv heads], the tokens held on the device."""
        there = [i for i, (form, _) in enumerate(self.kinds) if form in ("exact", "coded")]
        return torch.isin(self.table, torch.tensor(there, dtype=torch.uint8)).sum(-1)


@dataclass(frozen=True)
class Shown:
    """A text and what each recipe holds of it. context: the tokens of the text."""

    model: str
    context: list[Piece]
    held: list[Held]

    def page(self) -> str:
        """One HTML file that needs nothing else."""
        layers, heads, _ = self.held[0].table.shape
        told = {
            "layers": layers,
            "heads": heads,
            "context": _packed(self.context),
            "held": [_told(h) for h in self.held],
        }
        return render("showing/page.html", shown=told, model=self.model, tokens=len(self.context))


def usual(model: Any, tokens: int) -> list[str]:
    """Recipes to learn from, for a text of so many tokens."""
    group = math.gcd(32, KVCache(model).shape[1])
    budget = f"(budget={max(40, tokens // 8)})"
    evict = [f"{name}{budget}" for name in ("snapkv", "h2o", "streaming_llm")]
    return [
        *evict,
        f"snapkv{budget}+calidrop",
        f"snapkv{budget}+int4",
        "kivi(bits=2)" if group == 32 else f"kivi(bits=2, group={group})",
    ]


@torch.inference_mode()
def show(
    model: Any,
    tokenizer: Any,
    text: str,
    recipes: Sequence[str | Part | Recipe] | None = None,
    context: int | None = None,
    generate: int = 0,
    progress: Progress | None = None,
) -> Shown:
    """Compress the first `context` tokens of a text (None: all, 1024 at most) under each of the recipes (None: a few to
    learn from), let each go on greedily for `generate` tokens or until an end token, and read off where each token is.

    Recipes that can, share one prefill. Raises ValueError before any work for a text that is too short or empty and for
    a recipe that makes no sense or does not fit the model.
    """
    check_alike(check_model(model), "show")
    check_int("generate", generate, 0)
    ids, pieces = beginning(tokenizer, text, context)
    if recipes is not None and (isinstance(recipes, str) or not recipes):
        raise ValueError(f"recipes must be a list of at least one recipe, got {recipes!r}")
    names = list(dict.fromkeys(str(parse(recipe)) for recipe in recipes or usual(model, len(ids))))
    for name in names:
        KVCache(model, name)  # for its errors
    prompt, found = torch.tensor(ids, device=model.device), {}
    for some in groups(names, together(model, TOGETHER)):
        filled = fill(model, some, prompt)
        for name in some:
            subject = filled.pop(0)  # its memory is free before the next one goes on
            assert isinstance(subject, Ours)
            made = _go_on(subject, generate)
            found[name] = _read(subject.cache, len(ids) + len(made), written(tokenizer, made))
            if progress:
                progress("recipes", len(found), len(names))
    layers, heads, _ = found[names[0]].table.shape
    kind = f"{model.config.model_type}, {layers} layers of {heads} kv heads"
    return Shown(kind, pieces, [found[name] for name in names])


def _go_on(subject: Ours, n: int) -> list[int]:
    """Greedily, until an end token. All of it is fed to the cache, the last token too."""
    ends = end_tokens(subject.model)
    made, logits = [], subject.logits
    while len(made) < n and ends.isdisjoint(made):
        made.append(int(logits.argmax()))
        logits = subject.step(made[-1])
    return made


def _read(cache: KVCache, columns: int, made: list[Piece]) -> Held:
    """The table of a cache of one sequence without pads."""
    layers = cache.holdings()
    kinds: list[tuple[Form, str]] = list({(h.form, h.how): None for layer in layers for h in layer})
    kinds.sort(key=lambda kind: FORMS.index(kind[0]))
    real = torch.ones(1, columns, dtype=torch.bool)
    table = []
    for holdings in layers:
        at = places(holdings, real, cache.shape[0])[0]
        assert bool((at >= 0).all()), "a token is in no form"
        names = torch.tensor([kinds.index((h.form, h.how)) for h in holdings], dtype=torch.uint8)
        table.append(names[at])
    asked = cache.recompute_rate
    return Held(str(cache.recipe), made, kinds, torch.stack(table), cache.nbytes, cache.host_nbytes, cache.full_nbytes,
                asked)  # fmt: skip


def _told(held: Held) -> dict[str, Any]:
    """For the page: the table deflated, in base64."""
    per_head = held.per_head.double()
    return {
        "recipe": held.recipe,
        "made": _packed(held.made),
        "kinds": held.kinds,
        "table": base64.b64encode(zlib.compress(held.table.contiguous().numpy().tobytes(), 9)).decode(),
        "device": held.device_bytes,
        "host": held.host_bytes,
        "full": held.full_bytes,
        "asked": held.asked,
        "per_head": [float(x) for x in (per_head.min(), per_head.mean(), per_head.max())],
    }


def _packed(pieces: list[Piece]) -> dict[str, list[Any]]:
    return {"text": [p.text for p in pieces], "special": [i for i, p in enumerate(pieces) if p.special]}
