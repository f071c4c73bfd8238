"""A model seen from its key and value projections: what they put out, and its layers one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from calidrop.cache import layers_of
from calidrop.methods._artefact import facts, key_samples
from calidrop.methods._latents import Basis
from calidrop.plugin import using
from calidrop.rope import Rope
from calidrop.rotary import rotary_of, scaling_of
from calidrop.support import attention_modules, check_model, check_plain

Call = dict[str, Any]
"""The arguments of a layer but its hidden states."""


class _Stop(Exception):
    """What a pass was for is there; the rest of the model need not run."""


class Run:
    """A model and calibration windows `ids` [n,length]. Compressed layers are those in `whole`; `at` counts them.

    Raises ValueError for a model whose cached keys are not its rotated key projections.
    """

    def __init__(self, model: Any, ids: Tensor):
        self.model, self.ids, self.config = model, ids, check_model(model)
        check_plain(model, "recalkv")
        name, described = type(model).__name__, layers_of(model, rotations=True)
        self.whole = [i for i, (_, reach) in enumerate(described) if reach is None]
        if not self.whole:
            raise ValueError(f"recalkv: {name} has only layers that see a bounded window, which are not compressed")
        self.layers = [described[i][0] for i in self.whole]
        layer = self.layers[0]
        if layer.heads.size > 1:
            raise ValueError(f"recalkv: {name} is spread over {layer.heads.size} processes; train on one")
        alike = all(x.rope is layer.rope for x in self.layers)
        if layer.rope is None or not alike or layer.rope.interleaved or not len(layer.rope.inv_freq):
            raise ValueError(f"recalkv: {name} does not rotate all keys alike, in the half-split layout")
        self.heads, self.dim, self.rope = layer.kv_heads, layer.head_dim, layer.rope.inv_freq.cpu()
        rotary = rotary_of(model.get_decoder())
        assert rotary is not None
        self.scaling = scaling_of(*rotary)
        self.attention = attention_modules(model)
        lists = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == len(described))
        first = self.attention.get(self.whole[0])
        blocks = next((m for m in lists if any(inner is first for inner in m.modules())), None)
        missing = [i for i in self.whole if not hasattr(self.attention.get(i), "v_proj")]
        if missing or blocks is None:
            raise ValueError(f"recalkv: {name} has no k_proj and v_proj of its own in layer {(missing or [0])[0]}")
        self.blocks: nn.ModuleList = blocks
        self._check_keys(name)

    @torch.no_grad()
    def _check_keys(self, name: str) -> None:
        kind = (getattr(self.config, "rope_parameters", None) or {}).get("rope_type")
        if kind in ("dynamic", "longrope"):
            raise ValueError(f"recalkv: {name} rotates by frequencies that change with length ({kind})")
        norms = sorted(n for n, _ in self.attention[self.whole[0]].named_children() if "norm" in n)
        if norms:
            raise ValueError(f"recalkv: {name} normalizes keys after projecting them ({', '.join(norms)})")
        seen: dict[tuple[int, int], Tensor] = {}
        with self.watched(lambda at, which, y: seen.update({(at, which): y})):
            cache: Any = DynamicCache(config=self.config)
            self.model(self.ids[:1, :32].to(self.model.device), **using(cache))
        for at, i in enumerate(self.whole):
            k, v = (seen[at, w].float().unflatten(-1, (self.heads, self.dim)).transpose(1, 2) for w in (0, 1))
            k = Rope(self.rope).rotate(k, torch.arange(k.shape[2], device=k.device)) * self.scaling
            for own, held in ((k, cache.layers[i].keys), (v, cache.layers[i].values)):
                if own.shape != held.shape or (own - held.float()).norm() > 0.02 * own.norm():
                    raise ValueError(
                        f"recalkv: what {name} caches in layer {i} is not its rotated k_proj and its v_proj"
                    )

    def facts(self) -> dict[str, Any]:
        return facts(self.layers, self.config.hidden_size) | {"scaling": self.scaling}

    def samples(self) -> Tensor:
        """What tells this model's weights from others', fp32 [layers,64]."""
        return key_samples(self.layers)

    def projections(self, at: int) -> list[Any]:
        """k_proj and v_proj."""
        attention: Any = self.attention[self.whole[at]]
        return [attention.k_proj, attention.v_proj]

    def biases(self, at: int) -> list[Tensor]:
        """fp32 [H*D], zero where there are none."""
        found = [getattr(p, "bias", None) for p in self.projections(at)]
        return [torch.zeros(self.heads * self.dim) if b is None else b.detach().float().cpu() for b in found]

    @contextmanager
    def watched(self, see: Callable[[int, int, Tensor], Any]) -> Iterator[None]:
        """Call see(at, 0 for keys or 1 for values, output) after each projection."""
        with ExitStack() as stack:
            for at in range(len(self.whole)):
                for which, projection in enumerate(self.projections(at)):
                    hook = projection.register_forward_hook(lambda m, x, y, at=at, w=which: see(at, w, y) and None)
                    stack.callback(hook.remove)
            yield

    def forward(self, w: int) -> None:
        """Window w, without logits."""
        self.model.base_model(self.ids[w : w + 1].to(self.model.device), use_cache=False)

    def embedded(self) -> Tensor:
        """What the first layer is given, [n,length,hidden]."""
        out: list[Tensor] = []

        def see(module: nn.Module, args: tuple, kwargs: Call) -> None:
            out.append((args[0] if args else kwargs["hidden_states"]).cpu())
            raise _Stop

        hook = self.blocks[0].register_forward_pre_hook(see, with_kwargs=True)
        try:
            for w in range(len(self.ids)):
                with suppress(_Stop):
                    self.forward(w)
        finally:
            hook.remove()
        return torch.cat(out)

    def calls(self) -> list[Call]:
        """How each layer is called; the same for all windows, which are of one length and have no pads."""
        seen: list[Call] = []

        def see(module: nn.Module, args: tuple, kwargs: Call) -> None:
            seen.append({name: x for name, x in kwargs.items() if name != "hidden_states"})

        hooks = [block.register_forward_pre_hook(see, with_kwargs=True) for block in self.blocks]
        try:
            self.forward(0)
        finally:
            for hook in hooks:
                hook.remove()
        return seen

    def value_moments(self, at: int, hidden: Tensor, call: Call) -> Tensor:
        """Second moments of a layer's values without bias on other inputs, fp64 [H*D,H*D]."""
        bias, totals = self.biases(at)[1], []

        def see(module: nn.Module, args: tuple, y: Tensor) -> None:
            y = y[0].float() - bias.to(y.device)
            totals.append((y.T @ y).cpu().double())
            raise _Stop

        hook = self.projections(at)[1].register_forward_hook(see)
        try:
            for one in hidden:
                with suppress(_Stop):
                    self.blocks[self.whole[at]](one[None].to(self.model.device), **call)
        finally:
            hook.remove()
        return torch.stack(totals).sum(0)

    def through(self, i: int, hidden: Tensor, call: Call, basis: Basis | None) -> Iterator[Tensor]:
        """Hidden states of one window after another behind layer i, its keys and values on `basis`."""

        def on_basis(which: int) -> Callable[..., Tensor]:
            def project(module: nn.Module, args: tuple, y: Tensor) -> Tensor:
                assert basis is not None
                own = basis.on(y.device)
                x = y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                x = own.values_of(own.code_values(x)) if which else own.keys_of(own.code_keys(x))
                return x.transpose(1, 2).flatten(2).to(y.dtype)

            return project

        both = self.projections(self.whole.index(i)) if basis is not None else []
        hooks = [p.register_forward_hook(on_basis(which)) for which, p in enumerate(both)]
        try:
            for one in hidden:
                y = self.blocks[i](one[None].to(self.model.device), **call)
                yield (y[0] if isinstance(y, tuple) else y).cpu()
        finally:
            for hook in hooks:
                hook.remove()
