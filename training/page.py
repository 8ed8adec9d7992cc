"""The page about a run, report.html."""

from __future__ import annotations

import argparse
from pathlib import Path

from runtime.distributed import is_main_process
from runtime.terminal import say


def write_page(args: argparse.Namespace, folder: Path, state: str) -> Path | None:
    """Write report.html on rank 0; None, with a warning, if that fails, because a page must not end a run."""
    if not is_main_process():
        return None
    from evaluation import report

    changed = [key for key, source in args.sources.items() if source != "default"]
    try:
        return report.write_report(folder, state, changed)
    except Exception as error:
        say(f"warning: no report ({type(error).__name__}: {error})")
        return None
