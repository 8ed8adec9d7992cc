"""Writing to the terminal never ends a run, and nothing that is written steers the terminal."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
import threading

import pytest

from runtime import terminal
from tests.patience import PATIENCE_S

SAY = "from runtime import terminal; from runtime.guards import run_program\n"


def run(code: str, **kwargs) -> subprocess.CompletedProcess:
    """A Python process with `code`."""
    kwargs = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **kwargs}
    return subprocess.run([sys.executable, "-c", SAY + code], timeout=PATIENCE_S, check=False, **kwargs)


PROGRAM = """
def main(_):
    for i in range(3000):
        terminal.say(f"line {i} " + "x" * 100)
    return 75
run_program(main)
"""


def test_a_full_disk_under_the_output():
    """A program writes on and ends with its own code where every write fails."""
    with open("/dev/full", "w") as full:
        assert run(PROGRAM, stdout=full, stderr=full).returncode == 75


def test_a_reader_that_is_gone():
    """`| head -1`: the program goes on, and ends with its own code; never 0 for an unfinished one."""
    read, write = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", SAY + PROGRAM], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert os.read(read, 4) == b"line"
    os.close(read)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 75
    assert b"Traceback" not in errors
    assert b"BrokenPipe" not in errors


@pytest.mark.parametrize("closed", ["sys.stdout", "sys.stderr", "sys.stdout = sys.stderr"])
def test_closed_streams(closed):
    """stdout or stderr that was closed before the program began is None in Python."""
    code = f"import sys; {closed} = None\nterminal.say('a'); terminal.complain('b'); terminal.show_status(['c'])"
    assert run(code + "\nrun_program(lambda _: 3)").returncode == 3


def test_a_broken_pipe_within_the_program_is_a_failure():
    """Nothing tells that the work was done."""
    done = run("def main(_):\n    raise BrokenPipeError(32, 'Broken pipe')\nrun_program(main)")
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: ")


def test_lost_lines_are_counted(monkeypatch):
    """When writing works again, the number of lines that were lost is said."""
    read, write = os.pipe()
    stream = open(write, "w")  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", stream)
    real = os.write

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    terminal.say("one")
    terminal.say("two")
    monkeypatch.setattr(os, "write", real)
    terminal.say("three")
    assert os.read(read, 1000) == b"(2 line(s) before this one could not be written)\nthree\n"
    stream.close()
    os.close(read)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2Jb", "a\\x1b[2Jb"), ("bell\x07", "bell\\x07"), ("\udc80.jpg", "\\udc80.jpg"), ("ä ± 中", "ä ± 中"),
        ("two\nlines", "two\nlines"), ("\x9b31m", "\\x9b31m"), ("\u202egpj.exe", "\\u202egpj.exe"),
    ],
)  # fmt: skip
def test_what_steers_a_terminal_is_escaped(capsys, text, shown):
    """Control characters, and what no encoding holds, come as escapes; newlines are a message's own."""
    terminal.say(text)
    assert capsys.readouterr().out == shown + "\n"


def test_an_encoding_that_lacks_a_letter():
    """Under ASCII a "±" is an escape, and no error."""
    done = run("terminal.say('71.2 ± 0.3 %')", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.stdout == b"71.2 \\xb1 0.3 %\n"


def test_threads_do_not_mix_their_lines(monkeypatch):
    """Lines from two threads at once stay whole."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    threads = [threading.Thread(target=lambda c=c: [terminal.say(c * 50) for _ in range(50)]) for c in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(stream.getvalue().split()) == ["a" * 50] * 50 + ["b" * 50] * 50


def test_lines_stand_above_the_status():
    """On a terminal of 40 columns the status is cut to its width, taken away for a line, and drawn again."""
    leader, follower = pty.openpty()
    code = "terminal.show_status(['s' * 100, 'second']); terminal.say('hello'); terminal.end()"
    done = run(code, stderr=follower, env={**os.environ, "COLUMNS": "40", "TERM": "xterm"})
    os.close(follower)
    shown = os.read(leader, 10000).decode()
    os.close(leader)
    assert done.stdout == b"hello\n"
    status = "\r" + "s" * 39 + "\r\nsecond\x1b[1A\r"
    assert shown == status + "\r\x1b[J" + status + "\r\x1b[J"
