"""Thousands of steps cost no memory and no file descriptors."""

from __future__ import annotations

import ctypes
import statistics
from functools import partial
from operator import attrgetter
from typing import NamedTuple

import pytest

from tests import processes
from tests.pretraining import VIT
from tests.reliability import injection

MIB = 2**20


class Moment(NamedTuple):
    step: int
    in_use: int
    resident: int
    descriptors: int


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs the mallinfo2 of glibc 2.33")
@pytest.mark.parametrize(("steps", "settled_at"), [(300, 100), pytest.param(2500, 500, marks=pytest.mark.full)])
def test_memory_and_descriptors_stay(small, tmp_path, steps, settled_at):
    """From one half of the settled steps to the other, 1,000 steps later (100 in the quick form), with loader workers,
    saves, evaluations and logs, the memory in use grows by less than 1 MiB; descriptors are constant.
    """
    flags = [*VIT, "--embed_dim", 8, "--data_path", small, "--batch_size_per_gpu", 8, "--num_workers", 1]
    flags += ["--epochs", steps // 12 + 1, "--max_steps", steps, "--output_dir", tmp_path / "run"]
    flags += ["--checkpoint_every_steps", 50, "--eval_every", 4, "--nb_knn", 5, "--out_dim", 16]
    ranks = processes.start(flags, tmp_path, patch=partial(injection.note_memory, path=tmp_path / "memory", every=10))
    assert ranks.wait() == [0], ranks.text()
    moments = [Moment(*map(int, line.split())) for line in (tmp_path / "memory").read_text().splitlines()]
    settled = [moment for moment in moments if moment.step >= settled_at]
    halves = settled[: len(settled) // 2], settled[len(settled) // 2 :]
    in_use, resident = (
        [statistics.median(map(attrgetter(name), half)) / MIB for half in halves] for name in ("in_use", "resident")
    )
    print(f"in use: {in_use[1] - in_use[0]:+.2f} MiB; resident: {resident[1] - resident[0]:+.2f} MiB")
    assert in_use[1] - in_use[0] < 1
    assert resident[1] - resident[0] < 32, "freed memory is not used again"
    low, high = ([pick(moment.descriptors for moment in half) for half in halves] for pick in (min, max))
    assert low[0] == low[1]
    assert high[0] >= high[1]
