"""Faults for runs under test: what `processes.start(patch=...)` calls in a child before its run begins."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import main_dino
from runtime import preempt

# Where a run writes to the disk: whole files, and in log.py these functions only (it also prints and counts).
_WRITERS = ("runtime/saver.py", "runtime/checkpoint.py", "runtime/lock.py")
_FUNCTIONS = {"runtime/log.py": {"append", "cut_json_lines"}, "runtime/tensorboard.py": {"flush"}}


def _writes(code: CodeType) -> bool:
    name = code.co_filename
    return name.endswith(_WRITERS) or any(
        name.endswith(file) and code.co_name in functions for file, functions in _FUNCTIONS.items()
    )


def count_lines_that_write(rank: int, path: Path) -> None:
    """Count the lines of code that write, over the whole run and all threads, into `path`."""
    count = itertools.count(1)
    _trace(lambda: path.write_text(str(next(count))))


def kill_at_line_that_writes(rank: int, number: int) -> None:
    """SIGKILL this process when it is about to execute the `number`-th line of code that writes to the disk."""
    count = itertools.count(1)
    _trace(lambda: os.kill(os.getpid(), signal.SIGKILL) if next(count) == number else None)


def _trace(at_line: Any) -> None:
    def local(frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            at_line()
        return local

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        return local if _writes(frame.f_code) else None

    threading.settrace(trace)
    sys.settrace(trace)


def note_steps(rank: int, folder: Path) -> None:
    """Append to `folder/steps-RANK` the number of each step and when it began, and make `folder/armed-RANK` as soon
    as the run catches signals.
    """
    real_step, real_enter = main_dino.train_step, preempt.StopRequest.__enter__

    def train_step(run: Any, batches: Any, step: int, *args: Any) -> Any:
        with open(folder / f"steps-{rank}", "a") as file:
            file.write(f"{step} {time.monotonic()}\n")
        return real_step(run, batches, step, *args)

    def enter(self: preempt.StopRequest) -> preempt.StopRequest:
        entered = real_enter(self)
        (folder / f"armed-{rank}").touch()
        return entered

    main_dino.train_step, preempt.StopRequest.__enter__ = train_step, enter
