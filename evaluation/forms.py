"""What a linear head sees: forms of a frozen model's features.

Letters: B batch, D width of one block's tokens.
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
    """One (B, width) tensor per form, from one pass of the model over (B, C, H, W).

    Raises ValueError for a form that the model does not have.
    """
    if not has_cls_token(model):
        for form in forms:
            if form != Form():
                asked = f"n_last_blocks {form.n}" if form.n > 1 else "avgpool_patchtokens true"
                raise ValueError(
                    f"{asked} combines [CLS] tokens, and this model ({type(model).__name__}, {_pooling(model)}) has "
                    "none, only one feature per image: leave --n_last_blocks and --avgpool_patchtokens out"
                )
        return [model(images)] * len(forms)
    deepest = deepest_block(model, forms)
    return features_of_layers(model.get_intermediate_layers(images, deepest), forms)


def deepest_block(model: nn.Module, forms: Sequence[Form]) -> int:
    """How many of the last blocks the forms need. Raises ValueError if the model has fewer."""
    deepest = max((form.n for form in forms), default=1)
    if deepest > len(model.blocks):
        raise ValueError(f"n_last_blocks {deepest} exceeds the {len(model.blocks)} blocks of the model")
    return deepest


def features_of_layers(layers: Sequence[Tensor], forms: Sequence[Form]) -> list[Tensor]:
    """One (B, width) tensor per form, from the normed tokens (B, T, D) of the last blocks, [CLS] first."""
    features = []
    for form in forms:
        cls = torch.cat([tokens[:, 0] for tokens in layers[-form.n :]], dim=1)  # (B, n * D)
        features.append(with_mean_patch(cls, layers[-1][:, 1:].mean(dim=1)) if form.avgpool else cls)
    return features


def with_mean_patch(cls: Tensor, mean: Tensor) -> Tensor:
    """[CLS] (B, n * D) and the mean patch token (B, D) in the order of DINO's published heads.

    With one block DINO interleaves the two, c0 m0 c1 m1 ..., and so must every head that its evaluator and ours are to
    read alike. With several blocks its code fails, so there the order is ours: the mean follows.
    """
    if cls.shape == mean.shape:
        return torch.stack([cls, mean], dim=-1).flatten(1)
    return torch.cat([cls, mean], dim=1)


def interleaved_weight(weight: Tensor) -> Tensor:
    """A head's weight (C, 2 * D) on [CLS] followed by the mean, for features in the order of `with_mean_patch`."""
    cls, mean = weight.chunk(2, dim=1)
    return with_mean_patch(cls, mean)


def form_widths(model: nn.Module, forms: Sequence[Form], side: int, in_chans: int, device: torch.device) -> list[int]:
    """Width of each form's features, found on a blank image. Raises ValueError as `probe_features` does."""
    blank = torch.zeros(2, in_chans, side, side, device=device)
    with torch.no_grad():
        return [x.shape[1] for x in probe_features(model, blank, forms)]


def _pooling(model: nn.Module) -> str:
    mode = getattr(model, "mode", "official")
    return {"simpool": "SimPool", "official": "its own pooling"}.get(mode, mode)
