"""A book continued at length: what is generated is compressed too where the recipe says so. The uncompressed cache's
own answer is the gold one."""

from __future__ import annotations

from calidrop.eval.kit import Kit
from calidrop.eval.sample import Sample

TOKENS = 192  # generated


def make(kit: Kit, length: int, index: int) -> Sample:
    passage = kit.book.passage(length, kit.draw("generation", length, index))
    return Sample("generation", "generation", "same_start", passage, "", "", (), "", TOKENS, length, index)
