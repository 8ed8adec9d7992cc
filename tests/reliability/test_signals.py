"""SIGTERM, SIGUSR1 and SIGINT at any moment: all ranks stop at the same step, saved, and the scheduler can tell."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from runtime.checkpoint import read_checkpoint
from tests import processes
from tests.pretraining import assert_equal_states, rows
from tests.reliability import injection
from tests.reliability.conftest import Whole

PREEMPTED = 75


@pytest.fixture
def job(tmp_path) -> tuple[dict[str, str], Path]:
    """Environment of a SLURM job with an `scontrol` that only notes what it is asked; and its notes."""
    script, notes = tmp_path / "bin" / "scontrol", tmp_path / "requeued"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\n[ "$1" = show ] && echo JobState=RUNNING || echo "$@" >> {notes}\n')
    script.chmod(0o755)
    notes.touch()
    return {"SLURM_JOB_ID": "4242", "PATH": f"{script.parent}:{os.environ['PATH']}"}, notes


def start_armed(flags: list, folder: Path, world: int, env: dict[str, str]) -> processes.Ranks:
    """Start a run and wait until all its ranks catch signals."""
    for old in [*folder.glob("armed-*"), *folder.glob("steps-*")]:
        old.unlink()
    ranks = processes.start(flags, folder, world, env=env, patch=partial(injection.note_steps, folder=folder))
    deadline = time.monotonic() + 60
    while len(list(folder.glob("armed-*"))) < world:
        assert time.monotonic() < deadline, ranks.text()
        time.sleep(0.002)
    return ranks


def steps_of(folder: Path, rank: int) -> list[tuple[int, float]]:
    """(step, when it began) of one start of the run."""
    path = folder / f"steps-{rank}"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(int(line.split()[0]), float(line.split()[1])) for line in lines]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("moments", [5, pytest.param(50, marks=pytest.mark.full)])
def test_preempted_at_any_moment(whole: Whole, tmp_path, job, world, moments):
    """TERM or USR1, to one rank or to all, once or repeated: at most one further step, the same on all ranks; the
    marker, code 75, one requeue each time; and the runs end as the one that was left alone.
    """
    env, notes = job
    draw = random.Random(100 * world + moments)
    met, runs = 0, 0
    while met < moments or runs == 0:
        folder, reached = tmp_path / f"run{runs}", 0
        flags = [*whole.flags, "--global_batch_size", 16, "--output_dir", folder, "--requeue", "true"]
        while not (folder / "DONE").exists():
            requeued = len(notes.read_text().splitlines())
            ranks = start_armed(flags, tmp_path, world, env)
            if met < moments:
                # Within what is left of the run; its start, some part of the duration, is over.
                time.sleep(draw.uniform(0, 0.2) * (1 - reached / 9) * whole.duration_s)
            number = draw.choice([signal.SIGTERM, signal.SIGUSR1])
            targets = draw.choice([ranks.processes, [draw.choice(ranks.processes)]])
            sent = time.monotonic()
            for process in targets * draw.choice([1, 2]) if met < moments else []:
                if process.is_alive():
                    os.kill(process.pid, number)
            codes = ranks.wait()
            assert codes in ([PREEMPTED] * world, [0] * world), ranks.text()
            if codes[0] == 0:
                assert (folder / "DONE").exists()
                continue
            met += 1
            marker = json.loads((folder / "PREEMPTED").read_text())
            reached = marker["iteration"]
            assert not (folder / "DONE").exists()
            assert read_checkpoint(folder / "checkpoint.pth")["iteration"] == marker["iteration"]
            for rank in range(world):
                taken = steps_of(tmp_path, rank)
                assert taken[-1][0] + 1 == marker["iteration"], "ranks stopped at different steps"
                # One that had been decided on when the signal came may carry a later time; then one more at most.
                assert sum(began > sent for _, began in taken) <= 2
            assert notes.read_text().splitlines()[requeued:] == ["requeue 4242"]
        assert not (folder / "PREEMPTED").exists()
        if world == 1:
            assert_equal_states(whole.folder, folder)
        assert [row["epoch"] for row in rows(folder)] == [0, 1, 2]
        shutil.rmtree(folder)
        runs += 1


def children(pid: int) -> list[int]:
    """Processes whose parent is `pid`."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rsplit(")", 1)[1].split()[1]) == pid:
                found.append(int(stat.parent.name))
        except OSError:
            continue
    return found


def assert_gone(pids: list[int], within_s: float = 15) -> None:
    deadline = time.monotonic() + within_s
    while alive := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, f"still there: {alive}"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_the_whole_group_spares_the_loader(whole: Whole, tmp_path, number):
    """Schedulers and Ctrl-C signal every process of the group: loader workers stay until the step is saved."""
    folder = tmp_path / "run"
    flags = [*whole.flags, "--num_workers", 2, "--output_dir", folder]
    ranks = processes.start(flags, tmp_path, patch=injection.own_group)
    ranks.wait_for("saved")
    workers = children(ranks.pids[0])
    assert len(workers) >= 2
    os.killpg(ranks.pids[0], number)
    assert ranks.wait() == [PREEMPTED], ranks.text()
    assert "worker" not in ranks.text().split("saved")[-1]
    assert_gone(workers)
    processes.run(flags, tmp_path)
    assert_equal_states(whole.folder, folder)


def test_a_second_interrupt_aborts_at_once(whole: Whole, tmp_path):
    """Ctrl-C twice: no step is finished; the last save is whole and the run goes on from it."""
    folder = tmp_path / "run"
    patch = partial(injection.slow_steps, first=3, seconds=600)
    flags = [*whole.flags, "--output_dir", folder]
    ranks = processes.start(flags, tmp_path, patch=patch)
    ranks.wait_for("at step 3")
    time.sleep(0.5)
    for _ in range(2):
        os.kill(ranks.pids[0], signal.SIGINT)
        time.sleep(0.1)
    assert ranks.wait(timeout_s=10) == [-signal.SIGINT]
    processes.run(flags, tmp_path)
    assert_equal_states(whole.folder, folder)


def test_a_killed_run_leaves_no_worker_behind(whole: Whole, tmp_path):
    """kill -9 of the training process ends its loader workers too."""
    ranks = processes.start([*whole.flags, "--num_workers", 2, "--output_dir", tmp_path / "run"], tmp_path)
    ranks.wait_for("saved")
    workers = children(ranks.pids[0])
    ranks.processes[0].kill()
    ranks.wait()
    assert_gone(workers)
