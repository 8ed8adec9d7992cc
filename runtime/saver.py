"""A run's checkpoints: written in the background, rotated, and found again after any failure.

A save writes one file, `checkpoint_stepNNNNNNNN.pth`, and then makes the names that users know refer to it (hard links,
or copies if the file system has none): `checkpoint.pth` for the newest, `checkpointNNNN.pth` for the epochs kept for
good, `best.pth` for the best one. Older step files are removed only when all this is durable, and only then is the save
reported.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from runtime.checkpoint import TEMP_PREFIX, fsync_folder, read_checkpoint, save_checkpoint, sweep_temporaries
from runtime.guards import InputError, SaveError

NEWEST = "checkpoint.pth"
BEST = "best.pth"
_STEP_FILE = re.compile(r"checkpoint_step(\d{8,})\.pth")
_EPOCH_FILE = re.compile(r"checkpoint(\d{4,})\.pth")


class CheckpointSaver:
    """Saves a run's state, stalling it only for the copy to host memory.

    `say` reports each success and failure. A failed save (disk full, folder gone) leaves the last good checkpoint in
    place; after `max_failed` failures in a row `save`, `wait` or `finish` raises SaveError.
    """

    def __init__(self, folder: Path, keep: int, max_failed: int, say: Callable[[str], None]) -> None:
        self._folder, self._keep, self._max_failed, self._say = folder, max(1, keep), max_failed, say
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._failed = 0

    def save(self, state: dict[str, Any], step: int, keep_as: str | None = None, best: bool = False) -> None:
        """Start saving `state`; `keep_as` names an additional file that is never removed, such as `checkpoint0020.pth`.

        best: whether `best.pth` becomes this state.

        Returns once the previous save is done and the tensors are copied.
        """
        self.wait()
        snapshot = to_host(state)
        names = [name for name in (NEWEST, keep_as, BEST if best else None) if name is not None]
        self._thread = threading.Thread(target=self._write, args=(snapshot, step, names), name="checkpoint-writer")
        self._thread.start()

    def wait(self) -> bool:
        """Wait for a save in progress; returns whether it succeeded. Raises SaveError after too many failures."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._judge()
        return self._failed == 0

    def finish(self, save_again: Callable[[], None], pause_s: float = 1.0) -> None:
        """Wait for the last save; if it failed, call `save_again` until one succeeds, with growing pauses.

        A run must not be reported as done before that. Raises SaveError after too many failures, like any save.
        """
        while not self.wait():
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 60)
            save_again()

    def close(self) -> None:
        """Wait for a save in progress, ignoring its failure, which has been reported: the run ends in any case."""
        with contextlib.suppress(SaveError):
            self.wait()

    def _judge(self) -> None:
        error, self._error = self._error, None
        if error is None:
            self._failed = 0
            return
        self._failed += 1
        self._say(
            f"warning: checkpoint not saved ({error}{_room(self._folder)}); the last good one stays, the next save "
            f"tries again ({self._failed} failed in a row)"
        )
        if self._failed >= self._max_failed:
            raise SaveError(
                f"{self._failed} saves to {self._folder} failed in a row, the last with: {error}{_room(self._folder)}; "
                "free the disk or fix the folder and start the same command again (--max_failed_saves sets how many "
                "failures in a row stop a run)"
            )

    def _write(self, state: dict[str, Any], step: int, names: list[str]) -> None:
        try:
            path = self._folder / f"checkpoint_step{step:08d}.pth"
            save_checkpoint(state, path)
            for name in names:
                _point(self._folder / name, path)
            fsync_folder(self._folder)
            self._say(f"saved {self._folder / NEWEST} at step {step}")
            self._remove_old(path)
        except Exception as error:  # whatever went wrong, the run must learn of it and continue
            self._error = error

    def _remove_old(self, newest: Path) -> None:
        others = [path for path in step_files(self._folder) if path != newest]
        for path in others[self._keep - 1 :]:
            path.unlink(missing_ok=True)


def _room(folder: Path) -> str:
    """The free space of the disk, because torch's error for a full disk does not say that it is full."""
    try:
        return f"; {shutil.disk_usage(folder).free / 2**20:.0f} MiB free"
    except OSError:
        return ""


def to_host(value: Any) -> Any:
    """A deep copy of a state with every tensor in host memory, sharing nothing with the running training."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: to_host(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_host(item) for item in value)
    return value


def _point(name: Path, target: Path) -> None:
    """Atomically make `name` a hard link to `target`, or a copy if the file system has no links."""
    temporary = Path(tempfile.mktemp(prefix=f"{TEMP_PREFIX}{name.name}.", dir=name.parent))
    try:
        try:
            os.link(target, temporary)
        except OSError:  # no hard links here (some network and FUSE file systems)
            shutil.copyfile(target, temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, name)
    finally:
        # If both names are already the same file, POSIX makes replace a no-op that leaves the temporary behind.
        temporary.unlink(missing_ok=True)


def step_files(folder: Path) -> list[Path]:
    """The step files of a run, newest first."""
    found = [(int(match.group(1)), path) for path in folder.iterdir() if (match := _STEP_FILE.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def candidates(folder: Path) -> list[Path]:
    """The files that may hold a run's state, the best first."""
    newest = [path for path in [folder / NEWEST] if path.exists()]
    epochs = [(int(match.group(1)), path) for path in folder.iterdir() if (match := _EPOCH_FILE.fullmatch(path.name))]
    return newest + step_files(folder) + [path for _, path in sorted(epochs, reverse=True)]


def find_checkpoint(folder: Path, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """Clean up after killed writers, then read the newest good checkpoint; None if there has never been one.

    A damaged file is reported and skipped. Raises InputError if there are checkpoints but none is good.
    """
    for name in sweep_temporaries(folder):
        say(f"removed {name}, left unfinished by an earlier run")
    damaged: set[tuple[int, int]] = set()
    paths = candidates(folder)
    for path in paths:
        status = path.stat()
        if (status.st_dev, status.st_ino) in damaged:
            continue  # another name of a file already found damaged
        try:
            return path, read_checkpoint(path)
        except InputError as error:
            damaged.add((status.st_dev, status.st_ino))
            say(f"warning: {error}; trying the one before it")
    if paths:
        raise InputError(
            f"none of the {len(paths)} checkpoints in {folder} can be read; restore one, or move them away"
        )
    return None
