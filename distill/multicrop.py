"""One forward through the backbone per resolution, one through the head for all crops."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class MultiCropWrapper(nn.Module):
    """`head(backbone(crops))` for crops of several sizes (DINO's name and state-dict keys).

    Consecutive crops of the same height and width go through the backbone together. The published code compares widths
    only, which mixes up crops of equal width and different height.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        # The head takes features, not a classifier's output; DINO's scripts rely on its removal here.
        backbone.fc, backbone.head = nn.Identity(), nn.Identity()
        self.backbone = backbone
        self.head = head

    def forward(self, crops: Tensor | Sequence[Tensor]) -> Tensor:
        """One tensor (B, C, H, W) or several -> head outputs (sum of the batch sizes, K), in the same order."""
        return self.head(self.features(crops))

    def features(self, crops: Tensor | Sequence[Tensor]) -> Tensor:
        """The backbone's features (sum of the batch sizes, D), before the head."""
        if isinstance(crops, Tensor):
            crops = [crops]
        groups = [list(group) for _, group in itertools.groupby(crops, key=lambda crop: crop.shape[-2:])]
        features = []
        for group in groups:
            feature = self.backbone(group[0] if len(group) == 1 else torch.cat(group))
            # XCiT-like models return a tuple with the class token's output first.
            features.append(feature[0] if isinstance(feature, tuple) else feature)
        return features[0] if len(features) == 1 else torch.cat(features)
