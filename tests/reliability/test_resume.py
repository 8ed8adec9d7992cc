"""A run that is continued from any of its steps ends as the run that was never stopped."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.pretraining import FAMILIES, assert_equal_states, train

full = pytest.mark.full


@pytest.mark.parametrize(
    ("family", "amp"),
    [
        ("vit", "none"),
        pytest.param("vit", "bf16", marks=full),
        pytest.param("resnet", "none", marks=full),
        pytest.param("resnet", "bf16", marks=full),
        pytest.param("convnext", "none", marks=full),
        pytest.param("convnext", "bf16", marks=full),
    ],
)
def test_every_step_of_three_epochs_can_be_continued(small, tmp_path, family, amp, request):
    """Start again from the save of each step, with another number of loader workers, evaluations in between: models,
    optimizer, center, schedules and log end bit for bit the same. The quick form takes every third step.
    """
    flags = [*FAMILIES[family], "--data_path", small, "--subset", 24, "--epochs", 3, "--eval_every", 1, "--nb_knn", 5]
    flags += ["--amp", amp, "--drop_path_rate", 0.1 if family == "vit" else 0, "--max_steps", 10_000]
    saves = ["--checkpoint_every_steps", 1, "--keep_checkpoints", 99]
    assert train(*flags, *saves, "--output_dir", tmp_path / "whole") == 0
    steps = sorted((tmp_path / "whole").glob("checkpoint_step*.pth"))
    assert len(steps) == 9 if family != "convnext" else 18
    every = 1 if request.node.get_closest_marker("full") else 3
    for i, checkpoint in enumerate(steps[::every]):
        folder = tmp_path / "continued"
        start_from(checkpoint, folder)
        assert train(*flags, "--output_dir", folder, "--num_workers", i % 2) == 0
        assert_equal_states(tmp_path / "whole", folder)
        shutil.rmtree(folder)


def start_from(checkpoint: Path, folder: Path) -> None:
    """A folder as a kill after that save would have left it, with the log running ahead as far as it can."""
    folder.mkdir()
    shutil.copy(checkpoint, folder / "checkpoint.pth")
    shutil.copy(checkpoint.parent / "log.txt", folder)


@pytest.mark.parametrize("damage", ["flip", "zero page", "cut"])
def test_a_damaged_checkpoint_costs_a_step_and_nothing_else(small, tmp_path, capsys, damage):
    """The newest file is damaged under all its names: the one before it is named as the start, and the end is the
    same.
    """
    flags = [*FAMILIES["vit"], "--data_path", small, "--subset", 24, "--epochs", 2, "--eval_every", 0]
    flags += ["--checkpoint_every_steps", 1]
    assert train(*flags, "--output_dir", tmp_path / "whole") == 0
    assert train(*flags, "--output_dir", tmp_path / "run", "--max_steps", 5) == 0
    newest = tmp_path / "run" / "checkpoint.pth"
    data = bytearray(newest.read_bytes())
    middle = len(data) // 2 & ~4095
    if damage == "flip":
        data[middle] ^= 1
    elif damage == "zero page":
        data[middle : middle + 4096] = bytes(4096)
    with open(newest, "r+b") as file:  # in place, so that its hard link is damaged too, as by a failing disk
        file.write(data)
        file.truncate(middle if damage == "cut" else len(data))
    capsys.readouterr()
    assert train(*flags, "--output_dir", tmp_path / "run") == 0
    out = capsys.readouterr().out
    assert out.count("is damaged") == 1, out
    assert "checkpoint_step00000004.pth at step 4" in out
    assert_equal_states(tmp_path / "whole", tmp_path / "run")
