"""The lines that a run writes to its terminal."""

from __future__ import annotations

import sys

from runtime.distributed import is_main_process


def say(message: str = "") -> None:
    """Print on rank 0, at once, without breaking a progress bar on the same terminal."""
    if not is_main_process():
        return
    if sys.stdout.isatty() and "tqdm" in sys.modules:
        sys.modules["tqdm"].tqdm.write(message)
    else:
        print(message, flush=True)
