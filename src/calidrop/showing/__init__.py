"""A text as a cache holds it: every token with the form each layer and head has it in, as a page of its own."""

from calidrop.showing.pieces import Piece, beginning
from calidrop.showing.shown import Held, Shown, show

__all__ = ["Held", "Piece", "Shown", "beginning", "show"]
