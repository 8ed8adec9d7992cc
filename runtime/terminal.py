"""The one place that writes to the terminal. It never raises: a line is not worth a run.

A full disk under the output, a reader that is gone (`main_dino.py ... | head`), a closed stdout or stderr cost the
lines, and nothing else; how many were lost is said when writing works again. Characters that the terminal's encoding
lacks, and control characters (a file name can hold them), are written as escapes.

Lines go to stdout. The status below them, the progress bar, goes to stderr if that is a terminal; lines are written
above it.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import sys
import threading
from typing import TextIO

import torch.distributed as dist

_lock = threading.RLock()  # the writer of checkpoints reports from a thread
_status: list[str] = []
_lost: dict[str, int] = {}  # lines that could not be written, by stream
_torn: set[str] = set()  # streams whose last line broke off


def say(message: str = "") -> None:
    """Write a line on rank 0, at once, above a progress bar."""
    if is_main():
        say_here(message)


def say_here(message: str = "") -> None:
    """Write a line of this process, whatever its rank."""
    with _lock:
        shown = _status if status_is_shown() else []
        if shown:
            _write(sys.stderr, "stderr", "\r\x1b[J")
        _write_line(sys.stdout, "stdout", message)
        if shown:
            _draw()


def complain(message: str) -> None:
    """Write a line to stderr, whatever the rank."""
    with _lock:
        if status_is_shown() and _status:
            _write(sys.stderr, "stderr", "\r\x1b[J")
        _write_line(sys.stderr, "stderr", message)


def answer(message: str) -> None:
    """Write a line to stderr from a signal's thread: at once, with no lock that the interrupted code may hold."""
    with contextlib.suppress(Exception):
        begin = "\r\x1b[J" if status_is_shown() else ""
        os.write(sys.stderr.fileno(), f"{begin}{_clean(message)}\n".encode(errors="backslashreplace"))


def is_main() -> bool:
    """Whether this process is the one that reports: rank 0, or the only one."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


# ---- the status


def status_is_shown() -> bool:
    """Whether stderr is a terminal, on which a status can stand."""
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # closed: None, or a closed file
        return False


def show_status(lines: list[str]) -> None:
    """Let these lines stand below what is written, cut to the terminal's width; none takes the status away."""
    global _status
    with _lock:
        if _status and status_is_shown():
            _write(sys.stderr, "stderr", "\r\x1b[J")
        _status = [_clean(line) for line in lines]
        if _status and status_is_shown():
            _draw()


def columns() -> int:
    """Width of the terminal, in characters."""
    return max(20, shutil.get_terminal_size().columns)


def _draw() -> None:
    width = columns() - 1
    up = f"\x1b[{len(_status) - 1}A" if len(_status) > 1 else ""
    _write(sys.stderr, "stderr", "\r" + "\n".join(line[:width] for line in _status) + up + "\r")


# ---- writing


def escaped(text: str) -> str:
    """The text with everything that could steer a terminal as an escape, newlines too."""
    return text if text.isprintable() else "".join(c if c.isprintable() else _escape(c) for c in text)


def _clean(text: str) -> str:
    """`escaped`, but for newlines and tabs, which a message may hold."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else _escape(c) for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _write_line(stream: TextIO | None, name: str, message: str) -> None:
    lost = _lost.get(name, 0)
    if lost and _write(stream, name, f"({lost} line(s) before this one could not be written)\n"):
        _lost[name] = 0
    if not _write(stream, name, _clean(str(message)) + "\n"):
        _lost[name] = _lost.get(name, 0) + 1


def _write(stream: TextIO | None, name: str, text: str) -> bool:
    """Write straight to the stream's descriptor: what a failing disk refuses must not wait in a buffer."""
    try:
        data = text.encode(stream.encoding or "utf-8", "backslashreplace")
        try:
            descriptor = stream.fileno()
        except (OSError, ValueError, AttributeError):  # a stream in memory, as tests have
            stream.write(data.decode(stream.encoding or "utf-8"))
            stream.flush()
            return True
        with contextlib.suppress(OSError, ValueError):
            stream.flush()  # what others printed comes first
        if name in _torn:
            data = b"\n" + data
        left = memoryview(data)
        while left:
            try:
                left = left[os.write(descriptor, left) :]
                _torn.add(name)
            except BlockingIOError:  # a pipe whose reader is slow, and that somebody made non-blocking
                if not select.select([], [descriptor], [], 5)[1]:
                    return False
        _torn.discard(name)
        return True
    except Exception:  # closed, full, gone, of an unknown encoding: nothing here is worth the run
        return False


def end() -> None:
    """At the end of a program: let nothing that waits in the streams' buffers change its exit code."""
    show_status([])
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except AttributeError:  # closed from the start
            continue
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
