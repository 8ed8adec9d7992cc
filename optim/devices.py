"""Where a tensor lives, asked in one place, so that a test can take the accelerator's branches on a CPU."""

from __future__ import annotations

from torch import Tensor


def on_cpu(tensor: Tensor) -> bool:
    """Whether the host reads the tensor without waiting for an accelerator."""
    return tensor.device.type == "cpu"
