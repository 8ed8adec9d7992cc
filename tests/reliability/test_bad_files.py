"""Broken files and lost loader workers in runs of two processes: one meets them, all stop, nobody waits in vain."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from data.sampler import TrainSampler
from runtime.guards import EXIT_BAD_INPUT, EXIT_FAILED
from tests.patience import on_this_machine
from tests.pretraining import VIT
from tests.processes import start
from tests.reliability.test_signals import children


@pytest.fixture
def one_broken(small, tmp_path) -> Path:
    """64 images, of which the one that rank 1 alone reads, in the second step, is broken."""
    folder = tmp_path / "images"
    folder.mkdir()
    images = sorted((small / "train").rglob("*.*"))[:64]
    for i, image in enumerate(images):
        shutil.copy(image, folder / f"{i:02d}{image.suffix}")
    sampler = TrainSampler(64, 8, seed=0, rank=1, world_size=2)
    sampler.set_position(0, 1)
    _, victim = next(iter(sampler))[0]
    (target,) = folder.glob(f"{victim:02d}.*")
    target.write_bytes(target.read_bytes()[:200])
    return folder


def test_the_limit_of_bad_files_stops_every_rank(one_broken, tmp_path):
    """One rank alone meets too many bad files: both stop with code 2, and the list is printed."""
    flags = [*VIT, "--data_path", one_broken, "--batch_size_per_gpu", 8, "--epochs", 20, "--max_bad_fraction", 0]
    ranks = start([*flags, "--output_dir", tmp_path / "run"], tmp_path, world=2)
    assert ranks.wait() == [EXIT_BAD_INPUT] * 2
    assert "1 of 64 images are bad so far, more than --max_bad_fraction 0" in ranks.text(1)
    assert "another process of the run stopped it: 1 of 64 images are bad" in ranks.text(0)


def test_raising_at_a_bad_file_stops_every_rank(one_broken, tmp_path):
    """--on_bad_image raise on one rank: the file is named, and the other rank does not wait for the time-out."""
    flags = [*VIT, "--data_path", one_broken, "--batch_size_per_gpu", 8, "--epochs", 20, "--on_bad_image", "raise"]
    ranks = start([*flags, "--output_dir", tmp_path / "run"], tmp_path, world=2)
    codes = ranks.wait()
    assert codes[1] == EXIT_BAD_INPUT
    assert codes[0] != 0
    assert "is not an image in a known format" in ranks.text(1)


def test_a_killed_loader_worker_ends_the_run_within_ten_seconds(small, tmp_path):
    """The kernel kills a worker, as it does when memory runs out: a clear error, soon, on its rank and on the other."""
    flags = [*VIT, "--data_path", small, "--batch_size_per_gpu", 8, "--epochs", 9999, "--num_workers", 1]
    ranks = start([*flags, "--eval_every", 0, "--output_dir", tmp_path / "run"], tmp_path, world=2)
    ranks.wait_for("epoch 0")
    began = time.monotonic()
    os.kill(children(ranks.pids[1])[0], signal.SIGKILL)
    codes = ranks.wait()
    assert time.monotonic() - began < on_this_machine(10)
    assert codes == [EXIT_FAILED] * 2
    assert "a loader worker is gone" in ranks.text(1)
    assert "another process" in ranks.text(0)
