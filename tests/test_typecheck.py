"""Tests check what the core's signatures say: in functions, methods, properties and dataclasses."""

import sys
from typing import Any

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation

import typecheck
from calidrop.attention import Queries, attend, visible
from calidrop.budgets import amount, best
from calidrop.tokens import Tokens


def tokens(B: int = 1, H: int = 2, N: int = 3) -> Tokens:
    pos = torch.arange(N, dtype=torch.int32).expand(B, H, N)
    return Tokens(torch.randn(B, H, N, 4), torch.randn(B, H, N, 4), pos)


def test_what_fits_passes():
    t = tokens()
    qs = Queries(torch.randn(1, 4, 1, 4), torch.full((1, 1), 9), 1)  # an int where a float is asked for
    assert attend(qs, t.k, t.v, t.pos)[0].shape == (1, 4, 1, 4)
    assert len(t.select(t.valid)) == 3


@pytest.mark.parametrize("of", ["k", "v", "pos"])
def test_parts_of_other_sizes_are_refused(of):
    """A dimension has one size in a call, and a dataclass is checked as it is made."""
    a, b = tokens(), tokens(N=5)
    columns: dict[str, Any] = {"k": a.k, "v": a.v, "pos": a.pos} | {of: getattr(b, of)}
    with pytest.raises(BeartypeCallHintViolation):
        Tokens(**columns)
    qs = Queries(torch.randn(1, 4, 1, 4), torch.full((1, 1), 9), 1.0)
    with pytest.raises(BeartypeCallHintViolation):
        attend(qs, **columns)


def test_wrong_kinds_and_results_are_refused():
    t = tokens()
    with pytest.raises(BeartypeCallHintViolation):
        t.select(t.pos)
    with pytest.raises(BeartypeCallHintViolation):
        best(torch.randn(2, 3), torch.tensor([1.0, 2.0]))
    with pytest.raises(BeartypeCallHintViolation):
        amount("0.5", 100)  # pyright: ignore[reportArgumentType]
    with pytest.raises(BeartypeCallHintViolation):
        visible(t, t.pos)  # pyright: ignore[reportArgumentType]
    t.pos = t.pos[0]
    with pytest.raises(BeartypeCallHintViolation):  # what a property returns
        _ = t.valid


def test_one_call_says_nothing_of_the_next():
    assert len(tokens(N=3)) == 3 and len(tokens(N=5)) == 5


def test_what_is_imported_already_cannot_be_checked():
    before = list(sys.meta_path)
    with pytest.raises(RuntimeError, match=r"^calidrop\.tokens: "):
        typecheck.install("calidrop.tokens", "calidrop.nothing")
    assert sys.meta_path == before
