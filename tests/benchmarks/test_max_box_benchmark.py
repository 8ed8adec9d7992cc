"""The benchmark of the box search runs and compares equal results."""

from __future__ import annotations

from benchmarks import max_box


def test_max_box_benchmark(capsys):
    """For all contours and for the largest one both sides find the same boxes, and a row tells their ratio."""
    assert max_box.main(["--maps", "1", "--side", "5", "--rounds", "1"]) == 0
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    assert [row[1].strip() for row in rows] == ["all contours", "largest contour (V1)"]
    assert all(float(row[4].strip().removesuffix("x")) > 0 for row in rows)
    assert all(row[5].strip() == "0" for row in rows)


def test_the_search_in_processes_is_timed(capsys):
    """--workers adds the time of the whole search."""
    assert max_box.in_processes(16, 5, 2) > 0
