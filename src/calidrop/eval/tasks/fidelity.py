"""A page of a book predicted as the compressed cache would, against the uncompressed one: KL, agreement, nll."""

from __future__ import annotations

from calidrop.eval.kit import Kit, offsets
from calidrop.eval.sample import Sample

TOKENS = 64  # predicted


def make(kit: Kit, length: int, index: int) -> Sample:
    draw = kit.draw("fidelity", length, index)
    whole = kit.book.passage(length + TOKENS, draw)
    at = offsets(kit.tokenizer, whole)[-TOKENS]
    return Sample("fidelity", "fidelity", "agreement", whole[:at], "", "", (), whole[at:], 8, length, index)
