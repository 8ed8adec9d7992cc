"""What a classifier loses when the patches that another model attends to are black (AttMask's masked ImageNet).

Follows "What to Hide from Your Students" (ECCV 2022): of every validation image the share r of the patches with the
highest attention of a second model, averaged over its heads, becomes black before normalisation. The steeper accuracy
falls with r, the more that attention lies on what tells the classes apart.

Letters: B images, C channels, H x W pixels, h x w patches of the second model, R ratios, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from data.loader import normalize
from data.source import ImageSource
from distill.masking import attention_mask
from evaluation import features
from runtime.guards import InputError


def check_ratios(ratios: Sequence[float]) -> None:
    """Raise InputError unless every ratio is a part of the patches, from 0 to 1."""
    for ratio in ratios:
        if not (math.isfinite(ratio) and 0 <= ratio <= 1):
            raise InputError(f"--mask_ratios {ratio:g}: give parts of the patches, from 0 to 1")


def blackened(images: Tensor, attention: Tensor, ratio: float) -> Tensor:
    """Normalised images (B, C, H, W) with the int(ratio h w) most attended of their patches black.

    attention: (B, h, w). Raises ValueError if the images are not divisible into its h x w patches.
    """
    (height, width), (h, w) = images.shape[-2:], attention.shape[-2:]
    if height % h or width % w:
        raise ValueError(f"images of {height} x {width} pixels do not divide into the map's {h} x {w} patches")
    mask = attention_mask(attention.flatten(1), ratio, "attmask_high").view(attention.shape)
    mask = mask.repeat_interleave(height // h, 1).repeat_interleave(width // w, 2)  # (B, H, W)
    black = normalize(torch.zeros(1, images.shape[1], 1, 1, dtype=torch.uint8, device=images.device), images.dtype)
    return torch.where(mask[:, None], black, images)


def masked_accuracies(
    logits_of: Callable[[Tensor], Tensor],
    masker: nn.Module,
    source: ImageSource,
    ratios: Sequence[float],
    extraction: dict[str, Any],
) -> dict[float, dict[str, float]]:
    """{ratio: {"val_top1", "val_top5"}} in percent of a classifier on images that `masker`'s attention blackens.

    logits_of: normalised images (B, C, H, W) -> (B, K). extraction: the settings of `features.extract_shard`. Each
    image is evaluated on one rank, and read once for all ratios; every rank must call it, and gets the result.
    """

    def answers(images: Tensor) -> Tensor:
        attention = masker.get_attention_map(images).float().mean(1)
        columns = []
        for ratio in ratios:
            logits = logits_of(blackened(images, attention, ratio)).float()
            best = logits.topk(min(5, logits.shape[1])).indices
            columns.append(best + 0 * logits.sum(1, keepdim=True))  # logits that are not finite must not hide
        return torch.cat(columns, dim=1)  # (B, 5 R)

    rows, index = features.extract(masker, source, forward=answers, desc="masked images", **extraction)
    labels = torch.from_numpy(source.labels)[index]
    right = rows.view(len(rows), len(ratios), -1).long() == labels[:, None, None]
    top1, top5 = (100.0 * hits.double().mean(0) for hits in (right[..., 0], right.any(-1)))
    return {ratio: {"val_top1": top1[r].item(), "val_top5": top5[r].item()} for r, ratio in enumerate(ratios)}
