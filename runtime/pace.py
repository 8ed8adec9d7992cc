"""How fast the steps go."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Pace:
    """How fast an epoch's steps go, counting those since the start of the program."""

    def __init__(self, global_batch: int) -> None:
        self._global_batch, self._began = global_batch, time.monotonic()
        self._waited_s, self.steps = 0.0, 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A context for waiting for data."""
        begin = time.monotonic()
        yield
        self._waited_s += time.monotonic() - begin

    @property
    def time_s(self) -> float:
        """Seconds since the epoch began, or was continued."""
        return max(time.monotonic() - self._began, 1e-9)

    @property
    def images_per_s(self) -> float:
        """Images per second over all processes."""
        return self.steps * self._global_batch / self.time_s

    @property
    def data_wait(self) -> float:
        """The fraction of the time that the steps waited for data."""
        return self._waited_s / self.time_s
