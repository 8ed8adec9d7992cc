"""HOW: weights by norm, 3 x 3 smoothing, projection, normalisation."""

import pytest
import torch
from torch.nn import functional as F

from poolings.how import How
from tests.poolings.operators import assert_equals_plain, assert_published
from tests.reference import fill_, tensor


def test_published_numbers():
    """The published code's output and gradients, though features are summed before they are projected."""
    assert_published("how", "how")


def plain(pool, x):
    """Every position smoothed over its real neighbours and projected, one after the other."""
    height, width = x.shape[2:]
    norms = (x.pow(2).sum(1) + 1e-10).sqrt()
    total = 0
    for row in range(height):
        for column in range(width):
            window = x[:, :, max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
            projected = F.linear(window.mean((2, 3)), pool.dimreduction.weight[:, :, 0, 0], pool.dimreduction.bias)
            total = total + norms[:, row, column, None] * projected
    return total / (total.norm(dim=1, keepdim=True) + 1e-6), norms.flatten(1).unsqueeze(1)


@pytest.mark.parametrize("grid", [(3, 5), (5, 2), (1, 1), (1, 4)])
def test_formula(grid):
    """On any grid outputs, weights and all gradients are those of the positions one after the other."""
    assert_equals_plain(fill_(How(6, width=5), 0.3), plain, tensor(1, (2, 6, *grid)))


def test_width():
    """The result has unit length and the width that was asked for, 512 by default."""
    x = tensor(1, (2, 6, 3, 3))
    for pool, width in ((How(6), 512), (How(6, width=7), 7)):
        assert pool.num_features == width
        torch.testing.assert_close(pool(x).norm(dim=1), torch.ones(2), rtol=1e-4, atol=0)


def test_an_empty_image_has_gradients():
    """A map of zeros has weights of 1e-5 and finite slopes."""
    x = torch.zeros(1, 6, 3, 3, requires_grad=True)
    pooled, weights = How(6, width=5)(x, return_attention=True)
    pooled.sum().backward()
    torch.testing.assert_close(weights, torch.full((1, 1, 9), 1e-5))
    assert x.grad.isfinite().all()
