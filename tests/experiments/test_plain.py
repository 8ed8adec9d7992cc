"""The plain side of the comparison with the published algorithm: it trains, continues exactly and is read as ours."""

from __future__ import annotations

import json

import pytest
import torch

from evaluation.models import load_checkpoint_model
from experiments.published import plain
from runtime.guards import InputError
from tests.pretraining import VIT


def flags(small, folder, epochs):
    return [*VIT, "--data_path", str(small), "--output_dir", str(folder), "--epochs", str(epochs), "--device", "cpu",
            "--num_workers", "0", "--subset", "8", "--batch_size_per_gpu", "8"]  # fmt: skip


def test_it_continues_after_an_epoch_as_if_nothing_had_happened(small, tmp_path, monkeypatch):
    """Broken off after one of two epochs and started again, it ends with the weights of a run in one go."""
    assert plain.main(flags(small, tmp_path / "whole", 2)) == 0
    saves, save = [], plain.save_checkpoint

    def save_once(content, path):
        save(content, path)
        saves.append(path)
        if len(saves) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(plain, "save_checkpoint", save_once)
    with pytest.raises(KeyboardInterrupt):
        plain.main(flags(small, tmp_path / "broken", 2))
    assert plain.main(flags(small, tmp_path / "broken", 2)) == 0
    whole, broken = (torch.load(tmp_path / name / "checkpoint.pth", weights_only=True) for name in ("whole", "broken"))
    for part in ("student", "teacher"):
        assert all(torch.equal(value, broken[part][name]) for name, value in whole[part].items())
    rows = [json.loads(line) for line in (tmp_path / "whole" / "log.txt").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1]
    assert (tmp_path / "broken" / "DONE").exists()
    model = load_checkpoint_model(tmp_path / "whole" / "checkpoint.pth").model
    assert torch.isfinite(model(torch.randn(1, 3, 32, 32))).all()


def test_what_it_does_not_have_is_refused(small, tmp_path):
    """Half precision and accumulation would make it another algorithm than the one compared with."""
    for more in (["--amp", "bf16"], ["--grad_accum", "2"]):
        with pytest.raises(InputError, match=more[0]):
            plain.main([*flags(small, tmp_path, 1), *more])
