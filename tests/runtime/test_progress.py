"""Progress on a terminal and in a log file."""

from __future__ import annotations

import sys

import pytest

from runtime import progress as module
from runtime import terminal
from runtime.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_lines_in_a_log_file(capsys):
    """Off a terminal progress is a few plain lines, the last one complete."""
    bar = Progress(range(5), desc="work", every_s=1000)
    for i in bar:
        bar.set_text(f"i {i}")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[-1] == "work 5/5  i 4"


def test_a_line_now_and_then(capsys, clock):
    """After the first item, then at most once in the given time, with the remaining time of the loop and the run."""
    for _ in Progress(range(10), desc="epoch 2", every_s=30, run_left=lambda: 90):
        clock[0] += 10
    assert capsys.readouterr().out.splitlines() == [
        "epoch 2 1/10  left 0:01:30, run 0:16:30",
        "epoch 2 4/10  left 0:01:00, run 0:16:00",
        "epoch 2 7/10  left 0:00:30, run 0:15:30",
        "epoch 2 10/10",
    ]


def test_a_stall_is_forgotten_soon(clock):
    """One item of an hour changes the remaining time for as long as it is in the window, not for the whole loop."""
    bar = Progress(iter(range(1000)), 1000)
    for i in bar:
        clock[0] += 3600 if i == 0 else 1
        if i == 2 * module.WINDOW:
            break
    assert bar.seconds_per_item == 1


def test_a_loop_that_is_continued(capsys, clock):
    """Items that were done before count, but not in the rate."""
    for _ in Progress(range(3), 10, "epoch 0", start=7, every_s=0):
        clock[0] += 2
    assert capsys.readouterr().out.splitlines()[0] == "epoch 0 8/10  left 0:00:04"


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_the_status_fits_the_terminal(monkeypatch, clock, columns):
    """Two lines below 80 columns: count, rate and remaining time are readable, the text stands under them."""
    shown = []
    monkeypatch.setattr(terminal, "status_is_shown", lambda: True)
    monkeypatch.setattr(terminal, "show_status", shown.append)
    monkeypatch.setattr(terminal, "columns", lambda: columns)
    bar = Progress(range(1000), desc="epoch 12", unit="step", run_left=lambda: 100_000)
    for i in bar:
        bar.set_text("loss 10.1234  lr 1.2e-03")
        clock[0] += 0.5
        if i == 100:
            break
    first, second = shown[-2]
    assert len(first) < columns
    for part in ("epoch 12", "100/1000", "2.0 step/s", "left 0:07:30, run 14:00:50"[:12]):
        assert part in first
    assert second == "  loss 10.1234  lr 1.2e-03"
    assert shown[-1] == []


def test_a_loop_without_items_or_length(capsys):
    """Nothing is divided by zero, and no remaining time is made up."""
    assert list(Progress(iter(()), desc="none")) == []
    assert list(Progress((i for i in range(2)), desc="some")) == [0, 1]
    assert capsys.readouterr().out == "some 1\n"


def test_the_loop_ends_well_when_it_is_left(monkeypatch):
    """An exception in the loop takes the status away."""
    shown = []
    monkeypatch.setattr(terminal, "status_is_shown", lambda: True)
    monkeypatch.setattr(terminal, "show_status", shown.append)
    with pytest.raises(KeyError):  # noqa: PT012
        for _ in Progress(range(3), desc="work"):
            raise KeyError
    sys.exc_info()
    assert shown[-1] == []
