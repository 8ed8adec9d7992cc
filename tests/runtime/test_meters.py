"""DINO's meters."""

from __future__ import annotations

import pytest
import torch

from runtime.meters import MetricLogger


def test_meters():
    """Tensors are read late; window and global means, and a round trip through the state."""
    meters = MetricLogger()
    for value in (1.0, torch.tensor(2.0), torch.tensor(6.0)):
        meters.update(loss=value)
    assert meters.loss.global_avg == 3
    assert meters.loss.value == 6
    assert meters.loss.median == 2
    other = MetricLogger()
    other.load_state_dict(meters.state_dict())
    assert other.state_dict() == meters.state_dict()
    with pytest.raises(AttributeError, match="nothing"):
        _ = meters.nothing
