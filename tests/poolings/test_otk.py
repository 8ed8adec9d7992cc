"""OTK: half a Sinkhorn step towards one reference."""

import torch

from poolings.otk import Otk
from tests.poolings.operators import assert_equals_plain, assert_published, rows
from tests.reference import tensor


def test_published_numbers():
    """The published formula's output and gradients."""
    assert_published("otk", "otk")


def test_formula():
    """Exponential, then division by the sum over positions."""

    def plain(pool, x):
        kernel = torch.exp(rows(x) @ pool.otk["weight"][0].T / 2.0)  # (B, N, 1)
        plan = kernel / kernel.sum(1, keepdim=True)
        return (plan * rows(x)).sum(1), plan.transpose(1, 2)

    assert_equals_plain(Otk(6, eps=2.0), plain, tensor(1, (2, 6, 3, 5)))


def test_large_logits():
    """Even if exp(X w / eps) overflows, the weights are a distribution, and the largest similarity wins."""
    pool, x = Otk(6, eps=1e-3), 100 * tensor(1, (2, 9, 6))
    pooled, attention = pool(x, return_attention=True)
    winner = (x @ pool.otk["weight"][0, 0]).argmax(1)
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 1))
    torch.testing.assert_close(pooled, x[torch.arange(2), winner])


def test_start():
    """The reference starts uniform in (-1, 1), and a large eps gives the mean."""
    weight = Otk(4096).otk["weight"]
    assert weight.shape == (1, 1, 4096)
    assert 0.99 < weight.abs().max() <= 1
    assert weight.mean().abs() < 0.05
    x = tensor(1, (2, 9, 6))
    torch.testing.assert_close(Otk(6, eps=1e9)(x), x.mean(1), rtol=1e-5, atol=1e-6)
