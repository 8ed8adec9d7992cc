"""Seeds, and the version of the code."""

from __future__ import annotations

import torch

from runtime.reproduce import fix_random_seeds, get_sha, seed_step


def test_seeds():
    """A step's draws depend on seed, step and rank, on nothing else."""
    draws = []
    for key in ((0, 1, 0), (0, 1, 0), (0, 2, 0), (0, 1, 1), (1, 1, 0)):
        torch.rand(3)
        seed_step(*key)
        draws.append(torch.rand(1).item())
    assert draws[0] == draws[1]
    assert len(set(draws)) == 4
    fix_random_seeds(3)


def test_sha():
    """One line, in a checkout or not."""
    assert get_sha().startswith("sha: ")
