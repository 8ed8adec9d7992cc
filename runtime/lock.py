"""One output folder, one run: a kernel lock that is free again the moment its holder is gone."""

from __future__ import annotations

import json
import os
import socket
import weakref
from pathlib import Path
from typing import BinaryIO

from runtime.guards import InputError

LOCK_NAME = ".lock"


class FolderLock:
    """Holds an exclusive lock on `folder/.lock` from creation to `release` or the end of the process.

    Raises InputError naming the holder's host, process and job where another run holds it.
    """

    def __init__(self, folder: Path) -> None:
        import fcntl

        self._file: BinaryIO = open(folder / LOCK_NAME, "a+b")  # noqa: SIM115  held for the life of the run
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _describe(self._file)
            self._file.close()
            raise InputError(
                f"another run is using {folder}: {holder}; wait for it, stop it, or choose another --output_dir"
            ) from None
        self._file.truncate(0)
        self._file.write(json.dumps(_this_process()).encode())
        self._file.flush()
        # The lock belongs to the open file, which a forked loader worker shares and may outlive its parent with.
        reference = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _forget(reference()))

    def release(self) -> None:
        """Free the lock."""
        self._file.close()


def _forget(lock: FolderLock | None) -> None:
    if lock is not None:
        lock.release()


def _this_process() -> dict[str, object]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}


def _describe(file: BinaryIO) -> str:
    file.seek(0)
    try:
        holder = json.loads(file.read())
    except ValueError:
        return "it has not written its name yet"
    job = f", job {holder['job']}" if holder.get("job") else ""
    return f"host {holder.get('host')}, process {holder.get('pid')}{job}"
