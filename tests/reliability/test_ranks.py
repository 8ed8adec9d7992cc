"""Several processes: one that dies or hangs, and a number of them that changes."""

from __future__ import annotations

import os
import signal
import time
from functools import partial

import pytest

from tests import processes
from tests.patience import PATIENCE_S, on_this_machine
from tests.pretraining import VIT, rows
from tests.reliability import injection
from tests.reliability.conftest import Whole
from tests.reliability.test_signals import assert_gone, children
from tests.tensorboard_tags import scalars


def loader_workers(ranks: processes.Ranks) -> list[int]:
    """One of each rank, once both are there."""
    deadline = time.monotonic() + PATIENCE_S
    while len(found := [worker for pid in ranks.pids for worker in children(pid)]) != 2:
        assert time.monotonic() < deadline, found
        time.sleep(0.01)
    return found


@pytest.mark.parametrize(
    ("number", "victim"),
    [
        (signal.SIGKILL, 0),
        pytest.param(signal.SIGKILL, 1, marks=pytest.mark.full),
        pytest.param(signal.SIGSTOP, 0, marks=pytest.mark.full),
        (signal.SIGSTOP, 1),
    ],
)
def test_a_dead_or_hung_rank_ends_the_others(whole: Whole, tmp_path, number, victim):
    """Killed or frozen in the middle of a run: the other says so within --timeout and exits with 1, no process of the
    two stays behind, and the run goes on from its last save.
    """
    folder = tmp_path / "run"
    flags = [*whole.flags, "--global_batch_size", 16, "--num_workers", 1, "--output_dir", folder]
    slow = partial(injection.slow_steps, first=2, seconds=0.3)
    ranks = processes.start([*flags, "--timeout", on_this_machine(8)], tmp_path, world=2, patch=slow)
    ranks.wait_for("at step 2")
    workers = loader_workers(ranks)
    os.kill(ranks.pids[victim], number)
    other = ranks.processes[1 - victim]
    other.join(PATIENCE_S)
    assert other.exitcode == 1, ranks.text()
    assert f"process {1 - victim} " in ranks.text(1 - victim)
    assert "waited in vain for another process" in ranks.text(1 - victim)
    ranks.processes[victim].kill()
    ranks.wait()
    assert_gone(workers)
    processes.run(flags, tmp_path, world=2)
    assert [row["epoch"] for row in rows(folder)] == [0, 1, 2]


def test_the_number_of_processes_may_change(small, tmp_path):
    """1 -> 2 -> 4 -> 1 processes at one global batch over 50 steps: the loss of every step within 1e-5 of the run of
    one process.
    """
    flags = [*VIT, "--data_path", small, "--epochs", 9, "--eval_every", 0, "--global_batch_size", 16, "--lr", 0.005]
    processes.run([*flags, "--output_dir", tmp_path / "one", "--max_steps", 50], tmp_path)
    for world, steps in ((1, 12), (2, 25), (4, 38), (1, 50)):
        processes.run([*flags, "--output_dir", tmp_path / "many", "--max_steps", steps], tmp_path, world=world)
    for tag in ("train/loss", "train/entropy"):
        one, many = (scalars(tmp_path / name, tag) for name in ("one", "many"))
        assert list(one) == list(many) == list(range(50))
        for step, value in one.items():
            assert many[step] == pytest.approx(value, rel=1e-5), f"{tag}, step {step}"
    assert abs(one[49] - one[0]) > 0.01, "the run must move, or equality means nothing"
