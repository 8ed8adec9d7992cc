"""What was found on disk, remembered: lists of a million files, indexes of shards.

An entry is one .npz file of arrays with the stamps (modification times) of what it was made from. It holds as long as
no stamp differs; a damaged or outdated entry counts as none and is made again.
"""

from __future__ import annotations

import hashlib
import os
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from runtime.terminal import say

_FORMAT = 1  # raise it when the arrays' meaning changes
_SETTLED_NS = 2_000_000_000  # a folder that changed less than 2 s ago may change again within one tick of its clock


def cache_folder() -> Path:
    """$SIMPOOL_CACHE, or simpool-dino in the user's cache folder ($XDG_CACHE_HOME, ~/.cache)."""
    if os.environ.get("SIMPOOL_CACHE"):
        return Path(os.environ["SIMPOOL_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "simpool-dino"


def entry_name(*parts: str) -> str:
    """A file name for what these strings describe."""
    return (
        hashlib.sha256("\0".join((str(_FORMAT), *parts)).encode("utf-8", "surrogateescape")).hexdigest()[:24] + ".npz"
    )


def stamps_of(paths: Sequence[str | os.PathLike]) -> np.ndarray | None:
    """Modification times and sizes (len, 2) int64 of files and folders; None where one is gone."""
    stamps = np.empty((len(paths), 2), dtype=np.int64)
    try:
        for row, path in zip(stamps, paths, strict=True):
            state = os.stat(path)
            row[:] = state.st_mtime_ns, state.st_size
    except OSError:
        return None
    return stamps


def recall(file: Path) -> dict[str, np.ndarray] | None:
    """The arrays of an entry, or None where there is none that can be read."""
    try:
        with open(file, "rb") as handle, np.load(handle, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def remember(folders: Sequence[Path], name: str, arrays: dict[str, np.ndarray], stamps: np.ndarray) -> None:
    """Write an entry into the first of `folders` that can be written; says so where none can.

    Nothing is written while the sources are as young as the resolution of their time stamps.
    """
    if len(stamps) and time.time_ns() - int(stamps[:, 0].max()) < _SETTLED_NS:
        return
    problem: OSError | None = None
    for folder in folders:
        temporary = folder / f".{name}.{os.getpid()}.tmp"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                np.savez(file, **arrays)
            os.replace(temporary, folder / name)
            return
        except OSError as error:
            problem = error
            temporary.unlink(missing_ok=True) if temporary.parent.is_dir() else None
    say(f"warning: the list of images can't be kept for the next start ({problem}); set SIMPOOL_CACHE to a folder")
