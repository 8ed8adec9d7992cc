"""Signals that ask a run to stop: noticed at once, acted on between two steps.

SIGTERM and SIGUSR1 (schedulers), and the first SIGINT, ask for "finish the step, save, leave". A repeated SIGTERM or
SIGUSR1 changes nothing; a second SIGINT aborts at once, also where the program waits inside a library for a process
that hangs: after the first one the signal has its meaning of old. Handlers only set a flag: whether and when to stop
is agreed between the ranks by the training step.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, *((signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()))


class StopRequest:
    """Catches the stop signals while it is entered; `requested` tells whether one came, `name` which.

    Outside the main thread, where Python delivers no signals, it catches none.
    """

    def __init__(self) -> None:
        self.requested = False
        self.name = ""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.requested = True
        self.name = signal.Signals(number).name
        if number == signal.SIGINT:
            # A handler in Python would wait for the library call that it interrupts; the system does not.
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def requeue_slurm_job(say: Callable[[str], None]) -> None:
    """Put this SLURM job back into the queue; called by one process, once. Says so, or why it did not.

    Only a running job is: one that is already on its way out was cancelled, or SLURM requeues it itself.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        say("warning: --requeue true has no effect outside a SLURM job")
        return
    try:
        shown = _scontrol("show", "job", job, "--oneliner")
        state = re.search(r"JobState=(\w+)", shown)
        if state is not None and state.group(1) != "RUNNING":
            say(f"job {job} is {state.group(1)}, so it is not requeued from here")
            return
        _scontrol("requeue", job)
        say(f"job {job} is back in the queue")
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        say(f"warning: job {job} was not requeued: {reason.strip()}")


def _scontrol(*words: str) -> str:
    done = subprocess.run(["scontrol", *words], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout
