"""Which parameters get weight decay."""

from __future__ import annotations

from typing import Any

from torch import nn


def get_params_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups: parameters with weight decay, and those without (names ending in `.bias`, and 1-D parameters)."""
    regularised, not_regularised = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        no_decay = name.endswith(".bias") or parameter.ndim == 1
        (not_regularised if no_decay else regularised).append(parameter)
    return [{"params": regularised}, {"params": not_regularised, "weight_decay": 0.0}]
