"""Tokens and maps: the layout that a pooling works on, whichever of the two it is given.

A map's positions are numbered row by row: position p of a map of width W lies in row p // W and column p % W.

Shape letters: B batch, N = H*W positions, D width.
"""

from __future__ import annotations

import math

from torch import Tensor

Grid = tuple[int, int]  # rows and columns


def as_tokens(x: Tensor, dim: int, name: str, grid: Grid | None = None) -> Tensor:
    """(B, N, D) tokens or (B, D, H, W) maps as (B, N, D), a view where possible.

    Raises:
        ValueError: for another rank or width, for no positions, and for a grid that x does not have.
    """
    _check(x, dim, name, grid)
    return x if x.ndim == 3 else x.flatten(2).transpose(1, 2)


def as_map(x: Tensor, dim: int, name: str, grid: Grid | None = None) -> Tensor:
    """(B, N, D) tokens or (B, D, H, W) maps as (B, D, H, W), a view where possible.

    Tokens without a grid are taken to be a square one.

    Raises:
        ValueError: as as_tokens does, and for tokens that form no square if no grid is given.
    """
    _check(x, dim, name, grid)
    if x.ndim == 4:
        return x
    positions = x.shape[1]
    side = math.isqrt(positions)
    if grid is None and side * side != positions:
        raise ValueError(
            f"{name} needs a map, and {positions} tokens form no square: pass grid=(rows, columns), "
            "and leave out prefix tokens such as [CLS]"
        )
    return x.transpose(1, 2).unflatten(2, grid or (side, side))


def _check(x: Tensor, dim: int, name: str, grid: Grid | None) -> None:
    """Raise the ValueError that says what is wrong with x, if anything is."""
    shape = tuple(x.shape)
    if x.ndim not in (3, 4):
        raise ValueError(f"{name} takes (B, N, D) tokens or (B, D, H, W) maps, got shape {shape}")
    width = shape[2] if x.ndim == 3 else shape[1]
    if width != dim:
        raise ValueError(
            f"{name} was built for width {dim}, got {width} (shape {shape}); tokens are (B, N, D), maps (B, D, H, W)"
        )
    if math.prod(shape[1:]) == 0:
        raise ValueError(f"{name} has nothing to pool: no positions in shape {shape}")
    if grid is None:
        return
    if len(grid) != 2:
        raise ValueError(f"{name}: grid must be (rows, columns), got {grid!r}")
    rows, columns = grid
    if x.ndim == 4 and (rows, columns) != shape[2:]:
        raise ValueError(f"{name}: grid {(rows, columns)} is not that of the map, {shape[2:]}; leave it out for maps")
    if min(rows, columns) < 1 or rows * columns != math.prod(shape[1:]) // dim:
        raise ValueError(
            f"{name}: grid {(rows, columns)} has {rows * columns} positions, but there are {shape[1]} tokens; "
            "prefix tokens such as [CLS] are not part of a grid"
        )
