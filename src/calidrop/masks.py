"""The model's mask as a function of positions: what transformers, a user or an outer model says is seen.

The mask function returns an object instead of a tensor: the model hands it to every layer, and it is evaluated only at
the positions that are still stored.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.masking_utils import causal_mask_function, sdpa_mask, sliding_window_causal_mask_function

from calidrop import attention as oracle

ASSISTED = "_assisted_decoding"  # the method of transformers that proposes, verifies and crops
SLIDING = sliding_window_causal_mask_function(1)
HIDDEN = -1000.0  # what an additive mask has at most where it hides: nothing is left of e^-1000
_read = WeakTensorKeyDictionary()  # additive masks of the user's: which layer asked last, and what it was told


class Told(NamedTuple):
    """What masks said of a cache's columns. pads: bool [B,columns], True for real tokens, as are all behind them; None:
    all real."""

    pads: Tensor | None = None


REAL = Told()  # one for all layers, as they are told apart by identity


def _compare(was: Tensor | None, now: Tensor | None, n: int) -> None:
    """Raises ValueError where two masks (as in `Told`) differ in their first n columns."""
    one: Any = now if was is None else was
    real = one.new_ones(len(one), n)
    both = [real if x is None else F.pad(x[:, :n], (0, max(0, n - x.shape[1])), value=True) for x in (was, now)]
    differ = both[0].to(both[1].device) != both[1]
    if bool(differ.any()):
        row, column = differ.nonzero()[0].tolist()
        got = int(both[1].expand_as(differ)[row, column])
        raise ValueError(
            f"the attention mask must say of cached columns what it said when they came: got {got} in column {column} "
            f"of row {row}, expected {1 - got}"
        )


class PositionMask:
    """The model's mask as a function of positions.

    pads: bool [B, columns], True for real tokens; None: all real. new_pads: whether any of the new columns is a pad.
    visible: None for the plain causal rule. window: how many columns it shows where it is a sliding window. first:
    the column of the first key, in a cache that forgets its oldest. prompt: whether the new columns belong to a
    prompt though there may be only one. ends: whether they end it; None where that is not known. assisted: whether
    assisted decoding runs. given: of how many columns the user said whether they are real. start: behind how many
    columns the new ones come; None where that is not known."""

    ndim = 4  # of the tensor that others would make: a decoder that is given one passes it on as it is

    def __init__(
        self,
        pads: Tensor | None = None,
        new_pads: bool = False,
        visible: oracle.Visible | None = None,
        first: int = 0,
        prompt: bool = False,
        ends: bool | None = None,
        assisted: bool = False,
        window: int | None = None,
        given: int = 0,
        start: int | None = None,
    ):
        self.pads, self.new_pads, self.visible, self.first = pads, new_pads, visible, first
        self.prompt, self.ends, self.assisted, self.window, self.given = prompt, ends, assisted, window, given
        self.start = start
        self._known: tuple[Any, Tensor, Tensor] | None = None  # what `positions` said last: most layers ask the same
        self._agreed: tuple[Any, Told | None] | None = None  # what `agreed` said last

    def to(self, device: Any, non_blocking: bool = False, **kwargs: Any) -> PositionMask:
        """accelerate moves the inputs of every layer to its device."""
        pads = None if self.pads is None else self.pads.to(device, non_blocking=non_blocking)
        moved = copy.copy(self)
        moved.pads = pads
        return moved

    def contiguous(self) -> PositionMask:
        """`generate` of some versions asks this of masks beside a static cache."""
        return self

    def __getitem__(self, index: tuple[slice, ...]) -> PositionMask:
        """Models may go on with the last queries alone, and cut their mask [B,heads,T,columns] to these: here queries
        are told apart by where they stand."""
        if len(index) != 4 or any(x != slice(None) for x in (*index[:2], index[3])) or index[2].stop is not None:
            raise TypeError(f"a mask can be cut to the last queries ([:, :, -n:, :]), got {index}")
        return self

    def positions(self, batch: int, heads: int, seen: int, new: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """int32 [B,T] and [B,heads,T]: columns of the new tokens, -1 for pads."""
        asked = batch, heads, seen, new, device
        if self._known is None or self._known[0] != asked:
            pos = torch.arange(seen, seen + new, dtype=torch.int32, device=device).expand(batch, new)
            if self.pads is not None and self.new_pads:
                pos = pos.masked_fill(~self.pads[:, seen : seen + new].to(device), -1)
            self._known = asked, pos, pos[:, None].expand(batch, heads, new)
        return self._known[1:]

    def agreed(self, told: Told | None, seen: int, new: int) -> Told | None:
        """What a cache of `seen` columns knows of them and of `new` ones. told: what it knew. Raises ValueError where a
        column was a pad when it came and is none now, or the other way round. All layers of a pass share one answer,
        and a device is not waited for at every generated token of padded rows: their next block is compared."""
        if not self.given:
            return told if self.pads is None else None
        asked = told, seen, new
        if self._agreed is None or self._agreed[0][0] is not told or self._agreed[0][1:] != asked[1:]:
            self._agreed = asked, self._agree(told, seen, new)
        return self._agreed[1]

    def _agree(self, told: Told | None, seen: int, new: int) -> Told | None:
        now = self.pads
        if told is not None and seen:
            was = told.pads
            if was is None and now is None:
                return told
            one: Any = now if was is None else was
            suspect = now is None or (was is None and not self.new_pads)  # a pad is there alone
            if new == 1 and one.device.type != "cpu" and not suspect:
                return Told(now) if self.new_pads else told
            _compare(was, now, min(self.given, seen))
        return Told(None if now is None else now.clone())  # the user may go on writing into it

    def columns(self, query: Tensor, heads: int, n: int) -> tuple[Tensor, Tensor]:
        """Positions of the queries [B,T] and keys [B,heads,n] of a cache that holds the last n columns."""
        B, _, T, _ = query.shape
        pos = torch.arange(self.first, self.first + n, device=query.device).expand(B, heads, n)
        q_pos = torch.arange(self.first + n - T, self.first + n, device=query.device).expand(B, T)
        if self.pads is not None:
            pos = pos.masked_fill(~self.pads[:, None, self.first : self.first + n].to(pos.device), -1)
        return q_pos, pos


def _from_function(fn: Callable) -> oracle.Visible:
    """An index-based mask function of transformers, evaluated at positions."""

    def visible(q_pos: Tensor, kv_pos: Tensor) -> Tensor:
        B, H, _ = kv_pos.shape
        device = kv_pos.device
        b = torch.arange(B, device=device).view(B, 1, 1, 1)
        h = torch.arange(H, device=device).view(1, H, 1, 1)
        mask = fn(b, h, q_pos.clamp(min=0)[:, None, :, None].long(), kv_pos.clamp(min=0)[:, :, None, :].long())
        return mask.expand(B, H, q_pos.shape[1], kv_pos.shape[2])

    return visible


def _sliding(fn: Callable) -> int | None:
    """The window of a mask function that is transformers' own of a causal sliding window, None of any other."""
    parts = _closed_over(fn, SLIDING)
    if not isinstance(parts, tuple) or len(parts) != 2 or parts[1] is not causal_mask_function:
        return None
    known: Any = _closed_over(SLIDING, SLIDING)
    window = _closed_over(parts[0], known[0])
    return window if isinstance(window, int) else None


def _closed_over(fn: Any, like: Any) -> Any:
    """The one value that a function holds, if it is of the same code as another; else None."""
    cells: Any = getattr(fn, "__closure__", None) or ()
    same = getattr(fn, "__code__", None) is like.__code__ and len(cells) == 1
    return cells[0].cell_contents if same else None


@functools.cache
def within(window: int) -> PositionMask:
    """The mask of a generated token in a layer with a sliding window."""
    return PositionMask(visible=_from_function(sliding_window_causal_mask_function(window)), window=window)


def _from_tensor(mask: Tensor) -> oracle.Visible:
    """A 4-D mask of the user's, bool or additive, [B or 1,1,T,columns] for the current queries."""
    seen = mask if mask.dtype == torch.bool else _shown(mask)
    offset = mask.shape[-1] - mask.shape[-2]

    def visible(q_pos: Tensor, kv_pos: Tensor) -> Tensor:
        rows = (q_pos - offset).clamp(min=0).long()  # a later block of the queries starts further down
        B, H, N = kv_pos.shape
        picked = seen.expand(B, -1, -1, -1).gather(2, rows[:, None, :, None].expand(B, 1, -1, seen.shape[3]))
        at = kv_pos.clamp(min=0)[:, :, None].expand(B, H, rows.shape[1], N).long()
        return picked.expand(B, H, -1, -1).gather(3, at)

    return visible


def _shown(mask: Tensor) -> Tensor:
    """Which columns an additive mask shows, bool. Raises ValueError where it says more than that."""
    if not mask.is_floating_point():
        raise ValueError(f"got a mask of {mask.dtype}, expected bool or floating point")
    seen = mask == 0
    other = ~(seen | (mask <= HIDDEN))
    if bool(other.any()):
        raise ValueError(
            f"got a mask that adds {mask[other][0].item():g} to a score, expected 0 (visible) or {HIDDEN:g} and less "
            "(hidden): biases are not supported"
        )
    return seen


def as_given(module: nn.Module, query: Tensor, mask: Tensor | None, columns: int | None) -> PositionMask:
    """The mask that the user gave for queries [B,Hq,T,D], [B or 1,1,T,columns], or none. columns: None where nobody
    knows. An additive one is read, for which the device is waited, by the first layer of a forward pass alone. Raises
    ValueError for one of another shape or with other values than `_shown` takes."""
    if mask is None:
        return PositionMask()
    B, T, N = query.shape[0], query.shape[2], mask.shape[-1] if columns is None else columns
    if mask.dim() != 4 or mask.shape[0] not in (1, B) or mask.shape[1:] != (1, T, N):
        raise ValueError(
            f"got a mask of shape {list(mask.shape)}, expected [{B}, 1, {T}, {N}], the same for all heads: "
            "rows, 1, queries, columns"
        )
    if mask.dtype == torch.bool:
        return PositionMask(visible=_from_tensor(mask))
    at, known = getattr(module, "layer_idx", -1), _read.get(mask)
    # else another pass asks, before which it may have been written into
    read = known[1] if known is not None and known[0] < at else PositionMask(visible=_from_tensor(mask))
    _read[mask] = at, read
    return read


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | PositionMask | None = None,
    **kwargs: Any,
) -> PositionMask | Tensor | None:
    """What transformers calls once per kind of layer and forward pass. attention_mask: bool [B, columns], None, or what
    an outer model got here. -> what sdpa would get where the columns do not end with the queries: a static cache is
    filled from the front (and its offset is a tensor). So too where a model is traced or exported, which it is without
    a cache of ours: what holds for this mask's pads must not be taken for a fact."""
    if isinstance(attention_mask, PositionMask):
        return attention_mask
    traced = torch.jit.is_tracing() or torch.compiler.is_exporting()  # pyright: ignore[reportPrivateImportUsage]
    if traced or isinstance(q_offset, Tensor) or kv_offset + kv_length != q_offset + q_length:
        places = batch_size, q_length, kv_length, q_offset, kv_offset
        return sdpa_mask(*places, mask_function=mask_function, attention_mask=attention_mask, **kwargs)
    if q_length == 0:
        raise ValueError("empty prompt: expected at least one token, got none")
    pads, start, given = attention_mask, int(q_offset), 0 if attention_mask is None else attention_mask.shape[-1]
    if pads is not None and pads.shape[-1] < kv_length:
        pads = F.pad(pads, (0, kv_length - pads.shape[-1]), value=True)
    if pads is not None and bool(pads.all()):
        pads = None
    new_pads = pads is not None and not bool(pads[:, start : start + q_length].all())
    plain = mask_function is causal_mask_function
    visible, window = (None, None) if plain else (_from_function(mask_function), _sliding(mask_function))
    caller = sys._getframe(1)
    assisted = called_from(caller, ASSISTED) is not None
    return PositionMask(pads, new_pads, visible, int(kv_offset), *prefill(caller), assisted, window, given, start)


def prefill(frame: FrameType | None) -> tuple[bool, bool | None]:
    """Whether `generate` is in its prefill, and whether this forward pass is the last of it (None: not known).

    Nothing that reaches a cache says so, but compression must wait for the whole prompt: `prefill_chunk_size` feeds it
    in several passes, the last of which may be a single token. Where `generate` is written differently than here, the
    answer is (False, None), and a prompt is compressed when the next token comes."""
    names = called_from(frame, "_prefill")
    if names is None:
        return False, None
    if getattr(names.get("generation_config"), "prefill_chunk_size", 0) is None:
        return True, True
    chunks, at = names.get("input_chunks"), names.get("input_chunk")
    return True, None if chunks is None or at is None else at is chunks[-1]


def called_from(frame: FrameType | None, name: str) -> dict[str, Any] | None:
    """The local variables of the nearest caller of that name in transformers' generation; None if there is none."""
    while frame is not None:
        if frame.f_code.co_name == name and frame.f_globals.get("__name__", "").startswith("transformers.generation"):
            return frame.f_locals
        frame = frame.f_back
    return None
