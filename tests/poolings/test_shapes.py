"""Tokens and maps in the layout that an operator wants."""

import pytest
import torch

from poolings.shapes import as_map, as_tokens
from tests.reference import tensor


@pytest.mark.parametrize("grid", [(3, 3), (2, 5), (5, 2), (1, 7)])
def test_map_and_tokens_are_inverse(grid):
    """Position p of the tokens is row p // W, column p % W of the map."""
    image = tensor(1, (2, 4, *grid))
    tokens = as_tokens(image, 4, "x")
    assert torch.equal(tokens[:, grid[1] * (grid[0] - 1) + 1 % grid[1]], image[:, :, grid[0] - 1, 1 % grid[1]])
    assert torch.equal(as_map(tokens, 4, "x", grid), image)


def test_a_square_needs_no_grid():
    """Nine tokens are a map of 3 x 3."""
    assert as_map(tensor(1, (2, 9, 4)), 4, "x").shape == (2, 4, 3, 3)


def test_nothing_is_copied():
    """Both layouts are views of the input."""
    tokens, image = tensor(1, (2, 9, 4)), tensor(1, (2, 4, 3, 3))
    for x in (tokens, image):
        for layout in (as_tokens, as_map):
            assert layout(x, 4, "x").data_ptr() == x.data_ptr()


@pytest.mark.parametrize(
    ("shape", "grid", "message"),
    [
        ((2, 9), None, r"got shape \(2, 9\)"),
        ((2, 9, 4, 1, 1), None, "got shape"),
        ((2, 9, 5), None, "built for width 4, got 5"),
        ((2, 5, 3, 3), None, "built for width 4, got 5"),
        ((2, 0, 4), None, "no positions"),
        ((2, 4, 0, 3), None, "no positions"),
        ((2, 10, 4), None, r"10 tokens form no square: pass grid=.*\[CLS\]"),
        ((2, 10, 4), (3, 3), r"grid \(3, 3\) has 9 positions, but there are 10 tokens"),
        ((2, 10, 4), (-2, -5), "grid"),
        ((2, 9, 4), (3, 3, 1), "rows, columns"),
        ((2, 4, 3, 5), (5, 3), r"grid \(5, 3\) is not that of the map, \(3, 5\)"),
    ],
)
def test_what_does_not_fit_is_named(shape, grid, message):
    """Rank, width, empty input and grid: each error says what came and what was expected."""
    with pytest.raises(ValueError, match=f"^gem.*{message}"):
        as_map(torch.zeros(shape), 4, "gem", grid)


def test_tokens_check_their_grid_too():
    """An operator that needs no map still refuses a grid that can't be."""
    assert as_tokens(torch.zeros(2, 10, 4), 4, "gap", (2, 5)).shape == (2, 10, 4)
    with pytest.raises(ValueError, match="9 positions"):
        as_tokens(torch.zeros(2, 10, 4), 4, "gap", (3, 3))
