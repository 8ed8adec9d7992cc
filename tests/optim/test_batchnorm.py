"""BatchNorm split by parts of a batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from optim.batchnorm import has_split_batchnorms, split_batchnorm
from tests.reference import tensor


def test_each_part_has_its_own_statistics():
    """In training the parts of a batch are normalised apart; in eval mode the first part's statistics hold for all."""
    model = split_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), 2)
    x = tensor(1, (6, 3, 5, 5))
    x[3:] += 7
    y = model(x)
    for part in y.split(3):
        torch.testing.assert_close(part.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-5)
    assert not torch.allclose(model[1].running_mean, model[1].aux_bn[0].running_mean)
    model.eval()
    own = nn.BatchNorm2d(4).eval()
    own.load_state_dict({k: v for k, v in model[1].state_dict().items() if "aux_bn" not in k})
    torch.testing.assert_close(model(x), own(model[0](x)))


def test_a_model_without_batchnorm_is_refused():
    """Nothing to split is an error, and such a model has no splits."""
    with pytest.raises(ValueError, match="no BatchNorm to split"):
        split_batchnorm(nn.Linear(2, 2), 3)
    assert not has_split_batchnorms(nn.BatchNorm2d(3))
    assert has_split_batchnorms(split_batchnorm(nn.Sequential(nn.BatchNorm2d(3)), 3))
