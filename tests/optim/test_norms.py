"""Norms of many tensors at once."""

from __future__ import annotations

import pytest
import torch

from optim.clipping import clip_each_


def test_norms_of_large_gradients_are_exact():
    """The norm of a gradient as long as the prototypes' is float32's, on any processor.

    The squares of a block of 2^22 are added up in float32, by libraries that are 1e-5 to 6e-5 off, and a norm is off by
    half of that. One sum over all 2^24 was 1.2e-4 off on one processor, and torch's own norm is 6e-4 off.
    """
    gradient = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0))
    exact = gradient.double().norm().item()
    assert clip_each_([gradient], 0.0).item() == pytest.approx(exact, rel=5e-5)


def test_norms_follow_no_memory_layout():
    """A channels_last gradient has the norm of the same numbers."""
    gradient = torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last)
    norm = clip_each_([gradient], 0.5)
    torch.testing.assert_close(gradient.norm(), torch.tensor(0.5), rtol=1e-4, atol=1e-5)
    assert norm.item() > 0.5
