"""A short real run, whole: what every interrupted one must end as."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests import processes
from tests.pretraining import VIT
from tests.reliability import injection


@dataclass
class Whole:
    """An uninterrupted run."""

    flags: list[str]  # without --output_dir
    folder: Path
    duration_s: float
    lines_that_write: int


@pytest.fixture(scope="session")
def whole(small, tmp_path_factory) -> Whole:
    """Three epochs of three steps, a save at every step, evaluations, epochs kept for good."""
    flags = [*VIT, "--data_path", small, "--subset", 24, "--epochs", 3, "--eval_every", 1, "--nb_knn", 5]
    flags = [str(flag) for flag in [*flags, "--checkpoint_every_steps", 1, "--saveckp_freq", 2]]
    folder = tmp_path_factory.mktemp("whole")
    count = partial(injection.count_lines_that_write, path=folder / "lines")
    processes.run([*flags, "--output_dir", folder / "counted"], folder, patch=count)
    begin = time.monotonic()  # the first run had to start the process that the others are forked from
    processes.run([*flags, "--output_dir", folder / "run"], folder)
    duration_s = time.monotonic() - begin
    return Whole(flags, folder / "run", duration_s, int((folder / "lines").read_text()))
