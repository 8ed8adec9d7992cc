"""How a program ends: exit codes, and errors of one line.

Bad input is raised as `InputError` where it enters (an argument, a file, a data set) and leaves the program as one
line and exit code 2; anything else is a defect and keeps its traceback. A reader of the output that goes away
(`main_dino.py ... | head`) costs the lines that it would have read: the program goes on, and ends with its own code.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

from runtime import terminal

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_NON_FINITE = 3
EXIT_INTERRUPTED = 130
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: "try again later", which a scheduler's requeue rule can tell from a failure


class InputError(ValueError):
    """Bad argument, file or data set. The message names the value and what to do about it."""


class RunStopped(RuntimeError):
    """A run cannot go on. The message says why; `exit_code` is the program's."""

    exit_code = EXIT_FAILED

    def __init__(self, message: str, exit_code: int | None = None) -> None:
        super().__init__(message)
        self.exit_code = self.exit_code if exit_code is None else exit_code


class SaveError(RunStopped):
    """Too many saves failed in a row."""


class NonFiniteError(RunStopped):
    """Training met too many non-finite steps in a row. The message names the step and the terms of the loss."""

    exit_code = EXIT_NON_FINITE


@contextlib.contextmanager
def input_errors(context: str = "") -> Iterator[None]:
    """Turn the errors that bad input causes inside the block (ValueError, OSError) into `InputError`.

    For the set-up of a program only: while training, a ValueError is a defect and its traceback is wanted.
    """
    try:
        yield
    except InputError:
        raise
    except (ValueError, OSError) as error:
        raise InputError(f"{context}: {error}" if context else str(error)) from error


def run_program(main: Callable[[list[str] | None], int | None], argv: list[str] | None = None) -> NoReturn:
    """Run `main(argv)` and leave the process with its exit code; `InputError` becomes one line and code 2."""
    try:
        code = main(argv)
    except InputError as error:
        _leave_reason(f"error: {error}")
        code = EXIT_BAD_INPUT
    except RunStopped as error:
        _leave_reason(f"error: {error}")
        code = error.exit_code
    except KeyboardInterrupt:
        terminal.complain("interrupted")
        code = EXIT_INTERRUPTED
    except BrokenPipeError as error:  # of somebody's print, or of a worker: nothing says that the work was done
        _leave_reason(f"error: {error}; a process that read from this one has ended")
        code = EXIT_FAILED
    if code == EXIT_PREEMPTED:  # schedulers repeat themselves: a second SIGTERM must not turn 75 into a death by signal
        for name in ("SIGTERM", "SIGUSR1"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_IGN)
    terminal.end()
    sys.exit(EXIT_DONE if code is None else code)


def _leave_reason(message: str) -> None:
    """Say why the program ends; under torchrun also in the file that its own report of the failure ends with."""
    terminal.complain(message)
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": terminal.escaped(message), "timestamp": str(int(time.time()))}, file)
