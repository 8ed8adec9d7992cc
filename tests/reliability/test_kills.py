"""kill -9 at any moment: nothing that was acknowledged is lost, and the run ends as if nothing had happened."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from runtime.checkpoint import read_checkpoint, verify
from tests import processes
from tests.pretraining import assert_equal_states
from tests.reliability import injection
from tests.reliability.conftest import Whole


def assert_nothing_lost(folder: Path, acknowledged: int) -> None:
    """Every checkpoint under its name is intact, the newest is at least what was last said to be saved, and every line
    of the log is a row, each epoch once and none missing.
    """
    for path in folder.glob("checkpoint*.pth"):
        verify(path)
    if acknowledged:
        assert read_checkpoint(folder / "checkpoint.pth")["iteration"] >= acknowledged
    if (folder / "log.txt").exists():
        epochs = [json.loads(line)["epoch"] for line in (folder / "log.txt").read_text().splitlines()]
        assert epochs == list(range(len(epochs)))


def last_acknowledged(text: str) -> int:
    """The step of the last save that the run has reported; 0 for none."""
    return max([int(step) for step in re.findall(r"^saved .* at step (\d+)$", text, re.MULTILINE)], default=0)


full = [pytest.param(seed, 50, marks=pytest.mark.full) for seed in (1, 2, 3, 4)]  # 200 in all, over the test workers


@pytest.mark.parametrize(("seed", "kills"), [(0, 10), *full])
def test_killed_runs_end_as_if_they_had_not_been(whole: Whole, tmp_path, seed, kills):
    """Kills at random times and at random lines of the code that writes; then a start that is left alone."""
    draw = random.Random(seed)
    killed, runs = 0, 0
    while killed < kills or runs == 0:
        folder, acknowledged = tmp_path / f"run{runs}", 0
        while not (folder / "DONE").exists():
            flags = [*whole.flags, "--output_dir", folder, "--num_workers", draw.choice([0, 0, 1])]
            at_line, leave_alone = draw.random() < 0.5, killed >= kills
            left = 1 - acknowledged / 9  # of the run's steps: a kill after its end would be none
            line = draw.randrange(int(left * whole.lines_that_write) + 300)
            patch = partial(injection.kill_at_line_that_writes, number=line) if at_line and not leave_alone else None
            ranks = processes.start(flags, tmp_path / "output", patch=patch)
            if not at_line and not leave_alone:
                time.sleep(draw.uniform(0.1, 0.3 + 0.4 * left) * whole.duration_s)
                ranks.processes[0].kill()  # does nothing if it has ended already
            (code,) = ranks.wait()
            assert code in (0, -signal.SIGKILL), ranks.text()
            killed += code != 0
            acknowledged = max(acknowledged, last_acknowledged(ranks.text()))
            assert_nothing_lost(folder, acknowledged)
        assert_equal_states(whole.folder, folder)
        shutil.rmtree(folder)  # a third of a GB each, and there are a hundred
        runs += 1
    print(f"{killed} kills in {runs} runs")
