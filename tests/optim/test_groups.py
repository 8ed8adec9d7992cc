"""Which parameters are regularised."""

from __future__ import annotations

import torch
from torch import nn

from optim.groups import get_params_groups


def test_groups():
    """Biases and 1-D parameters get no weight decay; everything else does; frozen ones are left out."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model[0].weight.requires_grad_(False)
    model.register_parameter("pos_embed", nn.Parameter(torch.zeros(1, 2, 3)))
    regularised, rest = get_params_groups(model)
    assert [p.shape for p in regularised["params"]] == [(1, 2, 3)]
    assert len(rest["params"]) == 3
    assert rest["weight_decay"] == 0.0
