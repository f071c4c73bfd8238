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
