"""Masks over the patches of an image: where the teacher looks (AttMask), in blocks (BEiT, iBOT), or at random.

Follows "What to Hide from Your Students: Attention-Guided Masked Image Modeling" (ECCV 2022). In every mask, True means
that the patch is hidden from the student.

The masks from attention are computed on its device, and nothing is read back to the host: a count follows from the
ratio, which the host knows. The published code sorts on the host.

Shape letters: B images, h, w grid of patches, N = h w patches.
"""

from __future__ import annotations

import difflib
import math

import torch
from torch import Tensor

ATTENTION_MODES = ("attmask_high", "attmask_low")
LOG_ASPECT = math.log(1 / 0.3)  # a block's log aspect ratio lies between -LOG_ASPECT and LOG_ASPECT
TRIES_PER_BLOCK = 10


def attention_mask(attention: Tensor, ratio: float, mode: str) -> Tensor:
    """Mask the int(ratio · N) most (attmask_high) or least (attmask_low) attended patches of each image.

    Args:
        attention: (B, N), of any scale; among equal values the lowest index is masked first.
        ratio: in [0, 1]; the product with N is taken in float64.

    Returns:
        (B, N) bool, on the attention's device.

    Raises:
        ValueError: for a mode, ratio or shape that can't work.
    """
    if mode not in ATTENTION_MODES:
        near = difflib.get_close_matches(str(mode), ATTENTION_MODES, n=2)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise ValueError(f"unknown mode {mode!r} of masking by attention{hint}; known are {', '.join(ATTENTION_MODES)}")
    _check_attention(attention)
    count = _share("ratio", ratio, attention.shape[1])
    order = attention.argsort(dim=1, descending=mode == "attmask_high", stable=True)
    return _at(order[:, :count], attention)


def reveal_hints(mask: Tensor, attention: Tensor, show_ratio: float, show_max: float, noise: Tensor) -> Tensor:
    """AttMask-Hint: uncover a few of the most attended patches in the mask of attmask_high.

    int(show_ratio · N) patches are drawn without replacement from the int(show_max · N) most attended ones: none if
    that number is 0, all of them if it is larger than there are. A patch that is drawn but not masked stays as it is.

    Args:
        mask: (B, N) bool.
        attention: (B, N), what the mask was made from.
        show_ratio: in [0, 1]. show_max: in (0, 1).
        noise: (B, N), independent and uniform in [0, 1): the draw itself, so that the caller owns the randomness.

    Returns:
        (B, N) bool; `mask` is left alone.

    Raises:
        ValueError: for a ratio or shape that can't work.
    """
    _check_attention(attention)
    for name, given in (("mask", mask), ("noise", noise)):
        if given.shape != attention.shape:
            raise ValueError(
                f"{name} has shape {tuple(given.shape)}, the attention {tuple(attention.shape)}; they must be equal"
            )
    if mask.dtype != torch.bool:
        raise ValueError(f"mask has dtype {mask.dtype}; it must be torch.bool")
    if not 0 < show_max < 1:
        raise ValueError(f"show_max is {show_max}; it must lie between 0 and 1, both excluded")
    patches = attention.shape[1]
    top = attention.argsort(dim=1, descending=True, stable=True)[:, : int(float(show_max) * patches)]
    # The patches with the least noise are a draw without replacement.
    drawn = noise.gather(1, top).argsort(dim=1, stable=True)[:, : _share("show_ratio", show_ratio, patches)]
    return mask & ~_at(top.gather(1, drawn), attention)


def block_mask(grid: tuple[int, int], ratio: float, generator: torch.Generator | None = None) -> Tensor:
    """BEiT's mask: rectangles that may overlap, until ratio · N patches are masked or nothing more fits.

    A rectangle's area is uniform between (min(h, w) // 3)² and what is left to mask, the logarithm of its aspect ratio
    uniform between log 0.3 and log 1/0.3. Up to ten are tried before the mask is taken as it is, so it never has more
    than ratio · N patches, and often a few less.

    Returns:
        (h, w) bool, on the CPU.

    Raises:
        ValueError: for a grid or ratio that can't work.
    """
    if len(grid) != 2 or min(grid) < 1:
        raise ValueError(f"grid {tuple(grid)} is not a pair of positive numbers (h, w)")
    height, width = grid
    _check_ratio("ratio", ratio)
    mask = torch.zeros(height, width, dtype=torch.bool)
    left = float(ratio) * height * width
    while left > 0:
        added = _add_block(mask, left, generator)
        if not added:
            break
        left -= added
    return mask


def random_mask(count: int, ratio: float, generator: torch.Generator | None = None) -> Tensor:
    """Mask int(ratio · count) of `count` patches, each subset equally likely; (count,) bool, on the CPU.

    Raises:
        ValueError: for a count below 0 or a ratio outside [0, 1].
    """
    if count < 0:
        raise ValueError(f"count is {count}; a mask needs a number of patches of at least 0")
    mask = torch.zeros(count, dtype=torch.bool)
    mask[torch.randperm(count, generator=generator)[: _share("ratio", ratio, count)]] = True
    return mask


def _add_block(mask: Tensor, left: float, generator: torch.Generator | None) -> int:
    """Add one rectangle of at most `left` new patches to the mask (h, w), in place; how many patches are new."""
    height, width = mask.shape
    least = (min(height, width) // 3) ** 2
    for draws in torch.rand(TRIES_PER_BLOCK, 4, dtype=torch.float64, generator=generator).tolist():
        area = least + draws[0] * (left - least)
        aspect = math.exp((2 * draws[1] - 1) * LOG_ASPECT)
        rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if rows >= height or columns >= width:
            continue
        top, start = int(draws[2] * (height - rows + 1)), int(draws[3] * (width - columns + 1))
        block = mask[top : top + rows, start : start + columns]
        added = block.numel() - int(block.sum())
        if 0 < added <= left:
            block.fill_(True)
            return added
    return 0


def _at(indices: Tensor, like: Tensor) -> Tensor:
    """(B, N) bool in the shape of `like`, True at the indices (B, n)."""
    return torch.zeros_like(like, dtype=torch.bool).scatter_(1, indices, True)


def _share(name: str, ratio: float, count: int) -> int:
    """int(ratio · count) in float64; ValueError, naming the ratio, if it is outside [0, 1]."""
    _check_ratio(name, ratio)
    return int(float(ratio) * count)


def _check_ratio(name: str, ratio: float) -> None:
    if not 0 <= ratio <= 1:
        raise ValueError(f"{name} is {ratio}; it must lie in [0, 1]")


def _check_attention(attention: Tensor) -> None:
    if attention.ndim != 2:
        raise ValueError(
            f"attention has shape {tuple(attention.shape)}; it must be (B, N): average it over the heads and leave out "
            "[CLS] first"
        )
