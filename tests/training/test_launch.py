"""Around a run: its first lines, its marker, its report, and continuing it elsewhere."""

from __future__ import annotations

import json

import pytest
import torch

import main_dino
from evaluation import report
from runtime.checkpoint import read_checkpoint
from runtime.guards import InputError, NonFiniteError
from tests.pretraining import VIT, assert_equal_states, train
from tests.reliability.injection import replace_step
from training import launch


def flags(small, folder, *more) -> list:
    return [*VIT, "--data_path", small, "--eval_every", 0, "--epochs", 2, "--output_dir", folder, *more]


def test_a_failing_report_costs_a_finished_run_nothing(small, tmp_path, monkeypatch, capsys):
    """The marker is there before the report is tried; its failure is a warning, and the exit code 0."""
    marked = []

    def fail(folder, *_):
        marked.append((folder / "DONE").exists())
        raise RuntimeError("no room")

    monkeypatch.setattr(report, "write_report", fail)
    assert train(*flags(small, tmp_path, "--report", "true", "--max_steps", 2)) == 0
    assert marked == [True]
    assert "warning: no report (RuntimeError: no room)" in capsys.readouterr().out


def test_what_to_do_next_suits_the_model(tmp_path):
    """The commands after a run are those that its model can serve."""
    args = main_dino.parse_arguments(["--data_path", "demo", "--output_dir", str(tmp_path)])
    with_map, without = (launch.what_next(tmp_path, args, has_map) for has_map in (True, False))
    assert [line.split()[1] for line in with_map[1:]] == ["eval_knn.py", "eval_linear.py", "visualize_attention.py"]
    assert with_map[:-1] == without


def test_a_run_is_continued_in_another_folder(small, tmp_path):
    """--resume takes the arguments of the file's run and ends bit for bit as it would have, its log included."""
    assert train(*flags(small, tmp_path / "whole")) == 0
    assert train(*flags(small, tmp_path / "begun", "--max_steps", 8, "--checkpoint_every_steps", 1)) == 0
    file = tmp_path / "begun" / "checkpoint_step00000008.pth"
    assert train("--resume", file, "--output_dir", tmp_path / "elsewhere", "--max_steps", 12) == 0
    assert_equal_states(tmp_path / "whole", tmp_path / "elsewhere")


def test_another_width_is_no_continuation(small, tmp_path):
    """--allow_changed_args can't change the model's shape: one line that says so."""
    assert train(*flags(small, tmp_path, "--max_steps", 1)) == 0
    with pytest.raises(InputError, match="does not fit the model of these arguments"):
        train(*flags(small, tmp_path, "--embed_dim", 48, "--allow_changed_args", "true"))


def test_a_file_without_arguments_is_no_run(tmp_path):
    """--resume of a bare state dict is refused."""
    torch.save({"w": torch.zeros(1)}, tmp_path / "bare.pth")
    with pytest.raises(InputError, match="records no arguments"):
        train("--resume", tmp_path / "bare.pth", "--output_dir", tmp_path / "x")


def test_unlabelled_splits_are_made_by_fraction(cifar10, tmp_path):
    """Class folders without val/ are evaluated on a part of each class that is held out."""
    flags = [*VIT, "--data_path", cifar10 / "train", "--subset", 12, "--epochs", 1, "--max_steps", 1, "--eval_every", 1]
    assert train(*flags, "--nb_knn", 3, "--val_fraction", 0.25, "--output_dir", tmp_path) == 0
    row = json.loads((tmp_path / "log.txt").read_text())
    assert set(row["k-NN"]) == {"3"}


def test_fp16_that_never_works_stops(small, tmp_path, monkeypatch):
    """A gradient that overflows at every loss scale ends the run with an error once the scale is below 1."""
    real = main_dino.METHOD

    def overflowing(run, batches, step, wishes):
        for parameter in run.student.parameters():
            parameter.register_hook(lambda gradient: gradient * float("inf")) if step == 0 else None
        return real.step(run, batches, step, wishes)

    monkeypatch.setattr(main_dino, "METHOD", real)
    replace_step(overflowing)
    with pytest.raises(NonFiniteError, match=r"loss scale fell to 0\.5"):
        train(*flags(small, tmp_path, "--amp", "fp16", "--epochs", 9))
    assert read_checkpoint(next(tmp_path.glob("replay_step*.pth")))["replay"]["step"] == 16


def test_the_first_lines_say_what_matters(small, tmp_path, capsys):
    """Model, device, data, batch, what is not a default; notes come last, and no line is a page."""
    assert train(*flags(small, tmp_path, "--max_steps", 1)) == 0
    lines = capsys.readouterr().out.splitlines()
    first = lines[: next(i for i, line in enumerate(lines) if line.startswith("epoch 0"))]
    assert len(first) < 24
    assert first[0].startswith("dino: vit_small, simpool")
    assert any(line.startswith("global batch: 16 = 16 images") for line in first)
    assert any("your flags" in line for line in first)
