"""The cache a model is given: one `LayerKV` per layer, built as the recipe plans it. Layers without keys and values
(linear attention, convolutions) keep what transformers keeps of them."""

from __future__ import annotations

import copy
import os
import sys
import weakref
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from calidrop import ops, saved
from calidrop.holding import Holding
from calidrop.layer import LayerKV
from calidrop.masks import ASSISTED, called_from
from calidrop.mla import LatentKV, latent_modules, let_through
from calidrop.parallel import HeadGroup
from calidrop.parts import Layer, Part, Plan
from calidrop.plugin import ATTENTION, compiling
from calidrop.recipe import Recipe, parse
from calidrop.shared import SharedKV
from calidrop.soft import install
from calidrop.state import held_bytes
from calidrop.stateful import State, StatefulKV, changed, state_of
from calidrop.steps import Steps
from calidrop.support import (
    attention_modules,
    caches_latents,
    check_model,
    check_plain,
    heads_of,
    key_sample,
    layer_kinds,
    others,
    ropes_of,
    sharers,
    sharing,
    states,
)


class KVCache(Cache):
    """A compressed KV cache for `model.generate(..., cache=cache)` or a plain forward call (the keyword was
    `past_key_values` before transformers 5.24).

    model: a transformers decoder; its attention implementation is set to "calidrop" (other caches still work there).
    recipe: what to do, as a string or as parts ("full" compresses nothing). eager: in
    plain forward calls, compress every layer right after it attended a block of tokens, as `generate` does at the end
    of a prompt, instead of when the next token comes: the peak is one layer's full cache, and a prompt fed in several
    calls is compressed call by call. graph: record decode steps and replay them as CUDA graphs, which takes away nearly
    all time on the host (`steady.py`). compile: decode steps go through torch.compile as one graph, which takes a
    minute or more at the first (`compiled.py`). Steps that cannot be had so run as ever, and `describe()` says why.
    Recorded steps write in place: forks of the cache's states are no snapshots then.

    Raises ValueError for a recipe that makes no sense and for a model that cannot work.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: str | Part | Recipe = "full",
        *,
        eager: bool = False,
        graph: bool = False,
        compile: bool = False,
    ):
        self.recipe = parse(recipe)
        config, layers = check_model(model), layers_of(model, self.recipe.rotations)
        self.others, self.asks = others(config), sharers(config)

        both, every = states(config), dict(self.others)
        latents = latent_modules(model) if caches_latents(config) else {}
        for kind in {type(module) for module in latents.values()}:
            let_through(kind)
        for i, (layer, reach) in zip(layer_kinds(config), layers, strict=True):
            # nothing of a layer may point to the cache, or its memory would wait for the garbage collector
            make = partial(self.recipe.plan, layer) if reach is None else partial(Plan, None, 0, None, 1)
            how = make, reach, eager
            if i in both:
                every[i] = StatefulKV(both[i], *how)
            elif i in latents:
                every[i] = LatentKV(latents[i], *how)
            else:
                every[i] = LayerKV(*how) if layer.asking == 1 else SharedKV(layer.asking, *how)
        super().__init__(layers=[every[i] for i in sorted(every)])
        self.layers_here: list[LayerKV] = [layer for layer in self.layers if isinstance(layer, LayerKV)]
        self.config = weakref.ref(config)
        self.of, self.dtype = [layer for layer, _ in layers], getattr(model, "dtype", None)
        self.shape = (layers[0][0].kv_heads // layers[0][0].heads.size, layers[0][0].head_dim)
        for layer in self.layers_here:
            layer.config = self.config
        soft = next((layer.plan.soft for layer in self.layers_here if layer.plan.soft is not None), None)
        if soft is not None:
            check_plain(model, f"{self.recipe}: soft tokens")  # a state would remember them
            install(model, soft)
        if getattr(model.config, "_attn_implementation", None) != ATTENTION:
            model.set_attn_implementation(ATTENTION)  # type: ignore[operator]
        self.steps = Steps(self, model, graph, compile) if graph or compile else None

    def save(self, file: str | os.PathLike) -> None:
        """Write all it holds to a file (safetensors) of as many bytes, evicted tokens on the host included, for `load`.
        Compresses a waiting prompt first."""
        saved.save(self, file)

    @classmethod
    def load(
        cls,
        model: nn.Module,
        file: str | os.PathLike,
        *,
        eager: bool = False,
        graph: bool = False,
        compile: bool = False,
    ) -> KVCache:
        """The cache that `save` wrote, of the same recipe, on the model's device. The other arguments are as above.
        Raises ValueError for a file that is none and for another model."""
        return saved.load(cls, model, file, eager=eager, graph=graph, compile=compile)

    def __deepcopy__(self, memo: dict[int, Any]) -> KVCache:
        new = memo[id(self)] = object.__new__(type(self))
        vars(new).update({name: copy.deepcopy(x, memo) for name, x in vars(self).items()})
        return new

    def __reduce__(self) -> Any:
        instead = "cache.save(file) and KVCache.load(model, file) write and read it, copy.deepcopy(cache) copies it"
        raise TypeError(f"a KVCache belongs to its model and cannot be pickled: {instead}")

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if compiling():
            return key_states, value_states
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    # Pipeline parallelism: layers of other processes never fill, so no single layer can be asked.
    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(layer.state.seen for layer in self.layers_here)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.get_seq_length() + int(query_length), 0

    def activate_past_recording(self) -> None:
        """Called by transformers when assisted decoding starts; raises ValueError where the prompt's end is unknown."""
        end = _prompt_end(sys._getframe(1))
        if end is None and self.get_seq_length() == 0:
            raise ValueError("cannot tell where the prompt ends in this transformers version's assisted decoding")
        for layer in self.layers_here:
            layer.activate_past_recording(end)
        for other in self.others.values():
            if hasattr(other, "activate_past_recording"):
                other.activate_past_recording()

    def deactivate_past_recording(self) -> None:
        """The end of it: nothing recorded can be undone any more."""
        for layer in self.layers_here:
            layer.record_past, layer.undo = False, []

    def batch_repeat_interleave(self, repeats: int) -> None:
        for layer in self.layers_here:
            layer.batch_repeat_interleave(repeats)
        self._rows(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Any) -> None:
        """indices: whatever picks rows of a tensor. Raises IndexError for rows that are not there, and keeps all."""
        have = next((layer.state.context for layer in self.layers_here if layer.state.context is not None), None)
        if have is None:
            return
        rows = torch.arange(len(have), device=have.device)[indices].reshape(-1)
        for layer in self.layers_here:
            layer.batch_select_indices(rows)
        self._rows(lambda x: x[rows.to(x.device)])

    def compress(self) -> None:
        """Compress a prompt that is waiting now instead of at the next generated token."""
        for layer in self.layers_here:
            layer.settle()

    @property
    def nbytes(self) -> int:
        """Bytes held on the device: storage of every tensor of the cache, codes, scales, positions, buffers and
        statistics included. Compresses a waiting prompt first. Where several processes share a model, this and the
        other counts are those of this process: its heads, or its layers."""
        self.compress()
        held = [(layer.state, layer.undo, layer.told) for layer in self.layers_here]
        return held_bytes(held) + self._beside_nbytes

    @property
    def host_nbytes(self) -> int:
        """Bytes held in host memory on purpose (evicted tokens that may be asked again)."""
        self.compress()
        return held_bytes([(layer.state, layer.undo) for layer in self.layers_here], host=True)

    @property
    def full_nbytes(self) -> int:
        """Bytes an uncompressed cache would hold for the same tokens (sliding layers: their window)."""
        total = self._beside_nbytes
        for layer in self.layers_here:
            s = layer.state
            if s.context is not None:
                columns = s.seen if layer.reach is None else min(s.seen, layer.reach)
                total += layer.column_bytes * len(s.context) * columns
        return total

    @property
    def _beside_nbytes(self) -> int:
        return held_bytes(self.beside)

    @property
    def beside(self) -> list[Tensor]:
        """What layers keep beside keys and values."""
        parts = [x for layer in self.layers for x in state_of(layer).values()]
        return [x for part in parts for x in part.values() if isinstance(x, Tensor)]

    def states(self) -> list[State]:
        """Copies of what layers keep beside keys and values."""
        return [changed(state_of(layer), Tensor.clone) for layer in self.layers]

    def put_states(self, states: list[State]) -> None:
        """states: of `states`, which stay as they are."""
        for layer, state in zip(self.layers, states, strict=True):
            vars(layer).update(changed(state, Tensor.clone))

    def _rows(self, fn: Callable[[Tensor], Tensor]) -> None:
        for layer in self.layers:
            vars(layer).update(changed(state_of(layer), fn))

    @property
    def recompute_rate(self) -> float:
        """The fraction of (step, layer, query head) with evicted tokens for which calidrop went back to them."""
        asked, steps = 0, 0
        for layer in self.layers_here:
            if layer.state.store is not None:
                more = layer.state.store.recomputed()
                asked, steps = asked + more[0], steps + more[1]
        return asked / steps if steps else 0.0

    def holdings(self) -> list[list[Holding]]:
        """Per layer, in what form it has every token. Compresses a waiting prompt first."""
        self.compress()
        return [layer.holdings() for layer in self.layers_here]

    def describe(self) -> str:
        """Per layer: what is stored how, tokens, bytes; and what computes attention."""
        self.compress()
        device = next(
            (x.device for layer in self.layers_here if (x := layer.state.context) is not None), torch.device("cpu")
        )
        lines = [
            f"{self.recipe}: {self.nbytes:,} bytes on the device, {self.host_nbytes:,} on the host, "
            f"{self.full_nbytes:,} uncompressed; decode by {ops.backend(device)}"
        ]
        if self.steps is not None:
            lines.append(f"  {self.steps.describe()}")
        for i, layer in enumerate(self.layers):
            beside = f"{held_bytes(state_of(layer)):,} bytes of a state"
            if not isinstance(layer, LayerKV):
                lines.append(f"  layer {i}: no keys and values; {beside}")
                continue
            elsewhere = layer.state.context is None and self.get_seq_length() > 0  # pipeline parallelism
            what = "in another process" if elsewhere else layer.describe()
            if isinstance(layer, StatefulKV):
                what += f", and {beside}"
            lines.append(f"  layer {i}: {what}; {held_bytes(layer.state):,} bytes")
        return "\n".join(lines)


def layers_of(model: nn.Module, rotations: bool = False) -> list[tuple[Layer, int | None]]:
    """Per layer of the model with keys and values: what a method is told about it, and how far back it sees where that
    is bounded. Bounded layers are not compressed; their index is -1. rotations: find out how keys are rotated, for
    which the model is run once. Raises ValueError for a model that cannot work."""
    config = check_model(model)
    kinds, heads, ropes = layer_kinds(config), HeadGroup.of(model), ropes_of(model) if rotations else {}
    whole = [i for i, reach in kinds.items() if reach is None]
    shapes, asked, own_values = heads_of(config), sharing(config), 0 if caches_latents(config) else -1
    for _, kv_heads, _ in (shapes[i] for i in kinds):
        if kv_heads % heads.size:
            raise ValueError(
                f"{kv_heads} kv heads cannot be spread evenly over {heads.size} processes: "
                "choose a tensor parallel size that divides them"
            )
    index = {i: at for at, i in enumerate(whole)}
    modules = attention_modules(model) if heads.size == 1 else {}
    return [
        (
            Layer(index.get(i, -1), len(whole), *shapes[i], ropes.get(i), heads, own_values, config.model_type,
                  sample=key_sample(modules.get(i)), asking=asked.get(i, 1)),
            reach,
        )
        for i, reach in kinds.items()
    ]  # fmt: skip


def _prompt_end(frame: FrameType | None) -> int | None:
    """Where the prompt ends when assisted decoding starts. Its first forward pass holds the prompt and the first
    proposals in one block, and nothing that reaches a cache says where one becomes the other; the caller's `input_ids`
    do. Without this, proposals would be checked against the uncompressed prompt and the answer would differ."""
    names = called_from(frame, ASSISTED)
    ids = None if names is None else names.get("input_ids")
    return ids.shape[1] if isinstance(ids, Tensor) else None
