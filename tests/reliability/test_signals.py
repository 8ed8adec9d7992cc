"""SIGTERM, SIGUSR1 and SIGINT at any moment: all ranks stop at the same step, saved, and the scheduler can tell."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from runtime.checkpoint import read_checkpoint
from tests import processes
from tests.patience import PATIENCE_S, on_this_machine
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
    wait_until(lambda: len(list(folder.glob("armed-*"))) == world, ranks)
    return ranks


def wait_until(true: Callable[[], bool], ranks: processes.Ranks) -> None:
    """Wait for something that a run does, or for its end."""
    deadline = time.monotonic() + PATIENCE_S
    while not true() and ranks.processes[0].is_alive():
        assert time.monotonic() < deadline, ranks.text()
        time.sleep(0.001)


def steps_of(folder: Path, rank: int) -> list[tuple[int, float]]:
    """(step, when it was asked before it whether to stop) of one start of the run."""
    path = folder / f"steps-{rank}"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(int(line.split()[0]), float(line.split()[1])) for line in lines]


def wait_for_a_moment(draw: random.Random, ranks: processes.Ranks, folder: Path, per_step_s: float) -> None:
    """Let the run, which catches signals by now, come to one of its next steps, or to none, and a little further."""
    count = draw.randrange(4)
    wait_until(lambda: len(steps_of(folder, 0)) >= count, ranks)
    time.sleep(draw.uniform(0, 1.5) * per_step_s)


def send(draw: random.Random, ranks: processes.Ranks) -> tuple[int, float]:
    """TERM or USR1 to one rank or to all, once or twice; returns which rank was the first to get it, and by when."""
    number, world = draw.choice([signal.SIGTERM, signal.SIGUSR1]), len(ranks.processes)
    targets = draw.choice([range(world), [draw.randrange(world)]])
    sent = 0.0
    for rank in [*targets] * draw.choice([1, 2]):
        if ranks.processes[rank].is_alive():
            os.kill(ranks.pids[rank], number)
        sent = sent or time.monotonic()
    return targets[0], sent


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
        folder = tmp_path / f"run{runs}"
        flags = [*whole.flags, "--global_batch_size", 16, "--output_dir", folder, "--requeue", "true"]
        while not (folder / "DONE").exists():
            requeued = len(notes.read_text().splitlines())
            ranks, first, sent = start_armed(flags, tmp_path, world, env), 0, math.inf
            if met < moments:
                wait_for_a_moment(draw, ranks, tmp_path, whole.duration_s / 9)
                first, sent = send(draw, ranks)
            codes = ranks.wait()
            assert codes in ([PREEMPTED] * world, [0] * world), ranks.text()
            if codes[0] == 0:  # the signal came after the last step, or none did
                assert (folder / "DONE").exists()
                continue
            met += 1
            marker = json.loads((folder / "PREEMPTED").read_text())
            assert not (folder / "DONE").exists()
            assert read_checkpoint(folder / "checkpoint.pth")["iteration"] == marker["iteration"]
            taken = [steps_of(tmp_path, rank) for rank in range(world)]
            assert len({tuple(step for step, _ in own) for own in taken}) == 1, "ranks stopped at different steps"
            assert all(own[-1][0] + 1 == marker["iteration"] for own in taken if own)
            assert sum(asked > sent for _, asked in taken[first]) <= 1
            assert notes.read_text().splitlines()[requeued:] == ["requeue 4242"]
        assert not (folder / "PREEMPTED").exists()
        if world == 1:
            assert_equal_states(whole.folder, folder)
        assert [row["epoch"] for row in rows(folder)] == [0, 1, 2]
        shutil.rmtree(folder)
        runs += 1
    print(f"{met} signals in {runs} runs")


@pytest.mark.parametrize("world", [1, 2])
def test_a_signal_breaks_an_evaluation_off(whole: Whole, tmp_path, world):
    """No scheduler waits for an evaluation: all ranks give it up, no step is taken, and it is made when they go on."""
    folder = tmp_path / "run"
    flags = [*whole.flags, "--global_batch_size", 16, "--output_dir", folder]
    ranks = processes.start(flags, tmp_path, world, patch=partial(injection.slow_evaluation, seconds=0.5))
    ranks.wait_for("evaluating", rank=world - 1)
    os.kill(ranks.pids[world - 1], signal.SIGUSR1)
    assert ranks.wait() == [PREEMPTED] * world, ranks.text()
    assert "evaluation of epoch 0 was interrupted" in ranks.text(0)
    assert ranks.text(0).count("at step 3") == 1, "what was saved before the evaluation was saved again"
    assert json.loads((folder / "PREEMPTED").read_text())["iteration"] == 3
    assert not (folder / "log.txt").exists() or rows(folder) == []
    processes.run(flags, tmp_path, world)
    if world == 1:
        assert_equal_states(whole.folder, folder)
    assert [len(row["k-NN"]) for row in rows(folder)] == [1, 1, 1]


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
    deadline = time.monotonic() + on_this_machine(within_s)
    while alive := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, f"still there: {alive}"
        time.sleep(0.05)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.full), signal.SIGINT]
)
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
    assert ranks.wait(timeout_s=500) == [-signal.SIGINT]
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
