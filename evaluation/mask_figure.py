"""A picture of masks: what masked image modelling hides of an image, by a model's attention, in blocks or at random."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from distill.masking import attention_mask, block_mask, random_mask, reveal_hints
from evaluation.attention import attention_maps, common_top, enlarge, pictures
from evaluation.attention_figure import grid, save_png

TITLES = {
    "block": "block-wise",
    "rand": "random",
    "attmask_high": "AttMask-High",
    "attmask_hint": "AttMask-Hint",
    "attmask_low": "AttMask-Low",
}
HIDDEN = (128, 128, 128)  # what a hidden patch looks like


def masks_of(attention: Tensor, ratio: float, show_max: float, seed: int = 0) -> dict[str, Tensor]:
    """Masks (B, h, w) bool of every kind for attention (B, h, w), under the names of --pred_shape."""
    batch, *cells = attention.shape
    generator = torch.Generator().manual_seed(seed)
    flat = attention.flatten(1)
    high = attention_mask(flat, ratio, "attmask_high")
    noise = torch.rand(flat.shape, generator=generator)
    masks = {
        "block": torch.stack([block_mask(tuple(cells), ratio, generator) for _ in range(batch)]),
        "rand": torch.stack([random_mask(flat.shape[1], ratio, generator) for _ in range(batch)]),
        "attmask_high": high,
        "attmask_hint": reveal_hints(high, flat, show_max * ratio, show_max, noise),
        "attmask_low": attention_mask(flat, ratio, "attmask_low"),
    }
    return {name: mask.view(batch, *cells) for name, mask in masks.items()}


def mask_figure(
    model: nn.Module,
    images: Tensor,
    path: str | Path,
    ratio: float = 0.3,
    show_max: float = 0.1,
    seed: int = 0,
    side: int | None = None,
) -> Path:
    """Write a labelled PNG: a row per image, with its attention and every kind of mask that hides `ratio` of it.

    images: uint8 (B, C, H, W). side: pixels of a picture's shorter side, by default at least 224.
    Raises ValueError if the model has no attention map.
    """
    side = side or max(224, min(images.shape[-2:]))
    maps = attention_maps(model, images).mean(1)  # (B, h, w)
    top, masks = common_top([maps]), masks_of(maps, ratio, show_max, seed)
    rows = []
    for i, image in enumerate(images):
        shown = pictures(image, maps[i], side=side, top=top)
        hidden = [without(shown["image"], masks[name][i]) for name in TITLES]
        rows.append([shown["image"], shown["overlay"], *hidden])
    save_png(grid(rows, ["image", "attention", *TITLES.values()], top=top), path)
    return Path(path)


def without(picture: np.ndarray, mask: Tensor) -> np.ndarray:
    """The picture (H, W, 3) with the patches of a mask (h, w) hidden."""
    hidden = enlarge(mask.float(), picture.shape[:2], smooth=False).numpy() > 0.5
    result = picture.copy()
    result[hidden] = HIDDEN
    return result
