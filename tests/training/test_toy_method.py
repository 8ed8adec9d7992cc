"""A method of one file gets everything that the house gives: tests/training/autoencoder.py knows nothing of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from runtime.checkpoint import read_checkpoint
from runtime.distributed import leave
from runtime.guards import InputError
from tests import pretraining
from tests.patience import PATIENCE_S
from tests.processes import free_port
from tests.training import autoencoder

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["--epochs", "4", "--batch_size_per_gpu", "8", "--num_workers", "0", "--device", "cpu", "--report", "false"]


def train(*flags) -> int:
    try:
        return autoencoder.main([str(flag) for flag in (*FLAGS, *flags)])
    finally:
        leave()


def begin(folder: Path, small: Path, *flags, rank: int = 0, world: int = 1, port: int = 0) -> subprocess.Popen:
    """The program in a process of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if world > 1:
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
        env |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    command = [sys.executable, "-m", "tests.training.autoencoder", *FLAGS, "--data_path", small, "--output_dir", folder]
    return subprocess.Popen([str(word) for word in (*command, *flags)], cwd=ROOT, env=env, stdout=subprocess.DEVNULL)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(folder / "checkpoint.pth")["student"]


def test_it_trains_logs_and_saves(small, tmp_path):
    """The loss falls; log.txt, the checkpoint and the marker are there, with the method's name."""
    assert train("--data_path", small, "--output_dir", tmp_path) == 0
    losses = [json.loads(line)["train_loss"] for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert losses[-1] < 0.9 * losses[0]
    content = read_checkpoint(tmp_path / "checkpoint.pth")
    assert content["config"]["method"] == "autoencoder"
    assert "teacher" not in content
    assert (tmp_path / "DONE").exists()


def test_killed_and_continued_it_ends_in_the_same_bits(small, tmp_path):
    """kill -9 after the first save, the same command again: the weights of an undisturbed run."""
    assert train("--data_path", small, "--output_dir", tmp_path / "whole") == 0
    folder = tmp_path / "killed"
    process = begin(folder, small, "--checkpoint_every_steps", 1)
    deadline = time.monotonic() + PATIENCE_S
    while not (folder / "checkpoint.pth").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert train("--data_path", small, "--output_dir", folder) == 0
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(folder)[name]), name


def test_two_ranks_are_one_process(small, tmp_path):
    """The same global batch on two processes gives the same weights, to float32's rounding."""
    assert train("--data_path", small, "--output_dir", tmp_path / "one", "--global_batch_size", 16) == 0
    port = free_port()
    ranks = [
        begin(tmp_path / "two", small, "--global_batch_size", 16, rank=rank, world=2, port=port) for rank in (0, 1)
    ]
    assert [process.wait() for process in ranks] == [0, 0]
    for name, value in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], value, rtol=1e-4, atol=1e-5)


def test_its_run_is_not_continued_by_another_method(small, tmp_path):
    """The error names both methods and the remedy."""
    assert train("--data_path", small, "--output_dir", tmp_path) == 0
    flags = ["--img_size", "16", "--patch_size", "8", "--embed_dim", "24", "--depth", "1", "--num_heads", "2"]
    flags += ["--local_crops_number", "0", "--out_dim", "8", "--batch_size_per_gpu", "8", "--num_workers", "0"]
    with pytest.raises(InputError, match="autoencoder, which dino can't continue"):
        pretraining.train(*flags, "--data_path", small, "--output_dir", tmp_path)
