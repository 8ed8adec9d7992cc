"""The record of several probes: which head of each is the best, and what survives a restart."""

from __future__ import annotations

import pytest
import torch

from evaluation.forms import Form
from evaluation.probe_families import Grid
from evaluation.probe_heads import read_attentive
from evaluation.probe_names import read_probes
from evaluation.probe_recipes import RECIPES
from evaluation.probe_sweep import ProbeSweep
from evaluation.probes import Probes, Widths
from runtime.checkpoint import read_checkpoint


def sweep(folder, made_by=None):
    names, grid = read_probes(["linear", "ep:queries=4"]), Grid([0.1, 1.0], [0.0], 16)
    probes = Probes(names, [Form()], Widths([8], 8), 3, grid, RECIPES["dino"], torch.device("cpu"))
    return ProbeSweep(folder, probes, made_by or {"made": "by"})


VAL = torch.tensor([[90.0, 99, 0.1], [10, 50, 2], [70, 80, 1], [30, 40, 1]])
SELECTION = torch.tensor([[20.0, 60, 2], [80, 95, 0.3], [40, 80, 1], [60, 70, 1]])
LOSSES = [1.0] * 4


def test_the_best_head_of_each_probe_is_the_one_of_the_selection(tmp_path):
    """Where the two disagree, the selection's numbers decide over a probe's heads and epochs, and not val's."""
    record = sweep(tmp_path)
    record.validated(0, LOSSES, VAL, SELECTION)
    record.validated(1, LOSSES, VAL + 5, SELECTION - 5)
    found = {label: (best["lr"], best["val_top1"], best["epoch"]) for label, best in record.best_of.items()}
    assert found == {"linear": (1.0, 10.0, 0), "ep:queries=4": (1.0, 30.0, 0)}
    assert record.best["probe"] == "linear"


def test_the_best_heads_are_in_their_files_and_survive_a_restart(tmp_path):
    """A probe's file holds its best head's parameters; a resumed record knows the best so far, and no file changes."""
    record = sweep(tmp_path)
    record.validated(0, LOSSES, VAL, SELECTION)
    record.save(1)
    again = sweep(tmp_path)
    assert again.resume() == 1
    assert again.best_of == record.best_of
    again.validated(1, LOSSES, VAL, SELECTION - 5)
    assert again.best_of == record.best_of
    head = record.probe.families[1].modules[1]
    ((label, (name, saved)),) = again.best_heads().items()
    assert label == name.label == "ep:queries=4"
    assert all(torch.equal(value, head.state_dict()[key]) for key, value in saved.state_dict().items())
    content = read_checkpoint(tmp_path / "best_linear.pth.tar")
    assert (content["head"]["lr"], content["head"]["form"]) == (1.0, [1, False])
    assert read_attentive(read_checkpoint(again.path_of(label)), "file")[0].settings == {"queries": 4}


@pytest.mark.parametrize(("selected_on", "columns"), [("held-out train", 7), ("val", 6)])
def test_the_table_has_a_row_per_probe(tmp_path, capsys, selected_on, columns):
    """Probe, parameters, best head, its epoch and figures; what was chosen on val itself is said to be."""
    record = sweep(tmp_path)
    record.validated(0, LOSSES, VAL, VAL if selected_on == "val" else SELECTION)
    capsys.readouterr()
    found = record.finish(selected_on)
    said = capsys.readouterr().out
    header, _, linear, ep = said.splitlines()[:4]
    assert header.split("  ")[0] == "probe"
    assert len([cell for cell in header.split("  ") if cell.strip()]) == columns
    assert linear.split()[:2] == ["linear", "27"]
    assert ep.split()[:2] == ["ep:queries=4", f"{4 * 8 + 64 + 27}"]
    assert ("published protocols" in said) == (selected_on == "val")
    assert set(found) == {"selected", "heads", "seconds", "probes"}
    assert "the best rate, " in said
