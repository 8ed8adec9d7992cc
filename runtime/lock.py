"""One output folder, one run: a kernel lock that is free again the moment its holder is gone."""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import weakref
from pathlib import Path
from typing import BinaryIO

from runtime.guards import InputError

LOCK_NAME = ".lock"
_MOST_BYTES = 4096  # of the holder's description


class FolderLock:
    """Holds an exclusive lock on `folder/.lock` from creation to `release` or the end of the process.

    Raises InputError naming the holder's host, process and job if another run holds it, and if `.lock` is not a file
    of its own: a link would have the holder's name written over somebody's data.
    """

    def __init__(self, folder: Path) -> None:
        import fcntl

        self._file = _open_own_file(folder / LOCK_NAME)  # open for the life of the run
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


def _open_own_file(path: Path) -> BinaryIO:
    """The file, made if need be, open for reading and appending. Raises InputError if it is anything but a file."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | getattr(os, "O_NOFOLLOW", 0)
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise InputError(f"{path} is a link, a folder or a pipe and not a lock file; remove it") from error
        raise InputError(f"{path} cannot be opened ({error}); choose another --output_dir") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        os.close(descriptor)
        raise InputError(f"{path} is a link, a folder or a pipe and not a lock file; remove it")
    return os.fdopen(descriptor, "a+b")


def _forget(lock: FolderLock | None) -> None:
    if lock is not None:
        lock.release()


def _this_process() -> dict[str, object]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}


def _describe(file: BinaryIO) -> str:
    """The holder in words; whatever the file holds, this is only a help to the reader."""
    file.seek(0)
    try:
        holder = json.loads(file.read(_MOST_BYTES))
    except (ValueError, RecursionError):
        holder = None
    if not isinstance(holder, dict):
        return "it has not written its name yet"
    host, pid, job = (str(holder.get(key))[:200] for key in ("host", "pid", "job"))
    return f"host {host}, process {pid}" + (f", job {job}" if holder.get("job") else "")
