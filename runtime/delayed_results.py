"""Reading small results of a device without making it wait."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor


class LateReader:
    """A queue of small float tensors that are read on the host one step after they were made.

    On CUDA the copy to pinned memory runs behind the step and is read at the next one, when it has long arrived. On
    other devices reading costs nothing and is done at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._lag = 1 if device.type == "cuda" else 0
        self._queue: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def push(self, step: int, values: Tensor) -> None:
        """Queue the values of a step."""
        if self._lag == 0:
            self._queue.append((step, values.detach(), None))
            return
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values.detach(), non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._queue.append((step, host, event))

    def read(self, everything: bool = False) -> list[tuple[int, list[float]]]:
        """(step, values) of the steps that are due, oldest first; of all steps with `everything`."""
        due = []
        while len(self._queue) > (0 if everything else self._lag):
            step, host, event = self._queue.popleft()
            if event is not None:
                event.synchronize()
            due.append((step, host.tolist()))
        return due
