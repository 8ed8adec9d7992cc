"""Rows of a table from the numbers of runs: means, deviations, paired differences; as Markdown and as a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from experiments.measurements import Measurement


@dataclass
class Row:
    """A label's numbers: per metric the values of its seeds, and their differences to the baseline's same seeds."""

    label: str
    values: dict[str, dict[int, float]] = field(default_factory=dict)
    differences: dict[str, list[float]] = field(default_factory=dict)


def compare(
    measured: list[Measurement], metrics: list[str], baseline: str | None, order: Sequence[str] = ()
) -> list[Row]:
    """A row for each label: those of `order` in this order, then by the first metric, the baseline first.

    The baseline is a label, or the last word of several: with "official", vit_simpool is compared with vit_official and
    resnet_simpool with resnet_official.
    """
    rows: dict[str, Row] = {}
    for entry in measured:
        row = rows.setdefault(entry.label, Row(entry.label))
        if entry.metric in metrics:
            row.values.setdefault(entry.metric, {})[entry.seed] = entry.value
    for row in rows.values():
        other = baseline_of(row.label, baseline, rows.keys())
        if other == row.label:
            continue
        for metric, values in row.values.items():
            base = rows[other].values.get(metric, {}) if other is not None else {}
            row.differences[metric] = [values[seed] - base[seed] for seed in sorted(values.keys() & base.keys())]

    def rank(row: Row) -> tuple[int, bool, float]:
        values = row.values.get(metrics[0], {}).values()
        place = order.index(row.label) if row.label in order else len(order)
        first = row.label == baseline_of(row.label, baseline, rows.keys())
        return place, not first, -statistics.fmean(values) if values else math.inf

    return sorted(rows.values(), key=rank)


def baseline_of(label: str, baseline: str | None, labels: Collection[str]) -> str | None:
    """The label that `label` is compared with, itself if it is a baseline; None if there is none."""
    if baseline is None or baseline in labels:
        return baseline
    words = label.split("_")
    candidates = ("_".join([*words[:count], baseline]) for count in range(len(words), 0, -1))
    return next((candidate for candidate in candidates if candidate in labels), None)


def markdown(title: str, rows: list[Row], columns: dict[str, str], baseline: str | None) -> str:
    """The table: a row per label with links to its runs, and per column its mean and its difference to the baseline."""
    header = ["", "seeds"]
    for name in columns.values():
        header += [name, *([f"difference to {baseline}"] if baseline is not None else [])]
    lines = [f"# {title}", "", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for row in rows:
        seeds = sorted({seed for values in row.values.values() for seed in values})
        cells = [f"[{row.label}](runs/{row.label})", ", ".join(map(str, seeds))]
        for metric in columns:
            cells.append(_mean(list(row.values.get(metric, {}).values())))
            if baseline is not None:
                cells.append(_difference(row.differences.get(metric, [])))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _LEGEND if baseline is None else _LEGEND + _PAIRED, ""])


_LEGEND = (
    "Mean over the seeds ± sample standard deviation. Made by `python -m experiments.tables`; numbers: results.csv."
)
_PAIRED = " Differences are paired by seed; n is the number of pairs."


def _mean(values: list[float]) -> str:
    if not values:
        return ""
    return f"{statistics.fmean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def _difference(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):+.2f}{spread} (n = {len(values)})"


def picture(rows: list[Row], column: tuple[str, str], title: str, path: Path) -> None:
    """The first column as points: one per seed, and each label's mean with its deviation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metric, name = column
    shown = [row for row in rows if row.values.get(metric)][::-1]
    figure = Figure(figsize=(7, 1.2 + 0.3 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for place, row in enumerate(shown):
        values = list(row.values[metric].values())
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        axis.plot(values, [place] * len(values), "o", color="#35b779", markersize=4, alpha=0.6)
        axis.errorbar(statistics.fmean(values), place, xerr=spread, fmt="|", color="#31688e", markersize=12, capsize=3)
    axis.set_yticks(range(len(shown)), [row.label for row in shown])
    axis.set_xlabel(f"{name}: each seed, mean and standard deviation")
    axis.set_title(title)
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)
