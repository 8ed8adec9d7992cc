"""The run's checkpoints: rotation, failure, fall-back."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from runtime import saver as saver_module
from runtime.checkpoint import read_checkpoint
from runtime.guards import InputError, SaveError
from runtime.saver import CheckpointSaver, find_checkpoint, to_host
from tests.patience import PATIENCE_S


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def save_steps(folder: Path, steps: list[int], keep: int = 2, **kwargs) -> list[str]:
    said: list[str] = []
    saver = CheckpointSaver(folder, keep, 5, said.append)
    for step in steps:
        saver.save({"iteration": step, "w": torch.full((10,), float(step))}, step, **kwargs)
    saver.wait()
    return said


def test_newest_is_checkpoint_pth_and_old_ones_go(tmp_path):
    """`checkpoint.pth` is the newest; keep_checkpoints step files stay; each save was announced."""
    said = save_steps(tmp_path, [1, 2, 3, 4])
    assert read_checkpoint(tmp_path / "checkpoint.pth")["iteration"] == 4
    assert names(tmp_path) == ["checkpoint.pth", "checkpoint_step00000003.pth", "checkpoint_step00000004.pth"]
    assert len(said) == 4


def test_kept_epochs_are_never_pruned(tmp_path):
    """A checkpointNNNN.pth outlives the step file that it came from."""
    save_steps(tmp_path, [10], keep_as="checkpoint0020.pth")
    save_steps(tmp_path, [11, 12, 13])
    assert read_checkpoint(tmp_path / "checkpoint0020.pth")["iteration"] == 10


def test_what_is_saved_is_the_state_at_the_call(tmp_path):
    """Training may change its tensors the moment `save` returns."""
    weight = torch.zeros(1000)
    saver = CheckpointSaver(tmp_path, 2, 5, lambda _: None)
    saver.save({"w": weight, "nested": [(weight,)]}, 1)
    weight.fill_(7)
    saver.wait()
    content = read_checkpoint(tmp_path / "checkpoint.pth")
    assert content["w"].sum() == 0
    assert content["nested"][0][0].sum() == 0


def test_training_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    """`save` returns while the disk is still at work; the next save waits for it; "saved" is said after it."""
    disk, said, real = threading.Event(), [], saver_module.save_checkpoint

    def slow(content, path):
        assert disk.wait(PATIENCE_S)
        real(content, path)

    monkeypatch.setattr(saver_module, "save_checkpoint", slow)
    saver = CheckpointSaver(tmp_path, 2, 5, said.append)
    saver.save({"iteration": 1}, 1)
    assert said == []
    assert not (tmp_path / "checkpoint.pth").exists()
    threading.Timer(0.2, disk.set).start()
    saver.save({"iteration": 2}, 2)
    assert said[0].endswith("at step 1")
    saver.wait()
    assert said[1].endswith("at step 2")


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_newest_falls_back(tmp_path, damage):
    """A damaged newest file is named in one line and the one before it is used."""
    save_steps(tmp_path, [1, 2, 3])
    path = tmp_path / "checkpoint.pth"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes({"flip": bytes(data), "cut": bytes(data[:500]), "empty": b""}[damage])
    said: list[str] = []
    found, content = find_checkpoint(tmp_path, said.append)
    assert content["iteration"] == 2
    assert found.name == "checkpoint_step00000002.pth"
    assert len(said) == 1
    assert "checkpoint.pth" in said[0]


def test_no_good_checkpoint_is_an_error_not_a_new_run(tmp_path):
    """A run whose checkpoints are all damaged must not silently start over."""
    save_steps(tmp_path, [1])
    (tmp_path / "checkpoint.pth").write_bytes(b"")
    with pytest.raises(InputError, match="none of the 2 checkpoints"):
        find_checkpoint(tmp_path, lambda _: None)


def test_an_empty_folder_is_a_new_run(tmp_path):
    """No checkpoint at all: nothing to continue; orphans of killed writers are swept."""
    (tmp_path / ".tmp-checkpoint.pth.abcd1234").write_bytes(b"half")
    said: list[str] = []
    assert find_checkpoint(tmp_path, said.append) is None
    assert names(tmp_path) == []
    assert "abcd1234" in said[0]


def test_a_failing_disk_is_borne_then_stops_the_run(tmp_path, monkeypatch):
    """Failed saves leave the last good file and are tried again; after max_failed_saves in a row the run stops."""
    save_steps(tmp_path, [1])
    said: list[str] = []
    saver = CheckpointSaver(tmp_path, 2, 2, said.append)
    real = saver_module.save_checkpoint

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saver_module, "save_checkpoint", full)
    saver.save({"iteration": 2}, 2)
    assert not saver.wait()
    assert read_checkpoint(tmp_path / "checkpoint.pth")["iteration"] == 1
    monkeypatch.setattr(saver_module, "save_checkpoint", real)
    saver.save({"iteration": 3}, 3)
    assert saver.wait()
    assert read_checkpoint(tmp_path / "checkpoint.pth")["iteration"] == 3
    monkeypatch.setattr(saver_module, "save_checkpoint", full)
    saver.save({"iteration": 4}, 4)
    saver.save({"iteration": 5}, 5)
    with pytest.raises(SaveError, match="No space left"):
        saver.wait()
    assert sum("not saved" in line for line in said) == 3
    assert read_checkpoint(tmp_path / "checkpoint.pth")["iteration"] == 3


def test_without_hard_links_copies_are_made(tmp_path, monkeypatch):
    """On a file system without hard links the names are copies, just as complete."""

    def no_links(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(saver_module.os, "link", no_links)
    save_steps(tmp_path, [1, 2])
    assert read_checkpoint(tmp_path / "checkpoint.pth")["iteration"] == 2


def test_to_host_shares_nothing():
    """The copy has the structure and values, and memory of its own."""
    state = {"a": [torch.ones(3), (torch.zeros(2), 5, "x", None)]}
    copy = to_host(state)
    state["a"][0].zero_()
    assert copy["a"][0].sum() == 3
    assert copy["a"][1][1:] == (5, "x", None)
