"""Repeatable runs: seeds as a function of counters, and the version of the code."""

from __future__ import annotations

import random
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch


def fix_random_seeds(seed: int = 31) -> None:
    """Seed torch (all devices), numpy and random."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed a step's random draws from its number and the rank: torch's (drop path, dropout), numpy's (mixing)."""
    word = int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)
    torch.manual_seed(word)
    np.random.seed(word % 2**32)


def get_sha() -> str:
    """Commit, state and branch of the running code, as one line (DINO's function); an installed one has its version."""
    folder = Path(__file__).resolve().parent.parent

    def git(*command: str) -> str:
        done = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)  # an installed copy may lie inside a checkout of something else
        state = "has uncommitted changes" if git("status", "--porcelain", "--untracked-files=no") else "clean"
        return f"sha: {git('rev-parse', 'HEAD')}, status: {state}, branch: {git('rev-parse', '--abbrev-ref', 'HEAD')}"
    except (OSError, subprocess.CalledProcessError):
        return f"sha: N/A, status: {_installed() or 'not a git checkout'}, branch: N/A"


def _installed() -> str:
    """The version of the installed package, if this code is that package's."""
    try:
        return f"simpool-dino {version('simpool-dino')}, installed" if __name__.startswith("simpool_dino.") else ""
    except PackageNotFoundError:
        return ""
