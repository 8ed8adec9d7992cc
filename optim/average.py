"""The teacher: an exponential moving average of the student's parameters, and of its buffers if asked."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from optim import devices
from optim.sharding import local
from pretrained import without_prefix


class ParameterAverage:
    """teacher <- m · teacher + (1 - m) · student, over parameters matched by name, all in one fused call.

    buffers: whether buffers follow as well: floating-point ones (BatchNorm's statistics) as an average, counters as a
    copy. DINO's teacher computes its own statistics; the average of a supervised model never trains, and needs them.

    If the models are sharded, each process averages its own slices, which are cut alike in both.
    Raises ValueError if a parameter (or buffer) of the teacher has no counterpart in the student.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, buffers: bool = False) -> None:
        pairs = _pairs(dict(student.named_parameters()), dict(teacher.named_parameters()), "parameter")
        copied = []
        if buffers:
            more = _pairs(dict(student.named_buffers()), dict(teacher.named_buffers()), "buffer")
            pairs += [pair for pair in more if pair[0].is_floating_point()]
            copied = [pair for pair in more if not pair[0].is_floating_point()]
        self._student: list[Tensor] = [local(one) for one, _ in pairs]
        self._teacher: list[Tensor] = [local(other) for _, other in pairs]
        self._copied = copied

    @torch.no_grad()
    def update(self, momentum: float, skip: Tensor | None = None) -> None:
        """One step of the average. If the 0-d bool tensor `skip` is true, the teacher stays bit for bit unchanged."""
        if skip is not None and devices.on_cpu(skip):  # reading it costs nothing here, unlike temporaries
            if skip.item():
                return
            skip = None
        for source, target in self._copied:
            target.copy_(source if skip is None else torch.where(skip, target, source))
        if skip is None:
            torch._foreach_lerp_(self._teacher, self._student, 1 - momentum)
            return
        # A weight of exactly 0 leaves t + 0 · (s - t) = t, without reading `skip` back from the device.
        weight = torch.where(skip, 0.0, 1 - momentum).to(torch.float32)
        step = torch._foreach_sub(self._student, self._teacher)
        torch._foreach_mul_(step, weight)
        torch._foreach_add_(self._teacher, step)


def _pairs(student: dict[str, Tensor], teacher: dict[str, Tensor], kind: str) -> list[tuple[Tensor, Tensor]]:
    """(the student's tensor, the teacher's) under every name that the teacher has."""
    source, target = without_prefix(student, "module."), without_prefix(teacher, "module.")
    missing = [name for name in target if name not in source]
    if missing:
        raise ValueError(f"the student has no {kind} for the teacher's {', '.join(missing[:5])}")
    return [(source[name], value) for name, value in target.items()]
