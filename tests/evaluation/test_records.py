"""Tables and the JSON of an evaluation."""

from __future__ import annotations

from evaluation import records


def test_tables_align_their_columns():
    """Numbers have two decimals and end in one column under their header."""
    lines = records.table(["head", "top-1"], [["a", 9.5], ["long name", 100.0]]).splitlines()
    assert lines[2].index("9.50") + 4 == lines[3].index("100.00") + 6 == len(lines[0])
