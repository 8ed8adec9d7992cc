"""The recorded runs: equal bits on the machine that recorded them, the same first losses anywhere, exact resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import record
from tests.pretraining import train

GOLDEN = json.loads(record.GOLDEN.read_text())
# bf16 rounds to 8 bits, and other processors add up in another order; float32 differs by its own rounding.
TOLERANCE = {"vit_bf16": 2e-2}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return record.write_images(tmp_path_factory.mktemp("recorded") / "images")


@pytest.mark.parametrize("name", sorted(GOLDEN[0]["runs"]))
def test_recorded_runs(images, tmp_path, name):
    """Undisturbed or stopped in the middle, 20 steps end in the same bits: on a record's machine, in those of it."""
    flags = record.flags_of(name, images)
    assert train(*flags, "--output_dir", tmp_path / "whole") == 0
    assert train(*flags, "--output_dir", tmp_path / "parts", "--max_steps", record.MIDDLE) == 0
    assert train(*flags, "--output_dir", tmp_path / "parts") == 0
    found = record.summary(tmp_path / "whole")
    assert record.state_hash(tmp_path / "parts" / "checkpoint.pth") == found["sha256"]
    here = record.machine()
    for recorded in GOLDEN:
        expected = recorded["runs"][name]
        if recorded["machine"] == here:
            assert found == expected
        assert found["losses"][:3] == pytest.approx(expected["losses"][:3], rel=TOLERANCE.get(name, 1e-4))


def test_another_state_has_another_hash(tmp_path):
    """One changed bit of one weight changes the hash; the order of the names does not."""
    import torch

    content = {"student": {"a": torch.zeros(3), "b": torch.ones(2)}, "teacher": {}, "dino_loss": {}, "optimizer": {}}
    content |= {"epoch": 1, "iteration": 2}
    hashes = []
    reordered = {"b": torch.ones(2), "a": torch.zeros(3)}
    changed = {"a": -torch.zeros(3), "b": torch.ones(2)}
    for change in ({}, {"student": reordered}, {"student": changed}):
        torch.save(content | change, tmp_path / "state.pth")
        hashes.append(record.state_hash(tmp_path / "state.pth"))
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_run_that_fails_is_an_error(images, tmp_path, monkeypatch):
    """The output of the program is in the message."""
    monkeypatch.setitem(record.RUNS, "broken", (["--no_such_flag"], 1))
    with pytest.raises(RuntimeError, match="no_such_flag"):
        record.run("broken", tmp_path, record.ROOT, images)
