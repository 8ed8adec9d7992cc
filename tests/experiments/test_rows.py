"""Means, deviations and paired differences of runs."""

from __future__ import annotations

import statistics

from experiments.measurements import Measurement
from experiments.rows import compare, markdown

TOP1 = {("gap", 0): 50.0, ("gap", 1): 60.0, ("gem", 0): 53.0, ("gem", 1): 61.0, ("gem", 2): 90.0, ("max", 5): 40.0}
MEASURED = [Measurement(label, seed, "top1", value, "f") for (label, seed), value in TOP1.items()]


def test_differences_are_paired_by_seed():
    """Only seeds that both have count: gem's third run changes its mean and not its difference to gap."""
    rows = {row.label: row for row in compare(MEASURED, ["top1"], "gap")}
    assert rows["gem"].differences == {"top1": [3.0, 1.0]}
    assert rows["gap"].differences == {}
    assert rows["max"].differences == {"top1": []}


def test_the_table_in_markdown():
    """The baseline leads, the best follows; n - 1 in the deviation, none for a single run; empty cells are empty."""
    text = markdown("Title", compare(MEASURED, ["top1"], "gap"), {"top1": "top-1", "other": "other"}, "gap")
    lines = text.splitlines()
    deviation = statistics.stdev([53.0, 61.0, 90.0])
    assert lines[0] == "# Title"
    assert lines[2] == "|  | seeds | top-1 | difference to gap | other | difference to gap |"
    assert lines[4] == f"| [gap](runs/gap) | 0, 1 | 55.00 ± {50**0.5:.2f} |  |  |  |"
    assert lines[5] == f"| [gem](runs/gem) | 0, 1, 2 | 68.00 ± {deviation:.2f} | +2.00 ± {2**0.5:.2f} (n = 2) |  |  |"
    assert lines[6] == "| [max](runs/max) | 5 | 40.00 |  |  |  |"


def test_without_a_baseline_there_are_no_differences():
    """And the order is by the first column alone."""
    rows = compare(MEASURED, ["top1"], None)
    assert [row.label for row in rows] == ["gem", "gap", "max"]
    assert [row.label for row in compare(MEASURED, ["top1"], None, ("max", "gap"))] == ["max", "gap", "gem"]
    assert "difference" not in markdown("Title", rows, {"top1": "top-1"}, None)


def test_each_model_is_compared_with_its_own_baseline():
    """A last word is the baseline of the labels that begin as its own does; a label without one has no difference."""
    values = {"vit_official": 50.0, "vit_simpool": 53.0, "resnet_official": 70.0, "resnet_simpool": 69.0, "other": 1.0}
    measured = [Measurement(label, 0, "top1", value, "f") for label, value in values.items()]
    rows = {row.label: row.differences.get("top1") for row in compare(measured, ["top1"], "official")}
    assert rows == {"vit_official": None, "vit_simpool": [3.0], "resnet_official": None, "resnet_simpool": [-1.0],
                    "other": []}  # fmt: skip
    order = [row.label for row in compare(measured, ["top1"], "official")]
    assert order == ["resnet_official", "vit_official", "resnet_simpool", "vit_simpool", "other"]
