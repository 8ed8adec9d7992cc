"""Thousands of steps cost no memory and no file descriptors."""

from __future__ import annotations

import statistics
from functools import partial

import pytest

from tests import processes
from tests.pretraining import VIT
from tests.reliability import injection


@pytest.mark.parametrize(("steps", "growth_mib"), [(300, 8), pytest.param(2500, 1, marks=pytest.mark.full)])
def test_memory_and_descriptors_stay(small, tmp_path, steps, growth_mib):
    """Less than 1 MiB in 1,000 steps, after the first 500, with loader workers, saves, evaluations, logs; descriptors
    constant at the same points. The quick form takes the same numbers over 200 steps.
    """
    flags = [*VIT, "--embed_dim", 8, "--data_path", small, "--batch_size_per_gpu", 8, "--num_workers", 1]
    flags += ["--epochs", steps // 12 + 1, "--max_steps", steps, "--output_dir", tmp_path / "run"]
    flags += ["--checkpoint_every_steps", 50, "--eval_every", 4, "--nb_knn", 5, "--out_dim", 16]
    ranks = processes.start(flags, tmp_path, patch=partial(injection.note_memory, path=tmp_path / "memory", every=10))
    assert ranks.wait(timeout_s=900) == [0], ranks.text()
    lines = [tuple(map(int, line.split())) for line in (tmp_path / "memory").read_text().splitlines()]
    settled = [line for line in lines if line[0] >= min(500, steps // 3)]
    half = len(settled) // 2
    # The medians of the halves: what is held, apart from what a save or an evaluation holds for a moment.
    first, second = (statistics.median(held for _, held, _ in part) for part in (settled[:half], settled[half:]))
    per_1000 = (second - first) / 2**20 / (settled[half][0] - settled[0][0]) * 1000 if steps > 1000 else 0
    print(f"{(second - first) / 2**20:.2f} MiB between the halves, {per_1000:.2f} MiB per 1,000 steps")
    assert (per_1000 if steps > 1000 else (second - first) / 2**20) < growth_mib
    assert min(fds for *_, fds in settled[:half]) == min(fds for *_, fds in settled[half:])
    assert max(fds for *_, fds in settled[:half]) >= max(fds for *_, fds in settled[half:])
