"""Which recipe for this memory? Dropping tokens and rounding the others are one decision, as both save the same bytes.

More Tokens, Lower Precision (arXiv 2412.12706): at equal bytes, more tokens at 4 bits beat fewer at 16. By that rule
`plan` recommends where nothing was measured; `Advice.measure` replaces it by what your own text says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from calidrop import compare, pareto
from calidrop.cache import layers_of
from calidrop.footprint import Footprint, Layers, Prompt, footprint
from calidrop.memory import Room, megabytes, room
from calidrop.parts import Part, check_int
from calidrop.recipe import Recipe, parse
from calidrop.skeleton import skeleton
from calidrop.support import check_alike, stateful

Progress = Callable[[str, int, int], None]
"""(recipe, done, total)"""

FRACTIONS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)  # of the context
FIXED = (256, 512, 1024, 2048, 4096)
FORMATS = ("int8", "int4", "kivi(bits=4)", "kivi(bits=2)")
SMALLEST = 64  # tokens per kv head: twice the window that snapkv keeps anyway


@dataclass(frozen=True)
class Option:
    """One recipe. device_bytes, host_bytes: predicted for the whole batch after its prompts. bytes_per_token:
    device_bytes per token of context and row. ratio: uncompressed bytes / device_bytes. tokens: per kv head, answered
    from on the device (of mean over layers). bits: of the coarsest codes, per channel, without their scales.
    row: what `compare` measured, at batch 1. front: no other option is both smaller on the device and nearer to the
    uncompressed model; only where measured."""

    recipe: str
    device_bytes: int
    host_bytes: int
    bytes_per_token: float
    ratio: float
    tokens: float
    bits: float
    row: compare.Row | None = None
    front: bool = False


@dataclass(frozen=True)
class Advice:
    """The recipes that fit, best first, so `options[0]` is `recommended`. memory, host_memory: bytes there are; sources
    say where those numbers come from. notes: what else should be known, one sentence each."""

    context: int
    batch: int
    dtype: str
    memory: int
    memory_source: str
    host_memory: int
    host_source: str
    full_bytes: int
    options: tuple[Option, ...]
    notes: tuple[str, ...]

    @property
    def recommended(self) -> Option:
        return self.options[0]

    def measure(
        self,
        model: nn.Module,
        tokenizer: Any,
        text: str,
        continuation: int = 64,
        progress: Progress | None = None,
    ) -> Advice:
        """With `compare` run on every option, in order of KL: the recommended one is then the nearest to the
        uncompressed model. See `compare` for what is measured and what it raises."""
        recipes = [option.recipe for option in self.options]
        rows = compare.compare(model, tokenizer, text, recipes, self.context, continuation, progress)
        best = pareto.front([(o.device_bytes, row.kl) for o, row in zip(self.options, rows, strict=True)])
        measured = [
            dataclasses.replace(o, row=row, front=i in best)
            for i, (o, row) in enumerate(zip(self.options, rows, strict=True))
        ]
        measured.sort(key=lambda o: (o.row.kl if o.row else 0.0, o.device_bytes))
        return dataclasses.replace(self, options=tuple(measured))


def plan(
    model_or_config: Any,
    *,
    context: int,
    batch: int = 1,
    memory: int | str | None = None,
    host_memory: int | str | None = None,
    recipes: Sequence[str | Part | Recipe] | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Advice:
    """Which recipes fit into `memory` for `batch` prompts of `context` tokens, and which of them to take.

    model_or_config: a model, or just its config. memory, host_memory: bytes, or like "2GiB" or "512MB"; None is what is
    free now on the device (the model's; for a config, where `load` would put it) and on the host; where those are the
    same, they are not spent twice. host_memory=0 leaves calidrop out. recipes: default `candidates`. dtype: of keys and
    values; default the model's, the config's, else bfloat16.

    Bytes are those after the prompt, found by running each recipe on random tokens (see `footprint`). Not in them: what
    generated tokens add until the next compression, and what prefill needs on the way (one layer uncompressed).

    Recommended, where nothing is measured: not below 4 bits; then most tokens on the device; then most bits; then what
    keeps evicted tokens on the host; then fewest bytes. Raises ValueError where nothing fits, saying what the smallest
    needs, for a model that is not supported and for a recipe that makes no sense.
    """
    check_int("context", context, 1)
    check_int("batch", batch, 1)
    model: Any = model_or_config if isinstance(model_or_config, nn.Module) else skeleton(model_or_config)
    layers, config = layers_of(model, rotations=True), model.config.get_text_config(decoder=True)
    check_alike(config, "a plan")
    dtype = dtype or _dtype(model_or_config)
    space = room(getattr(model, "device", None), memory, host_memory)
    notes = _about(config, context)
    grown = _full([(layer, reach) for layer, reach in layers if reach is None] or layers, 1, batch, dtype)
    notes.append(f"a generated token adds about {grown:,} bytes until it is compressed too, if the recipe does that")
    known = [parse(recipe) for recipe in recipes] if recipes is not None else candidates(context, space.host > 0)
    if not known:
        raise ValueError("recipes must be at least one recipe, got none")
    sizes, refused = _sizes(known, layers, Prompt(layers[0][0], context, dtype), context, batch, progress)
    if refused and (recipes is not None or not sizes):
        raise refused[0]
    notes += sorted({f"left out: {error}" for error in refused})
    full = _full(layers, context, batch, dtype)
    options = [_option(recipe, size, full, context, batch) for recipe, size in sizes]
    order, more = _ordered(options, space, context, batch)
    return Advice(
        context, batch, str(dtype).removeprefix("torch."), space.device, space.device_source,
        space.host, space.host_source, full, tuple(order), (*notes, *more),
    )  # fmt: skip


def candidates(context: int, host: bool) -> list[Recipe]:
    """What is tried when nobody says: snapkv at several sizes by several formats, with and (host) without forgetting,
    and each format for all tokens."""
    sizes = {int(f * context) // 32 * 32 for f in FRACTIONS} | set(FIXED)
    found = ["full", *FORMATS, "fp8"]
    for n in sorted(n for n in sizes if SMALLEST <= n < context):
        for form in ("", *(f"+{name}" for name in FORMATS)):
            found.append(f"snapkv(budget={n}){form}")
            if host:
                found.append(f"snapkv(budget={n}){form}+calidrop")
    return [parse(recipe) for recipe in found]


def _sizes(
    recipes: list[Recipe], layers: Layers, prompt: Prompt, context: int, batch: int, progress: Progress | None
) -> tuple[list[tuple[Recipe, Footprint]], list[ValueError]]:
    sizes, refused = [], []
    for i, recipe in enumerate(recipes):
        try:
            sizes.append((recipe, footprint(recipe, layers, prompt, context, batch)))
        except ValueError as error:  # like a head dim that a format's groups do not divide
            refused.append(error)
        if progress:
            progress(str(recipe), i + 1, len(recipes))
    return sizes, refused


def _ordered(options: list[Option], space: Room, context: int, batch: int) -> tuple[list[Option], list[str]]:
    """What fits, best first, and notes."""
    fitting = sorted((o for o in options if space.holds(o.device_bytes, o.host_bytes)), key=_rule)
    if not fitting:
        least = min(options, key=lambda o: o.device_bytes)
        raise ValueError(
            f"nothing fits in {megabytes(space.device)}: the smallest of {len(options)} recipes, {least.recipe}, needs "
            f"{megabytes(least.device_bytes)} on the device and {megabytes(least.host_bytes)} on the host for "
            f"context {context} and batch {batch}"
        )
    notes = []
    if len(fitting) < len(options):
        notes.append(f"{len(options) - len(fitting)} of {len(options)} recipes do not fit")
    if fitting[0].bits < 4:
        notes.append("nothing with 4 bits or more fits: expect a poor copy of the model, or give more memory")
    return fitting, notes


def _rule(o: Option) -> tuple:
    return o.bits < 4, -o.tokens, -o.bits, o.host_bytes == 0, o.device_bytes


def _option(recipe: Recipe, size: Footprint, full: int, context: int, batch: int) -> Option:
    per_token = size.device / (context * batch)
    return Option(str(recipe), size.device, size.host, per_token, full / size.device, size.tokens, size.bits)


def _full(layers: Layers, context: int, batch: int, dtype: torch.dtype) -> int:
    """Bytes of an uncompressed cache, as `KVCache.full_nbytes` counts them."""
    columns = sum(context if reach is None else min(context, reach) for _, reach in layers)
    one = layers[0][0]
    return batch * columns * (one.kv_heads // one.heads.size) * (one.head_dim + one.value_dim) * dtype.itemsize


def _dtype(model_or_config: Any) -> torch.dtype:
    given = getattr(model_or_config, "dtype", None)
    return given if isinstance(given, torch.dtype) else torch.bfloat16


def _about(config: Any, context: int) -> list[str]:
    most, notes = getattr(config, "max_position_embeddings", None), []
    if isinstance(most, int) and context > most:
        notes.append(f"context {context} is beyond the {most} positions the model was made for")
    if many := len(stateful(config)):
        notes.append(f"{many} layers keep no keys and values, or a state beside them, which is not counted here")
    return notes
