"""Results that are read one step late."""

from __future__ import annotations

import torch

from runtime.delayed_results import LateReader


def test_late_reader_off_cuda_is_not_late():
    """On a CPU results are read at once, in order."""
    reader = LateReader(torch.device("cpu"))
    reader.push(3, torch.tensor([1.0, 2.0]))
    assert reader.read() == [(3, [1.0, 2.0])]
    assert reader.read(everything=True) == []
