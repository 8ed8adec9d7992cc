"""How long a test waits on a busy machine: as long as it takes or, if speed is its point, in proportion to the load."""

from __future__ import annotations

import os

PATIENCE_S = 900  # for whatever happens sooner or later; only what hangs for good takes longer


def on_this_machine(seconds: float) -> float:
    """Seconds that something may take here and now if it takes `seconds` on an idle machine."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
