"""Tokens as pieces of text that, joined, are the text: nothing lost, nothing twice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from calidrop.parts import check_int

USUAL = 1024  # tokens, where nobody says how many


@dataclass(frozen=True)
class Piece:
    """What a token adds to the text. It may be nothing: of a character made of several tokens, the first has it all.
    special: the text is the name of a token that stands for none."""

    text: str
    special: bool = False


def beginning(tokenizer: Any, text: str, context: int | None) -> tuple[list[int], list[Piece]]:
    """The first `context` tokens (None: all, 1024 at most). Raises ValueError for a text that has fewer, or none, and
    for a tokenizer that does not tell where its tokens are."""
    if context is not None:
        check_int("context", context, 1)
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"expected a fast tokenizer (one that tells offsets), got {type(tokenizer).__name__}")
    told = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False)
    ids, there = told["input_ids"], len(told["input_ids"])
    if not text or not there:
        raise ValueError("empty text: expected at least one token")
    if context is not None and there < context:
        raise ValueError(f"text too short: got {there} tokens, need {context} (context)")
    n = min(there, USUAL) if context is None else context
    pieces, end = [], 0
    columns = ids, told["offset_mapping"], told["special_tokens_mask"]
    for token, (_, stop), special in list(zip(*columns, strict=True))[:n]:
        if special and stop <= end:
            pieces.append(Piece(tokenizer.convert_ids_to_tokens(token), True))
        else:
            pieces.append(Piece(text[end:stop]))
            end = max(end, stop)
    return ids[:n], pieces


def written(tokenizer: Any, ids: list[int]) -> list[Piece]:
    """Of generated tokens; the last token of a character has it."""
    pieces, done, special = [], "", set(tokenizer.all_special_ids)
    for i, token in enumerate(ids):
        text = tokenizer.decode(ids[: i + 1], skip_special_tokens=True)
        whole = not text.endswith("\ufffd") or i == len(ids) - 1
        if token in special:
            pieces.append(Piece(tokenizer.convert_ids_to_tokens(token), True))
        else:
            pieces.append(Piece(text[len(done) :] if whole else ""))
            done = text if whole else done
    return pieces
