"""Norms of many tensors at once."""

from __future__ import annotations

import pytest
import torch

from optim.clipping import clip_each_


def test_norms_of_large_gradients_are_exact():
    """The norm of a gradient as long as the prototypes' is float32's, on any processor.

    Blocks of 2^18 squares are added up in float32. However a library does it, the sum of n positive numbers is off by
    less than n times 6e-8, and by sqrt(n) times that, 3e-5, unless all roundings go the same way.
    """
    gradient = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0))
    exact = gradient.double().norm().item()
    assert clip_each_([gradient], 0.0).item() == pytest.approx(exact, rel=3e-5)


def test_norms_follow_no_memory_layout():
    """A channels_last gradient has the norm of the same numbers."""
    gradient = torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last)
    norm = clip_each_([gradient], 0.5)
    torch.testing.assert_close(gradient.norm(), torch.tensor(0.5), rtol=1e-4, atol=1e-5)
    assert norm.item() > 0.5
