"""Signals that ask a run to stop: answered at once, acted on between two steps.

SIGTERM and SIGUSR1 (schedulers), and the first SIGINT, ask for "finish the step, save, leave". A repeated SIGTERM or
SIGUSR1 changes nothing; a second SIGINT aborts at once, even while the program waits inside a library for a process
that hangs. Handlers only set a flag: whether and when to stop is agreed between the ranks by the training step.

Python runs a handler when the library call that it interrupts returns, which in a long step takes seconds. The answer
to the user comes from a thread that the signal itself wakes (signal.set_wakeup_fd).
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from runtime import terminal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, *((signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()))
_ABORTED = 130  # what a shell reports of a program that Ctrl-C ended


class StopRequest:
    """Catches the stop signals while it is entered; `requested` tells whether one came, `name` which.

    Outside the main thread, where Python delivers no signals, it catches none.
    """

    def __init__(self) -> None:
        self.requested = False
        self.name = ""
        self._previous: dict[int, Any] = {}
        self._answers: _Answers | None = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
            self._answers = _Answers(lambda: self.requested)
        return self

    def __exit__(self, *_: object) -> None:
        if self._answers is not None:
            self._answers.close()
            self._answers = None
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.requested = True
        self.name = signal.Signals(number).name
        if number == signal.SIGINT:
            # From now on the system ends the process at once; a handler in Python would wait for a library call.
            signal.signal(signal.SIGINT, signal.SIG_DFL)


class _Answers:
    """A thread that says on the terminal that a signal has come, the moment it comes."""

    def __init__(self, noticed: Callable[[], bool]) -> None:
        self._noticed, self._pid = noticed, os.getpid()
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._answered: set[int] = set()
        self._thread = threading.Thread(target=self._serve, name="signal-answers", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while numbers := os.read(self._read, 64):
            for number in numbers:
                if number == 0:  # not a signal's: the end
                    return
                self._answer(number)

    def _answer(self, number: int) -> None:
        if number not in STOP_SIGNALS:
            return
        if number in self._answered:
            if number == signal.SIGINT and not self._noticed():  # the first one still waits for a library call
                os._exit(_ABORTED)
            return
        self._answered.add(number)
        if terminal.is_main():
            again = "; Ctrl-C again aborts at once" if number == signal.SIGINT else ""
            name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
            terminal.answer(f"{name}: finishing this step, then saving and leaving{again}")

    def close(self) -> None:
        signal.set_wakeup_fd(self._before)
        if os.getpid() == self._pid:
            with contextlib.suppress(OSError):
                os.write(self._write, b"\0")
            self._thread.join(1)
        for descriptor in (self._read, self._write):
            with contextlib.suppress(OSError):
                os.close(descriptor)


# A forked loader worker must not write into the pipe of its parent.
os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))


def requeue_slurm_job(say: Callable[[str], None]) -> None:
    """Put this SLURM job back into the queue; called by one process, once. Says so, or why it did not.

    Only a running job is requeued: one that is already on its way out was cancelled, or SLURM requeues it itself.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        say("warning: --requeue true has no effect outside a SLURM job")
        return
    if re.fullmatch(r"\d[\d_+]*", job) is None:
        say(f"warning: SLURM_JOB_ID={job!r} is no job's number; nothing was requeued")
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
