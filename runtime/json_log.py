"""log.txt: one JSON object a line, whole at any time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from runtime.checkpoint import append_bytes, finite_json, write_text_atomic
from runtime.terminal import say


class JsonLog:
    """A file with one JSON object per line, each durable when `append` returns.

    A row that cannot be written now (disk full) waits in memory for the next call; its torn part is taken back, so that
    every line of the file can be parsed at any time.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting: list[dict[str, Any]] = []

    def append(self, row: dict[str, Any]) -> None:
        """Write the row, or say why not and keep it for the next call."""
        self._waiting.append(row)
        try:
            while self._waiting:
                append_bytes(self._path, (json.dumps(finite_json(self._waiting[0])) + "\n").encode())
                self._waiting.pop(0)
        except OSError as error:
            say(f"warning: {self._path} not written ({error}); {len(self._waiting)} row(s) wait for the next epoch")


def cut_json_lines(path: Path, first_epoch: int) -> int:
    """Drop the rows of epochs from `first_epoch` on, which a resumed run writes again, and lines that are no rows.

    Returns the number of lines dropped. An epoch that is there twice keeps its first row.
    """
    if not path.exists():
        return 0
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.splitlines()
    kept: list[str] = []
    seen: set[int] = set()
    for line in lines:
        try:
            epoch = json.loads(line)["epoch"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if type(epoch) is int and epoch < first_epoch and epoch not in seen:
            seen.add(epoch)
            kept.append(line)
    if len(kept) != len(lines) or not text.endswith("\n"):
        write_text_atomic(path, "".join(line + "\n" for line in kept))
    return len(lines) - len(kept)
