"""One output folder, one run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from runtime.guards import InputError
from runtime.lock import FolderLock


def test_the_lock_names_its_holder_and_dies_with_it(tmp_path):
    """A second run is refused with host and process; a killed holder's lock is free at once."""
    code = f"from runtime.lock import FolderLock; from pathlib import Path; l = FolderLock(Path({str(tmp_path)!r})); " \
           "print('held', flush=True); import time; time.sleep(60)"  # fmt: skip
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=rf"host .*, process {holder.pid}"):
        FolderLock(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    FolderLock(tmp_path).release()
    FolderLock(tmp_path).release()


def test_the_lock_is_not_held_by_forked_workers(tmp_path):
    """A loader worker that outlives its killed parent for a while does not keep the folder locked."""
    code = f"from runtime.lock import FolderLock; from pathlib import Path; l = FolderLock(Path({str(tmp_path)!r})); " \
           "import os, time; pid = os.fork(); pid or print(os.getpid(), flush=True); time.sleep(60)"  # fmt: skip
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    worker = int(holder.stdout.readline())  # it has begun
    with pytest.raises(InputError, match="another run is using"):
        FolderLock(tmp_path)
    holder.kill()
    holder.wait()
    holder.stdout.close()
    try:
        FolderLock(tmp_path).release()
    finally:
        os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("kind", ["link", "dangling", "hard link", "folder", "pipe"])
def test_the_lock_is_not_written_through_links(tmp_path, kind):
    """Somebody else's file behind the lock's name keeps its content; anything but a file is refused by name."""
    precious, lock = tmp_path / "precious", tmp_path / ".lock"
    precious.write_text("data")
    if kind == "folder":
        lock.mkdir()
    elif kind == "pipe":
        os.mkfifo(lock)
    elif kind == "hard link":
        os.link(precious, lock)
    else:
        lock.symlink_to(precious if kind == "link" else tmp_path / "nothing")
    with pytest.raises(InputError, match=r"\.lock is a link, a folder or a pipe"):
        FolderLock(tmp_path)
    assert precious.read_text() == "data"
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("content", [b"[1]", b"\xff", b"[" * 100_000, b'{"host": "\\u001b[2J"}', b"null"])
def test_an_odd_lock_file_is_described_all_the_same(tmp_path, content):
    """Whatever a held lock file holds, the refusal is one line."""
    held = FolderLock(tmp_path)
    (tmp_path / ".lock").write_bytes(content)
    try:
        with pytest.raises(InputError, match="another run is using"):
            FolderLock(tmp_path)
    finally:
        held.release()
