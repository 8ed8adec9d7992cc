"""Seeds, and the version of the code."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess

import torch

from runtime import reproduce
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


def test_an_installed_copy_does_not_report_the_checkout_around_it(tmp_path):
    """A file that git does not track, as in a virtual environment inside a project, has no commit."""
    where = tmp_path / "project" / ".venv" / "runtime"
    where.mkdir(parents=True)
    copy = shutil.copy(reproduce.__file__, where)
    commit = ["-c", "user.name=x", "-c", "user.email=x", "commit", "-q", "--allow-empty", "-m", "x"]
    for command in (["init", "-q"], commit):
        subprocess.run(["git", *command], cwd=tmp_path / "project", check=True)
    spec = importlib.util.spec_from_file_location("simpool_dino.runtime.reproduce", copy)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.get_sha() == "sha: N/A, status: not a git checkout, branch: N/A"
