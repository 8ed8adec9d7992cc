"""Images without what a model looks at: the masked validation set of AttMask (ECCV 2022, section 4.2).

The patches that a second model attends to most are painted black; a classifier that needs more than the most telling
parts of an object loses less.

Letters: B images, C channels, H x W pixels, h x w patches of the second model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.loader import normalize
from distill.masking import attention_mask


def hide_attended(images: Tensor, attention: Tensor, ratio: float) -> Tensor:
    """Normalised images (B, C, H, W) with the int(ratio · h w) most attended patches of (B, h, w) black.

    Raises ValueError for a ratio outside [0, 1], and for attention that is not finite.
    """
    if not attention.isfinite().all():
        raise ValueError("the attention that decides what to hide is not finite: that model's weights have diverged")
    hidden = attention_mask(attention.flatten(1), ratio, "attmask_high").view(attention.shape)
    pixels = F.interpolate(hidden[:, None].float(), images.shape[-2:])  # (B, 1, H, W), each patch a block
    black = normalize(torch.zeros(1, images.shape[1], 1, 1, dtype=torch.uint8, device=images.device))
    return torch.where(pixels > 0.5, black.to(images.dtype), images)


def at_every_ratio(
    forward: Callable[[Tensor], Tensor], looker: nn.Module, ratios: Sequence[float]
) -> Callable[[Tensor], Tensor]:
    """A forward that joins the features of images as they are and with each part of their attended patches hidden.

    forward: (B, C, H, W) -> (B, D). looker: the model whose attention decides, averaged over its heads.
    The result maps (B, C, H, W) to (B, (1 + ratios) D).
    """

    def joined(images: Tensor) -> Tensor:
        attention = looker.get_attention_map(images).float().mean(1)
        shown = [images, *(hide_attended(images, attention, ratio) for ratio in ratios)]
        return torch.cat([forward(batch) for batch in shown], dim=1)

    return joined
