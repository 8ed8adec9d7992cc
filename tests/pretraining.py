"""Tiny runs of the pretraining program on real images: their flags, and what two runs have in common."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import torch

import main_dino
from runtime.checkpoint import read_checkpoint
from runtime.distributed import leave

TINY = [
    "--patch_size", "8", "--embed_dim", "24", "--depth", "2", "--num_heads", "2", "--img_size", "32",
    "--local_crops_size", "16", "--local_crops_number", "2", "--out_dim", "64", "--batch_size_per_gpu", "16",
    "--matmul_precision", "highest", "--num_workers", "0", "--warmup_epochs", "1",
    "--warmup_teacher_temp_epochs", "1", "--drop_path_rate", "0", "--report", "false",
]  # fmt: skip
VIT = ["--arch", "vit_small", "--mode", "simpool", *TINY]

FAMILIES = {
    "vit": VIT,
    "vit_official": ["--arch", "vit_small", *TINY],
    # The standard stem makes them 16 times faster; tests of the small one ask for it.
    "resnet": ["--arch", "resnet18", "--stem", "standard", "--mode", "simpool", "--img_size", "32",
               "--local_crops_size", "32", "--local_crops_number", "1", "--out_dim", "64", "--batch_size_per_gpu", "16",
               "--num_workers", "0", "--matmul_precision", "highest", "--report", "false"],
    "convnext": ["--arch", "convnext_tiny", "--mode", "simpool", "--img_size", "32", "--local_crops_size", "32",
                 "--local_crops_number", "0", "--out_dim", "64", "--batch_size_per_gpu", "8", "--num_workers", "0",
                 "--matmul_precision", "highest", "--report", "false"],
    "timm": ["--arch", "resnet10t", "--stem", "standard", "--mode", "simpool", "--img_size", "32",
             "--local_crops_size", "32", "--local_crops_number", "0", "--out_dim", "64", "--batch_size_per_gpu", "16",
             "--num_workers", "0", "--report", "false"],
}  # fmt: skip


def train(*flags, program: ModuleType = main_dino) -> int:
    """A training program in this process."""
    try:
        return program.main([str(flag) for flag in flags])
    finally:
        leave()


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def assert_equal_states(one: Path, other: Path) -> None:
    """Two runs ended bit for bit alike: models, optimizer, centers, counters, log lines but for their timings."""
    a, b = (read_checkpoint(folder / "checkpoint.pth") for folder in (one, other))
    assert a.keys() == b.keys()
    for key in {"student", "teacher", "dino_loss", "ibot_loss"} & a.keys():
        assert a[key].keys() == b[key].keys()
        for name in a[key]:
            assert torch.equal(a[key][name], b[key][name]), f"{key} {name}"
    for i, state in a["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(b["optimizer"]["state"][i][name]))
    assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
    assert (a["epoch"], a["iteration"]) == (b["epoch"], b["iteration"])
    timings = ("time_s", "images_per_s", "data_wait")
    for mine, theirs in zip(rows(one), rows(other), strict=True):
        assert {k: v for k, v in mine.items() if k not in timings} == {
            k: v for k, v in theirs.items() if k not in timings
        }
