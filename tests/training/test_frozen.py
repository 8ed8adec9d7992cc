"""A backbone that is frozen for the first epochs: exactly unchanged, then trained, and resumed in either part."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import main_dino
from runtime.checkpoint import read_checkpoint
from runtime.guards import InputError
from tests import processes
from tests.pretraining import TINY, VIT, assert_equal_states, train
from tests.small_images import tiny_checkpoint
from training.run import Run

HEAD = ["--head_hidden_dim", "32", "--bottleneck_dim", "16", "--eval_every", "0"]
START = ["--drop_path_rate", "0.2", "--warmup_epochs", "0", "--freeze_last_layer", "0", "--freeze_backbone_epochs", "1"]


def backbone(path: Path, key: str) -> dict[str, torch.Tensor]:
    """The weights and buffers of a checkpoint's student or teacher without the head."""
    state = read_checkpoint(path)[key]
    return {name.removeprefix("module."): value for name, value in state.items() if "backbone." in name}


def starts_from(folder: Path, family: str, small: Path) -> list[str]:
    """The flags of a model, and a checkpoint of it to start from."""
    if family == "vit":
        return [*VIT, "--depth", "3", "--init_from", tiny_checkpoint(folder / "start.pth")]
    flags = ["--arch", "test_resnet", "--mode", "simpool", *TINY[TINY.index("--img_size") :], "--optimizer", "sgd"]
    before = ["--data_path", small, "--eval_every", 0, "--max_steps", 2, "--output_dir", folder / "before"]
    assert train(*flags, *HEAD, *before) == 0
    return [*flags, "--init_from", folder / "before" / "checkpoint.pth"]


@pytest.mark.parametrize("family", ["vit", "batchnorm"])
def test_a_frozen_backbone_is_exactly_unchanged(small, tmp_path, family):
    """Weights and running statistics of student and teacher after the frozen epoch; the head has moved by then.

    Weight decay, drop path and a large rate are on. In the next epoch the backbone moves.
    """
    flags = [*starts_from(tmp_path, family, small), *HEAD, *START, "--weight_decay", 0.4, "--lr", 0.02]
    if family == "batchnorm":
        flags += ["--drop_path_rate", 0]
    run = ["--data_path", small, "--epochs", 2, "--saveckp_freq", 1, "--output_dir", tmp_path / "run"]
    assert train(*flags, *run) == 0
    start = backbone(Path(flags[flags.index("--init_from") + 1]), "teacher" if family == "vit" else "student")
    frozen, end = tmp_path / "run" / "checkpoint0001.pth", tmp_path / "run" / "checkpoint.pth"
    for key in ("student", "teacher"):
        after = backbone(frozen, key)
        assert after.keys() == start.keys()
        for name, value in start.items():
            assert torch.equal(after[name], value), f"{key} {name}"
    heads = [read_checkpoint(path)["student"]["module.head.mlp.0.weight"] for path in (frozen, end)]
    assert not torch.equal(*heads)
    moved = [name for name, value in backbone(end, "student").items() if not torch.equal(value, start[name])]
    assert len(moved) > 0.9 * len(start)


@pytest.mark.parametrize("stop", [3, *(pytest.param(stop, marks=pytest.mark.full) for stop in (6, 8))])
def test_a_run_is_resumed_exactly_in_either_part(small, tmp_path, stop):
    """Stopped within the frozen epoch, at its end, or after it, the run ends in the same bits."""
    flags = [*starts_from(tmp_path, "vit", small), *HEAD, *START, "--data_path", small, "--epochs", 2]
    assert train(*flags, "--output_dir", tmp_path / "whole") == 0
    assert train(*flags, "--output_dir", tmp_path / "parts", "--max_steps", stop) == 0
    assert train(*flags, "--output_dir", tmp_path / "parts") == 0
    assert_equal_states(tmp_path / "whole", tmp_path / "parts")


def test_two_processes_freeze_as_one(small, tmp_path):
    """The frozen parameters have no gradients to exchange; afterwards they have, and both worlds end alike."""
    flags = [*starts_from(tmp_path, "vit", small), *HEAD, *START, "--data_path", small, "--epochs", 2]
    flags += ["--drop_path_rate", "0", "--global_batch_size", 16, "--optimizer", "sgd", "--lr", 0.05]
    assert train(*flags, "--output_dir", tmp_path / "one") == 0
    processes.run([*flags, "--output_dir", tmp_path / "two"], tmp_path, world=2)
    one, two = (read_checkpoint(tmp_path / name / "checkpoint.pth")["student"] for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)


def test_nothing_is_computed_backwards_through_a_frozen_backbone(small, tmp_path, monkeypatch):
    """Its output needs no gradient, and its parameters have none in the step; those of the head do."""
    seen = []
    real = Run.update

    def update(run: Run, means):
        student = run.bare_student
        seen.append([any(p.grad is not None for p in part.parameters()) for part in (student.backbone, student.head)])
        return real(run, means)

    monkeypatch.setattr(Run, "update", update)
    flags = [*starts_from(tmp_path, "vit", small), *HEAD, *START, "--data_path", small, "--epochs", 2]
    assert train(*flags, "--output_dir", tmp_path / "run", "--max_steps", 8) == 0
    assert seen == [[False, True]] * 6 + [[True, True]] * 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--freeze_backbone_epochs", "2"], "--freeze_backbone_epochs 2 with --epochs 2: .*give 1 or fewer"),
        (["--freeze_backbone_epochs", "-1"], "--freeze_backbone_epochs -1"),
        (["--freeze_backbone_epochs", "1", "--fsdp", "true"], "--fsdp true: shards can't be frozen"),
    ],
)
def test_what_cannot_be_frozen_is_refused(flags, message):
    """One line with the flag, before anything is built."""
    with pytest.raises(InputError, match=message):
        main_dino.parse_arguments([*VIT, "--data_path", "demo", "--epochs", "2", *flags])


def test_random_weights_are_not_worth_freezing():
    """Without --init_from a note says so."""
    flags = [*VIT, "--data_path", "demo", "--epochs", "2", "--freeze_backbone_epochs", "1"]
    assert any("stays at random weights for 1 epoch" in note for note in main_dino.parse_arguments(flags).notes)
