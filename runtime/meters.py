"""Running means of the numbers that a loop measures (DINO's meters).

Meters accept 0-d tensors and read them only when a number is needed, so that a training step on a GPU never has to
synchronize with the host.
"""

from __future__ import annotations

import datetime
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from runtime.distributed import is_dist_avail_and_initialized
from runtime.terminal import say

T = TypeVar("T")


class SmoothedValue:
    """A series of numbers: a window of the latest, and the mean of all (DINO's interface)."""

    def __init__(self, window_size: int = 20, fmt: str | None = None) -> None:
        self.fmt = fmt or "{median:.6f} ({global_avg:.6f})"
        self._window: deque[float] = deque(maxlen=window_size)
        self._total = 0.0
        self._count = 0
        self._pending: list[tuple[Any, int]] = []

    def update(self, value: float | torch.Tensor, n: int = 1) -> None:
        """Add a number that counts as `n` samples. A tensor is read only when a number is needed."""
        self._pending.append((value.detach() if isinstance(value, torch.Tensor) else value, n))
        if len(self._pending) >= 1024:
            self._read()

    def _read(self) -> None:
        pending, self._pending = self._pending, []
        for value, n in pending:
            number = float(value)
            self._window.append(number)
            self._total += number * n
            self._count += n

    @property
    def count(self) -> int:
        """Number of samples added."""
        self._read()
        return self._count

    @property
    def total(self) -> float:
        """Sum over the samples."""
        self._read()
        return self._total

    @property
    def median(self) -> float:
        """Median of the window."""
        self._read()
        return torch.tensor(list(self._window)).median().item() if self._window else float("nan")

    @property
    def avg(self) -> float:
        """Mean of the window."""
        self._read()
        return sum(self._window) / len(self._window) if self._window else float("nan")

    @property
    def global_avg(self) -> float:
        """Mean of all samples."""
        self._read()
        return self._total / self._count if self._count else float("nan")

    @property
    def max(self) -> float:
        """Maximum of the window."""
        self._read()
        return max(self._window, default=float("nan"))

    @property
    def value(self) -> float:
        """The last number."""
        self._read()
        return self._window[-1] if self._window else float("nan")

    def synchronize_between_processes(self) -> None:
        """Sum count and total over the processes; the window stays this process's own."""
        if not is_dist_avail_and_initialized():
            return
        self._read()
        device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
        sums = torch.tensor([self._count, self._total], dtype=torch.float64, device=device)
        dist.all_reduce(sums)
        count, self._total = sums.tolist()
        self._count = int(count)

    def state_dict(self) -> dict[str, Any]:
        """What an exact resume within an epoch needs."""
        self._read()
        return {"window": list(self._window), "total": self._total, "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._pending = []
        self._window = deque(state["window"], maxlen=self._window.maxlen)
        self._total, self._count = state["total"], state["count"]

    def __str__(self) -> str:
        return self.fmt.format(
            median=self.median, avg=self.avg, global_avg=self.global_avg, max=self.max, value=self.value
        )


class MetricLogger:
    """Named `SmoothedValue`s, and a loop that prints them (DINO's interface)."""

    def __init__(self, delimiter: str = "\t") -> None:
        self.meters: dict[str, SmoothedValue] = defaultdict(SmoothedValue)
        self.delimiter = delimiter

    def update(self, **values: float | torch.Tensor) -> None:
        """Add one number to each named meter."""
        for name, value in values.items():
            self.meters[name].update(value)

    def add_meter(self, name: str, meter: SmoothedValue) -> None:
        """Use `meter` under `name`."""
        self.meters[name] = meter

    def __getattr__(self, name: str) -> Any:
        meters = self.__dict__.get("meters", {})
        if name in meters:
            return meters[name]
        raise AttributeError(f"{type(self).__name__} has no attribute and no meter named {name!r}")

    def __str__(self) -> str:
        return self.delimiter.join(f"{name}: {meter}" for name, meter in self.meters.items())

    def synchronize_between_processes(self) -> None:
        """Make `global_avg` the mean over all processes, for every meter."""
        for meter in self.meters.values():
            meter.synchronize_between_processes()

    def averages(self) -> dict[str, float]:
        """`global_avg` of every meter."""
        return {name: meter.global_avg for name, meter in self.meters.items()}

    def state_dict(self) -> dict[str, Any]:
        """What an exact resume within an epoch needs."""
        return {name: meter.state_dict() for name, meter in self.meters.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        for name, meter_state in state.items():
            self.meters[name].load_state_dict(meter_state)

    def log_every(self, iterable: Iterable[T], print_freq: int, header: str = "") -> Iterator[T]:
        """Iterate, printing the meters, the time per item and the time waiting for data every `print_freq` items."""
        total = len(iterable) if hasattr(iterable, "__len__") else None
        iteration_s, data_s = SmoothedValue(fmt="{avg:.4f}"), SmoothedValue(fmt="{avg:.4f}")
        begin = end = time.monotonic()
        for i, item in enumerate(iterable):
            data_s.update(time.monotonic() - end)
            yield item
            iteration_s.update(time.monotonic() - end)
            if i % print_freq == 0 or i + 1 == total:
                left = "?" if total is None else datetime.timedelta(seconds=int(iteration_s.avg * (total - i - 1)))
                parts = [
                    f"{header} [{i}/{total}]",
                    f"eta: {left}",
                    str(self),
                    f"time: {iteration_s}",
                    f"data: {data_s}",
                ]
                say(self.delimiter.join(part for part in parts if part))
            end = time.monotonic()
        say(f"{header} Total time: {datetime.timedelta(seconds=int(time.monotonic() - begin))}")
