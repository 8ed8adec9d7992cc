"""What stands between a program and its user: exit codes, and errors that can be read.

Bad input is raised as `InputError` where it enters (an argument, a file, a data set) and leaves the program as one
line and exit code 2; anything else is a defect and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_NON_FINITE = 3
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: "try again later", which a scheduler's requeue rule can tell from a failure


class InputError(ValueError):
    """Bad argument, file or data set. The message names the value and what to do about it."""


class RunStopped(RuntimeError):
    """A run cannot go on, for a reason that its message tells; `exit_code` is the program's."""

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
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = EXIT_BAD_INPUT
    except RunStopped as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        code = 130
    except BrokenPipeError:  # `main_dino.py --help | head`: nobody reads on, so nothing may be flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_DONE
    if code == EXIT_PREEMPTED:  # schedulers repeat themselves: a second SIGTERM must not turn 75 into a death by signal
        for name in ("SIGTERM", "SIGUSR1"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_IGN)
    sys.exit(EXIT_DONE if code is None else code)
