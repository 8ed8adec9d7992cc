"""What probes see of a batch: the features of linear heads, and the tokens that attentive probes pool.

All of it comes from one pass of the backbone. Tokens are taken after the final norm: the patches of a ViT (and [CLS],
for probes that take it, if it has one), or the positions of a convolutional network's last map; the same for timm's.

Letters: B images, N tokens (patches, or positions of the last map), D their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from evaluation.forms import Form, deepest_block, features_of_layers, has_cls_token, probe_features
from evaluation.probe_names import ProbeName


class Inputs(NamedTuple):
    """What the heads of a run see of a batch; None for what no head needs."""

    features: list[Tensor]  # (B, width) per form of the linear probe
    patches: Tensor | None = None  # (B, N, D)
    with_cls: Tensor | None = None  # (B, 1 + N, D), [CLS] first

    def tensors(self) -> list[Tensor]:
        return [x for x in (*self.features, self.patches, self.with_cls) if x is not None]

    def map(self, function) -> Inputs:
        """The same with `function` applied to every tensor."""
        rest = (None if x is None else function(x) for x in (self.patches, self.with_cls))
        return Inputs([function(x) for x in self.features], *rest)

    @property
    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.tensors())

    def of(self, probe: ProbeName) -> Tensor:
        """The tokens that an attentive probe pools."""
        return self.with_cls if probe.takes_cls else self.patches


def extract_inputs(model: nn.Module, images: Tensor, forms: Sequence[Form], probes: Sequence[ProbeName]) -> Inputs:
    """Run the model once on (B, C, H, W) images, for the linear probe's `forms` and the attentive ones of `probes`.

    Raises ValueError for a form that the model does not have, and if it cannot serve a probe.
    """
    attentive = [probe for probe in probes if probe.is_attentive]
    if not attentive:
        return Inputs(probe_features(model, images, forms))
    if has_cls_token(model):
        layers = model.get_intermediate_layers(images, deepest_block(model, forms))
        features, cls, patches = features_of_layers(layers, forms), layers[-1][:, :1], layers[-1][:, 1:]
    else:
        if forms and any(form != Form() for form in forms):
            probe_features(model, images, forms)  # raises, and names the form
        feature, cls, patches = _dense(model, images)
        features = [feature] * len(forms)
    with_cls = None
    if any(probe.takes_cls for probe in attentive):
        if cls is None:
            name = next(probe.label for probe in attentive if probe.takes_cls)
            raise ValueError(
                f"--probes {name} pools [CLS] and patches, and this model ({_called(model)}) has no [CLS] token: use "
                "ep, which pools the patches"
            )
        with_cls = torch.cat([cls, patches], dim=1)
    if all(probe.takes_cls for probe in attentive):
        return Inputs(features, None, with_cls)
    return Inputs(features, patches.contiguous(), with_cls)


def _dense(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Feature (B, D'), [CLS] (B, 1, D) or None, and positions (B, N, D) of a model that is no ViT of ours with [CLS].

    Raises ValueError for a model without positions.
    """
    if hasattr(model, "forward_tokens") and model.mode == "official":
        try:
            return model.forward_tokens(images)
        except ValueError as error:
            raise ValueError(f"attentive probes pool tokens or positions: {error}; use --probes linear") from error
    feature, patches, _ = model.forward_dense(images, need_attention=False)
    return feature, None, patches


def grid_of(model: nn.Module, images: Tensor) -> tuple[int, int]:
    """(h, w) of the patches, or positions, of (B, C, H, W). Raises ValueError if they form no grid."""
    return model.grid_of(model.forward_features(images[:1]), tuple(images.shape[-2:]))


def _called(model: nn.Module) -> str:
    """The model and its pooling, for an error."""
    kind = model.kind_of_model() if hasattr(model, "kind_of_model") else type(model).__name__
    return f"{kind}, mode {getattr(model, 'mode', 'official')}"
