"""A layer with keys and values that keeps a state of constant size beside them (Falcon-H1, Zamba2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from calidrop.layer import LayerKV
from calidrop.parts import Plan

PARTS = ("conv_states", "recurrent_states", "has_previous_state")
PARTS += ("is_conv_states_initialized", "is_recurrent_states_initialized", "conv_kernel_size")


State = dict[str, dict[int, Any]]


def state_of(layer: Any) -> State:
    """What any layer keeps beside keys and values, by name and part. transformers writes it in place."""
    return {name: vars(layer)[name] for name in PARTS if name in vars(layer)}


def changed(state: State, fn: Callable[[Tensor], Tensor]) -> State:
    """With `fn` of every tensor."""
    return {name: {i: fn(x) if isinstance(x, Tensor) else x for i, x in parts.items()} for name, parts in state.items()}


class StatefulKV(LinearAttentionLayer, LayerKV):
    """Keys and values as in `LayerKV`; of the state whatever transformers does."""

    def __init__(self, states: int, make: Callable[[], Plan], reach: int | None = None, eager: bool = False):
        LinearAttentionLayer.__init__(self, number_of_states=states)
        LayerKV.__init__(self, make, reach, eager)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """With names for the state, without them for keys and values."""
        (LinearAttentionLayer if kwargs else LayerKV).lazy_initialization(self, *args, **kwargs)

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return False

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        LayerKV.reset(self)

    def reorder_cache(self, beam_idx: Any) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        LayerKV.reorder_cache(self, beam_idx)

    def activate_past_recording(self, prompt_end: int | None = None) -> None:
        raise ValueError("a layer that keeps a state cannot go back")
