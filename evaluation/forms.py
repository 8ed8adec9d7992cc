"""What a linear head sees: forms of a frozen model's features.

Letters: B batch, D width of one form of the features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Form(NamedTuple):
    """One form of a model's features: [CLS] of the last n blocks, with or without the mean patch token.

    n = 1 without it is the model's own feature, for any model.
    """

    n: int = 1
    avgpool: bool = False

    @property
    def name(self) -> str:
        return f"{self.n} block{'s' if self.n > 1 else ''}{' + mean patch' if self.avgpool else ''}"


def has_cls_token(model: nn.Module) -> bool:
    """Whether the model gives [CLS] and patch tokens of its last blocks (official ViTs of ours)."""
    return hasattr(model, "get_intermediate_layers") and getattr(model, "cls_token", None) is not None


def default_forms(model: nn.Module) -> list[Form]:
    """The published choice: [CLS] of 4 blocks for an official ViT, of 1 and the mean patch for its base size."""
    if not has_cls_token(model):
        return [Form()]
    return [Form(1, True)] if model.num_features >= 768 else [Form(min(4, len(model.blocks)))]


def probe_features(model: nn.Module, images: Tensor, forms: Sequence[Form]) -> list[Tensor]:
    """One (B, D) tensor per form, from one pass of the model over (B, C, H, W).

    Raises ValueError for a form that the model does not have.
    """
    if not has_cls_token(model):
        if any(form != Form() for form in forms):
            raise ValueError(
                f"{type(model).__name__} without a [CLS] token has one feature per image: give n_last_blocks 1 and "
                "avgpool_patchtokens false"
            )
        return [model(images)] * len(forms)
    deepest = max(form.n for form in forms)
    if deepest > len(model.blocks):
        raise ValueError(f"n_last_blocks {deepest} exceeds the {len(model.blocks)} blocks of the model")
    layers = model.get_intermediate_layers(images, deepest)  # normed tokens, the last block at the end
    features = []
    for form in forms:
        parts = [tokens[:, 0] for tokens in layers[-form.n :]]
        if form.avgpool:
            parts.append(layers[-1][:, 1:].mean(dim=1))
        features.append(torch.cat(parts, dim=1))
    return features
