"""Student and teacher of masked image modelling: one forward each per step, with head outputs for masked patches only.

The student sees masked global crops and unmasked local crops; the teacher sees the global crops unmasked. What is
masked may follow from the teacher's attention, so the teacher asks for the masks in the middle of its forward. The
logits of patches are computed for those that are masked, whose largest possible number the host knows.

Shape letters: B images, G global crops of each, L local ones, N patches of a global crop, M masked patches (some may
only fill up), K and K2 prototypes of [CLS] and of patches, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distill.multicrop import MultiCropWrapper


class Masks(NamedTuple):
    """Which patches of G·B crops are hidden from the student.

    mask: (G·B, N) bool. chosen: (M,) int64, rows of the G·B·N patches that contain all masked ones. weights: (M,)
    float32, 1 / (G·B · masked patches of the crop), or 0 for a patch that is not masked.
    """

    mask: Tensor
    chosen: Tensor
    weights: Tensor


def masks_with_rows(mask: Tensor, most: int, crops: Tensor | None = None) -> Masks:
    """The rows and weights of a mask (G·B, N) bool, without reading it on the host.

    Args:
        most: no crop has more masked patches than this.
        crops: (C,) int64, the crops that may have masked patches; all by default.
    """
    total, patches = mask.shape
    rows = mask if crops is None else mask.index_select(0, crops)
    order = rows.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]  # (C, most), masked ones first
    hidden = rows.gather(1, order).to(torch.float32)
    first = torch.arange(total, device=mask.device) if crops is None else crops
    weights = hidden / (hidden.sum(dim=1, keepdim=True).clamp(min=1) * total)
    return Masks(mask, (first[:, None] * patches + order).flatten(), weights.flatten())


class TeacherOutput(NamedTuple):
    """cls: (G·B, K). patch: (M, K2). patch_mean: (K2,), the mean over patches summed over crops. masks: as chosen."""

    cls: Tensor
    patch: Tensor
    patch_mean: Tensor
    masks: Masks


class MaskingTeacher(MultiCropWrapper):
    """`choose` gets the attention (G·B, N), averaged over heads, and returns the masks."""

    def forward(self, crops: Tensor, choose: Callable[[Tensor], Masks]) -> TeacherOutput:
        """Global crops (G·B, C, H, W) -> logits of all [CLS] and of the chosen patches."""
        cls, patches, attention = self.backbone.forward_dense(crops)
        masks = choose(attention.float().mean(dim=1))
        return TeacherOutput(*self.head(cls, patches, masks.chosen, all_patches=True), masks)


class MaskedStudent(MultiCropWrapper):
    """Masks its global crops if its backbone was built with masked_im_modeling; else only the loss uses the masks."""

    def forward(self, crops: Sequence[Tensor], masks: Masks) -> tuple[Tensor, Tensor]:
        """[(G·B, C, H, W), (L·B, C, h, w) if there are local crops] -> (V·B, K) of [CLS] and (M, K2) of patches."""
        mask = masks.mask if hasattr(self.backbone, "masked_embed") else None
        cls, patches, _ = self.backbone.forward_dense(crops[0], mask, need_attention=False)
        local = [self.backbone(crop) for crop in crops[1:]]
        if not self.head.has_batchnorm:
            return self.head(torch.cat((cls, *local)), patches, masks.chosen)
        cls, patch = self.head(cls, patches, masks.chosen)  # BatchNorm sees global and local crops apart, as published
        return torch.cat((cls, *[self.head(crop) for crop in local])), patch
