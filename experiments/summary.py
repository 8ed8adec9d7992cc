"""The README's table of what was measured: one line per experiment, from its results.csv."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from experiments.rows import Row
from runtime.guards import InputError

BEGIN, END = "<!-- measured: python -m experiments.tables -->", "<!-- end of measured -->"


def line(folder: Path, title: str, rows: Sequence[Row], metric: str, name: str) -> str:
    """An experiment's line: its title, linked to its README, and the first column's mean of every label."""
    cells = []
    for row in rows:
        values = list(row.values.get(metric, {}).values())
        if values:
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{row.label} {statistics.fmean(values):.1f}{spread}")
    seeds = {seed for row in rows for seed in row.values.get(metric, {})}
    place = f"{folder.parent.name}/{folder.name}"
    return f"| [{title}]({place}/README.md) | {name} | {', '.join(cells)} | {len(seeds)} |"


def replaced(page: Path, lines: Sequence[str]) -> str:
    """The text of a page with its table of measurements made of `lines`. Raises InputError if its marks are torn."""
    text = page.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InputError(f"{page} has no place for the measurements: {BEGIN} and {END}, each on a line")
    table = ["| question | measure | mean ± standard deviation | seeds |", "|---|---|---|---|", *lines]
    return "\n".join([before + begin, "", *table, "", end + after])
