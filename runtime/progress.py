"""How far a loop is: two short lines that stay on a terminal, plain lines now and then in a log file.

Rate and remaining time come from the last `WINDOW` items, so that a stall is forgotten soon after it.
"""

from __future__ import annotations

import datetime
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch

from runtime import terminal

T = TypeVar("T")

WINDOW = 50
_REDRAW_S = 0.1
_BAR = 20  # characters of the bar


class Progress(Iterable[T]):
    """Iterate and show how far it is. Ranks other than 0 show nothing.

    On a terminal two lines stand below the others: the bar with count, rate and remaining time, and the text of
    `set_text`. In a log file a line comes after the first item, then at most once in `every_s` seconds, and at the
    end.

    Args:
        total: number of items, for the remaining time; by default the iterable's length.
        start: items that were done before, in a loop that is continued.
        run_left: gives the number of items that follow after this loop, for the remaining time of the whole run.
    """

    def __init__(
        self,
        iterable: Iterable[T],
        total: int | None = None,
        desc: str = "",
        *,
        start: int = 0,
        every_s: float = 30.0,
        unit: str = "it",
        run_left: Callable[[], int] | None = None,
    ) -> None:
        self._iterable = iterable
        self._total = total if total is not None else (len(iterable) if hasattr(iterable, "__len__") else None)
        self._desc, self._start, self._every_s, self._unit = desc, start, every_s, unit
        self._run_left = run_left
        self._text = ""
        self._done = start
        self._times: deque[float] = deque(maxlen=WINDOW + 1)

    def set_text(self, text: str) -> None:
        """Numbers to show with the count, from the next update on."""
        self._text = text

    def __iter__(self) -> Iterator[T]:
        if not terminal.is_main():
            return iter(self._iterable)
        return self._counted(self._show_status() if terminal.status_is_shown() else self._show_lines())

    def _counted(self, display: Any) -> Iterator[T]:
        self._done = self._start
        self._times.append(time.monotonic())
        next(display)
        try:
            for item in self._iterable:
                yield item
                self._done += 1
                self._times.append(time.monotonic())
                next(display)
        finally:
            display.close()

    # ---- the two displays, advanced after every item

    def _show_status(self) -> Iterator[None]:
        drawn = 0.0
        try:
            while True:
                if time.monotonic() - drawn >= _REDRAW_S or self._done == self._total:
                    drawn = time.monotonic()
                    terminal.show_status([self._bar_line(), *([f"  {self._text}"] if self._text else [])])
                yield
        finally:
            terminal.show_status([])
            if self._done > self._start:
                terminal.say_here(self.line())

    def _show_lines(self) -> Iterator[None]:
        shown = time.monotonic()
        while True:
            yield
            now = time.monotonic()
            first, last = self._done == self._start + 1, self._done == self._total
            if first or last or now - shown >= self._every_s:
                shown = now
                terminal.say_here(self.line())

    # ---- the words

    @property
    def seconds_per_item(self) -> float | None:
        """Mean of the last items; None before there is one."""
        if len(self._times) < 2:
            return None
        return (self._times[-1] - self._times[0]) / (len(self._times) - 1)

    def line(self) -> str:
        """Count, remaining time and text, as in `epoch 3 120/500  left 0:12:40, run 4:03:10  loss 8.1`."""
        parts = [f"{self._desc} {self._count()}".strip(), self._left(), self._text]
        return "  ".join(part for part in parts if part)

    def _bar_line(self) -> str:
        parts = [self._desc, self._count(), self._rate(), self._left(), _gpu_memory()]
        if self._total:
            full = round(_BAR * min(self._done, self._total) / self._total)
            parts.insert(1, "[" + "#" * full + "-" * (_BAR - full) + "]")
        line = "  ".join(part for part in parts if part)
        if self._total and len(line) >= terminal.columns():
            line = "  ".join(part for part in (parts[0], *parts[2:]) if part)
        return line

    def _count(self) -> str:
        return f"{self._done}/{self._total}" if self._total else f"{self._done}"

    def _rate(self) -> str:
        seconds = self.seconds_per_item
        if not seconds:
            return ""
        return f"{1 / seconds:.1f} {self._unit}/s" if seconds < 1 else f"{seconds:.1f} s/{self._unit}"

    def _left(self) -> str:
        seconds = self.seconds_per_item
        if seconds is None or not self._total or self._done >= self._total:
            return ""
        left = f"left {_clock(seconds * (self._total - self._done))}"
        if self._run_left is not None and (more := self._run_left()) > 0:
            left += f", run {_clock(seconds * (self._total - self._done + more))}"
        return left


def progress(iterable: Iterable[T], total: int | None = None, desc: str = "", **kwargs: Any) -> Progress[T]:
    """Shorthand for `Progress`, for loops that show only their count."""
    return Progress(iterable, total, desc, **kwargs)


def _clock(seconds: float) -> str:
    """`0:12:40`, with days from one day on."""
    return str(datetime.timedelta(seconds=int(min(seconds, 86400 * 9999))))


def _gpu_memory() -> str:
    """The most memory that tensors took on the GPU so far; nothing without one."""
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return ""
    return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
