"""The teacher: an exponential moving average of the student's parameters (never of its buffers)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from optim import devices
from optim.sharding import local
from pretrained import without_prefix


class ParameterAverage:
    """teacher <- m · teacher + (1 - m) · student, over parameters matched by name, all in one fused call.

    If the models are sharded, each process averages its own slices, which are cut alike in both.
    Raises ValueError if a parameter of the teacher has no counterpart in the student.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        source = without_prefix(dict(student.named_parameters()), "module.")
        pairs = without_prefix(dict(teacher.named_parameters()), "module.").items()
        missing = [name for name, _ in pairs if name not in source]
        if missing:
            raise ValueError(f"the student has no parameter for the teacher's {', '.join(missing[:5])}")
        self._teacher: list[Tensor] = [local(p) for _, p in pairs]
        self._student: list[Tensor] = [local(source[name]) for name, _ in pairs]

    @torch.no_grad()
    def update(self, momentum: float, skip: Tensor | None = None) -> None:
        """One step of the average. If the 0-d bool tensor `skip` is true, the teacher stays bit for bit unchanged."""
        if skip is not None and devices.on_cpu(skip):  # reading it costs nothing here, unlike temporaries
            if skip.item():
                return
            skip = None
        if skip is None:
            torch._foreach_lerp_(self._teacher, self._student, 1 - momentum)
            return
        # A weight of exactly 0 leaves t + 0 · (s - t) = t, without reading `skip` back from the device.
        weight = torch.where(skip, 0.0, 1 - momentum).to(torch.float32)
        step = torch._foreach_sub(self._student, self._teacher)
        torch._foreach_mul_(step, weight)
        torch._foreach_add_(self._teacher, step)
