"""SimPool behind the operators' interface."""

import pytest
import torch

import sp
from poolings.choose import build_pooling
from tests.poolings.operators import assert_published
from tests.reference import fill_, tensor


def test_published_numbers():
    """The published code's output and gradients, with its minimum over the batch."""
    assert_published("simpool", "simpool", gamma=2.0, value_min="batch")


@pytest.mark.parametrize("settings", [{}, {"gamma": 1.25, "use_beta": True}, {"gamma": 2.0, "value_min": "batch"}])
def test_is_sp_simpool(settings):
    """Bitwise sp.SimPool's features, weights and state, for tokens with and without a grid and for maps."""
    ours, theirs = fill_(build_pooling("simpool", 16, **settings)), fill_(sp.SimPool(16, **settings))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for x, grid in ((tensor(1, (2, 10, 16)), None), (tensor(1, (2, 10, 16)), (2, 5)), (tensor(1, (2, 16, 2, 5)), None)):
        expected = theirs(x, return_attention=True)
        for one, other in zip(ours(x, return_attention=True, grid=grid), expected, strict=True):
            assert torch.equal(one, other)
        assert torch.equal(ours(x, grid=grid), expected[0])
