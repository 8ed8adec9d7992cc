"""What was found on disk, kept for the next start: lists of a million files, indexes of shards.

An entry is one .npz file of arrays, with the stamps (modification times and sizes) of what it was made from. It holds
as long as no stamp differs. An entry that is damaged, outdated or not in the form that its reader expects counts as
none and is made again: the folder may be writable by others, or come with a data set.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from runtime.terminal import say

_FORMAT = 2  # raise it when the arrays' meaning changes
_SETTLED_NS = 2_000_000_000  # a folder that changed less than 2 s ago may change again within one tick of its clock


def cache_folder() -> Path:
    """$SIMPOOL_CACHE, or simpool-dino in the user's cache folder ($XDG_CACHE_HOME, ~/.cache)."""
    if os.environ.get("SIMPOOL_CACHE"):
        return Path(os.environ["SIMPOOL_CACHE"])
    # expanduser, unlike Path.home(), does not raise if there is no home: the entry is then simply not kept
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "simpool-dino"


def entry_name(*parts: str) -> str:
    """A file name for what these strings describe."""
    described = "\0".join((str(_FORMAT), *parts)).encode("utf-8", "surrogateescape")
    return hashlib.sha256(described).hexdigest()[:24] + ".npz"


def stamp_of(path: str | os.PathLike) -> tuple[int, int]:
    """(modification time in ns, size) of a file or folder. Raises `OSError`."""
    state = os.stat(path)
    return state.st_mtime_ns, state.st_size


def stamps_of(paths: Sequence[str | os.PathLike]) -> np.ndarray | None:
    """The stamps of files and folders, (len, 2) int64; None if one is gone."""
    try:
        return np.array([stamp_of(path) for path in paths], dtype=np.int64).reshape(-1, 2)
    except (OSError, ValueError):  # ValueError: a NUL in a name, from a damaged entry
        return None


def recall(file: Path) -> dict[str, np.ndarray] | None:
    """The arrays of an entry, or None if there is none that can be read."""
    try:
        with open(file, "rb") as handle:
            with zipfile.ZipFile(handle) as archive:
                if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                    return None  # not ours, and perhaps a bomb
            handle.seek(0)
            with np.load(handle, allow_pickle=False) as arrays:
                return dict(arrays)
    except Exception:  # damage raises what it likes: OSError, BadZipFile, ValueError, SyntaxError, struct.error ...
        return None


def remember(
    folders: Sequence[Path], name: str, arrays: dict[str, np.ndarray], stamps: np.ndarray, taken_ns: int
) -> None:
    """Write an entry into the first of `folders` that can be written; says so if none can.

    taken_ns: when the first stamp was taken, before anything was read. Nothing is written if a source was then as young
    as the resolution of its time stamp: a later change might not show.
    """
    if len(stamps) and taken_ns - int(stamps[:, 0].max()) < _SETTLED_NS:
        return
    problem: OSError | None = None
    for folder in folders:
        try:
            _write(folder, name, arrays)
            return
        except OSError as error:
            problem = error
    say(f"warning: the list of images can't be kept for the next start ({problem}); set SIMPOOL_CACHE to a folder")


def _write(folder: Path, name: str, arrays: dict[str, np.ndarray]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=folder)
    try:
        with open(handle, "wb") as file:
            np.savez(file, **arrays)
        os.chmod(temporary, 0o644)  # mkstemp's is for one user alone
        os.replace(temporary, folder / name)
    except BaseException:
        os.unlink(temporary)
        raise
