"""The benchmarks of the step in quick form: both sides compute the same; times are never judged here."""

import os
from pathlib import Path

import pytest
import torch

from benchmarks import head_loss, simpool_layer
from benchmarks.measure import peak_bytes, run_apart, timed_in_turn
from distill import fused_loss

CPU = torch.device("cpu")


@pytest.mark.parametrize(("shape", "gamma"), [((3, 20, 16), 1.25), ((3, 16, 3, 4), 2.0)])
def test_simpool_sides_agree(shape, gamma):
    """Both sides of the SimPool benchmark give the same output and gradients, and ours holds less memory."""
    row = simpool_layer.compare(shape, gamma, 1, CPU)
    assert row["error"] < 1e-5
    assert 0 < row["ours MB"] < row["plain MB"]


def test_head_loss_sides_agree(monkeypatch):
    """All forms of head and loss give the same terms and gradients, and the fused one holds at most 0.4 of plain."""
    monkeypatch.setitem(fused_loss.CHUNK_ELEMENTS, "cpu", 1 << 14)  # many chunks, as at full size
    rows = head_loss.compare(8, 6, 4096, 16, 1, CPU)
    assert max(row["error"] for row in rows.values()) < 1e-5
    assert rows["fused"]["MB"] <= 0.4 * rows["plain"]["MB"]


def test_peak_counts_what_is_held_at_once():
    """Tensors that are freed before the next do not add up."""
    one = peak_bytes(lambda: [torch.ones(1000).sum().item() for _ in range(3)], CPU)
    assert 4000 <= one < 8000


def note_process(path):
    """A side that appends the process it runs in, and its argument."""

    def run(word):
        with open(path, "a") as file:
            file.write(f"{os.getpid()} {word}\n")

    return run


def test_a_side_apart_runs_in_one_process_of_its_own(tmp_path):
    """It is built once, has run when the call returns, and is gone afterwards."""
    path = tmp_path / "runs"
    with run_apart(note_process, path) as run:
        run("first")
        assert path.read_text().endswith(" first\n")
        run("second")
    (one, _), (two, word) = (line.split() for line in path.read_text().splitlines())
    assert one == two != str(os.getpid())
    assert word == "second"
    assert not Path(f"/proc/{one}").exists()


def test_sides_run_in_turn():
    """Every round runs each side once, the first round uncounted."""
    order = []
    medians = timed_in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2)
    assert order == ["a", "b"] * 3
    assert set(medians) == {"a", "b"}
