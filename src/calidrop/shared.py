"""A layer whose keys and values other layers of the model ask, too (Gemma 3n, Gemma 4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from calidrop import ops
from calidrop.attention import Queries, with_sink
from calidrop.layer import LayerKV
from calidrop.masks import PositionMask
from calidrop.parts import Plan


class SharedKV(LayerKV):
    """Keys and values of one layer, which `asking` layers ask: that layer, and behind it those that have none.

    The model hands what `update` returned from layer to layer. Until the last has asked, tokens stay as they came.
    The layer's own queries alone say what tokens are worth: the others may ask for the end of a prompt only, as models
    that need no more of it go on with its last token, and what is kept must not depend on that."""

    is_croppable = False

    def __init__(self, asking: int, make: Callable[[], Plan], reach: int | None = None, eager: bool = False):
        self.asking = asking
        super().__init__(make, reach, eager)

    def reset(self) -> None:
        super().reset()
        self.answering = False  # what the layer itself asks
        self.own: Queries | None = None  # what the layer itself asked, while others have not
        self.over: Callable[[], None] | None = None  # what the layer would have done then
        self.others: list[Queries] = []  # the last query of each that has asked

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self._over()
        return super().update(key_states, value_states, *args, **kwargs)

    def activate_past_recording(self, prompt_end: int | None = None) -> None:
        raise ValueError("layers that share keys and values cannot go back: no assisted decoding with this model")

    def attend(self, q: Tensor, mask: PositionMask, scale: float, softcap: float | None, sink: Tensor | None) -> Tensor:
        if self.pending is None:
            o = self._again(q, scale, softcap, sink)
        else:
            self.ends, self.answering = self.eager or bool(mask.ends), True
            try:
                o = super().attend(q, mask, scale, softcap, sink)
            finally:
                self.answering = False
        if len(self.others) == self.asking - 1:
            self._over()
        return o

    def _again(self, q: Tensor, scale: float, softcap: float | None, sink: Tensor | None) -> Tensor:
        """What another layer is answered. q: [B,Hq,T,D], of the last of the tokens that came."""
        if self.own is None:
            raise RuntimeError(f"{self.asking} layers share keys and values, and more have asked")
        s, own, n = self.state, self.own, q.shape[2]
        if (scale, softcap) != (own.scale, own.softcap) or q.shape[:2] != own.q.shape[:2] or n > len(own):
            raise ValueError(
                f"layers that share keys and values must ask alike, got queries {tuple(q.shape)}, scale {scale} and "
                f"softcap {softcap} after {tuple(own.q.shape)}, {own.scale} and {own.softcap}"
            )
        at = len(self.others) + 1
        qs = replace(own.last(n), q=q.to(own.q), asker=at)  # accelerate may have it elsewhere
        if n == 1:
            parts = s.store.attend(qs) if s.store else []
            answer, self.by = ops.again(qs, s.window, parts, last=self._within(qs))
            o, _ = with_sink(qs, answer, sink)
        else:
            before = len(s.window) - n
            o, *_ = self._block(qs, s.window.tokens().slice(before), before, sink)
        self.others.append(qs.alone())
        return o.to(q)

    # ---- what the layer itself would do at once waits for the others

    def _stepped(self, qs: Queries, lse: Tensor, heard: ops.Heard | None = None) -> None:
        def over() -> None:
            LayerKV._stepped(self, qs, lse, heard)
            LayerKV._tidied(self)

        self.own, self.over = qs, over

    def _prompted(self, qs: Queries, lse: Tensor, mass: Tensor | None) -> None:
        def over() -> None:
            LayerKV._prompted(self, qs, lse, mass)
            if self.ends:
                LayerKV.settle(self)

        self.own, self.over = qs, over

    def _tidied(self) -> None:
        pass

    def settle(self) -> None:
        if not self.answering:
            self._over()  # should not all have asked, nobody will now
        if self.own is None:
            super().settle()

    def _over(self) -> None:
        """All have asked, or those that have are all there will be."""
        if self.own is not None and self.over is not None:
            missing = self.asking - 1 - len(self.others)
            self.beside, over = self.others + [self.own.alone()] * missing, self.over
            self.own, self.over, self.others = None, None, []
            over()
