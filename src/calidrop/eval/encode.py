"""Samples as token ids, and generated text as an answer."""

from __future__ import annotations

from typing import Any

from calidrop.eval.sample import Sample


def encode(tokenizer: Any, sample: Sample, question: str | None) -> list[list[int]]:
    """The prompt, what is asked of the compressed cache, and the gold answer: token ids of the text as a whole, so that
    no token depends on where the text is cut; one that reaches over a cut belongs to where it starts. Raises ValueError
    where the prompt has no token."""
    asked = sample.question + sample.prefix
    whole = sample.context + asked + sample.gold
    starts_itself = bool(tokenizer.bos_token) and whole.startswith(tokenizer.bos_token)
    told = tokenizer(whole, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False,
                     add_special_tokens=not starts_itself)  # fmt: skip
    prompt = sample.context if question == "later" else sample.context + asked
    cuts = len(prompt), len(whole) - len(sample.gold)
    pieces: list[list[int]] = [[], [], []]
    columns = told["input_ids"], told["offset_mapping"], told["special_tokens_mask"]
    for token, (start, _), special in zip(*columns, strict=True):
        if not special or not any(pieces):  # an end token that the tokenizer adds is left out
            pieces[sum(start >= cut for cut in cuts)].append(token)
    if not pieces[0]:
        raise ValueError(f"{sample.task}: the context of sample {sample.index} has no tokens")
    return pieces


def until(text: str, stop: tuple[str, ...]) -> str:
    """Up to the first of the strings that end an answer."""
    return text[: min([text.find(s) for s in stop if s in text], default=len(text))]
