"""How far a loop is: a bar on a terminal, plain lines now and then in a log file."""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from runtime.distributed import is_main_process

T = TypeVar("T")


class Progress(Iterable[T]):
    """Iterate and show how far it is: a tqdm bar on a terminal, a plain line now and then in a log file.

    Plain lines come after the first item, then at most once in `every_s` seconds, and at the end. Ranks other than 0
    show nothing. `set_text` sets the numbers shown behind the count.
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
    ) -> None:
        self._iterable = iterable
        self._total = total if total is not None else (len(iterable) if hasattr(iterable, "__len__") else None)
        self._desc, self._start, self._every_s, self._unit = desc, start, every_s, unit
        self._text = ""
        self._bar: Any = None

    def set_text(self, text: str) -> None:
        """Numbers to show behind the count, from the next update on."""
        self._text = text
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    def __iter__(self) -> Iterator[T]:
        if not is_main_process():
            return iter(self._iterable)
        return self._with_bar() if sys.stderr.isatty() else self._with_lines()

    def _with_bar(self) -> Iterator[T]:
        from tqdm import tqdm

        with tqdm(
            self._iterable, self._desc, self._total, initial=self._start, unit=self._unit, dynamic_ncols=True
        ) as bar:
            self._bar = bar
            yield from bar
        self._bar = None

    def _with_lines(self) -> Iterator[T]:
        begin = shown = time.monotonic()
        done = self._start
        for item in self._iterable:
            yield item
            done += 1
            now = time.monotonic()
            first, last = done == self._start + 1, done == self._total
            if first or last or now - shown >= self._every_s:
                shown = now
                print(self._line(done, now - begin), flush=True)

    def _line(self, done: int, elapsed_s: float) -> str:
        line = f"{self._desc} {done}" + (f"/{self._total}" if self._total else "")
        if self._total and done < self._total and done > self._start:
            left = elapsed_s / (done - self._start) * (self._total - done)
            line += f"  eta {datetime.timedelta(seconds=int(left))}"
        return line + (f"  {self._text}" if self._text else "")


def progress(iterable: Iterable[T], total: int | None = None, desc: str = "", **kwargs: Any) -> Progress[T]:
    """Shorthand for `Progress`, for loops that show only their count."""
    return Progress(iterable, total, desc, **kwargs)
