"""Rows of a padded batch are strangers: one goes on as if it had always been alone."""

import pytest
import torch

import test_half
from calidrop.state import Shared, State
from helpers import feed, layer_of, random_qkv

SLOW = pytest.mark.slow


def parts(value):
    """Every State inside, as often as it can be reached."""
    if isinstance(value, State):
        yield value
        value = vars(value)
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from parts(item)


@pytest.mark.parametrize("recipe", test_half.RECIPES)
@pytest.mark.parametrize("pads", [pytest.param(30, marks=SLOW), 80])
@torch.no_grad()
def test_the_shorter_row_goes_on_alone(recipe, pads):
    """Of a prompt of 100 tokens one row has 70, or 20: less than what formats wait for. The other row leaves on the
    way, where its snapshot stays; no part is reached in two ways, which would take rows twice."""
    qkv = random_qkv(2, 2, 3, 150, 32)
    both, alone = layer_of(recipe, qkv), layer_of(recipe, qkv)
    feed(both, tuple(x[:, :, :100] for x in qkv), None, [0, pads])
    feed(alone, tuple(x[1:, :, :100] for x in qkv), None, [pads])
    for i in range(100, 150):
        if i == 113:
            both.state = both.state.fork()
            found = [id(x) for x in parts(both.state) if not isinstance(x, Shared)]
            assert len(found) == len(set(found))
            both.batch_select_indices(torch.tensor([1]))
        step = tuple(x[:, :, i : i + 1] for x in qkv)
        out = feed(both, step if i < 113 else tuple(x[1:] for x in step), None, [0, pads] if i < 113 else [pads])
        want = feed(alone, tuple(x[1:] for x in step), None, [pads])
        torch.testing.assert_close(out[-1:], want, rtol=1e-3, atol=1e-3)


@SLOW
@pytest.mark.parametrize("recipe", test_half.RECIPES)
@pytest.mark.parametrize("order", [[1, 0], [1, 0, 1]])
@torch.no_grad()
def test_rows_change_places(recipe, order):
    """As beam search has it: every row goes on with what it had, in steps and in a second prompt."""
    qkv, pads = random_qkv(2, 2, 3, 170, 32), [0, 30]
    moved, stayed = layer_of(recipe, qkv), layer_of(recipe, qkv)
    for kv in (moved, stayed):
        feed(kv, tuple(x[:, :, :120] for x in qkv), [100] + [1] * 20, pads)
    rows = torch.tensor(order)
    moved.reorder_cache(rows)
    rest = tuple(x[:, :, 120:] for x in qkv)
    got = feed(moved, tuple(x[rows] for x in rest), [1] * 30 + [20], [pads[i] for i in order])
    torch.testing.assert_close(got, feed(stayed, rest, [1] * 30 + [20], pads)[rows], rtol=1e-3, atol=1e-3)


@SLOW
@pytest.mark.parametrize("recipe", test_half.RECIPES)
@torch.no_grad()
def test_a_row_without_a_prompt(recipe):
    """A row of nothing but pads gets tokens later, and disturbs nobody."""
    qkv, sizes = random_qkv(2, 2, 3, 150, 32), [100] + [1] * 50
    both = feed(layer_of(recipe, qkv), qkv, sizes, [0, 100])
    alone = feed(layer_of(recipe, qkv), tuple(x[:1] for x in qkv), sizes, [0])
    assert both.isfinite().all()
    torch.testing.assert_close(both[:1], alone, rtol=1e-3, atol=1e-3)
