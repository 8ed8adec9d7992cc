"""Progress on a terminal and in a log file."""

from __future__ import annotations

from runtime.progress import Progress


def test_progress_lines(capsys):
    """Off a terminal progress is a few plain lines, the last one complete."""
    bar = Progress(range(5), desc="work", every_s=1000)
    for i in bar:
        bar.set_text(f"i {i}")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[-1] == "work 5/5  i 4"
