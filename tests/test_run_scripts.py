"""The published recipes' scripts, printed and not run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "run_scripts"
EXPECTED = {
    "vit_small_official": {"arch": "vit_small", "mode": "official", "gamma": "auto", "global_batch_size": "800"},
    "vit_small_simpool": {"arch": "vit_small", "mode": "simpool", "gamma": "auto", "epochs": "100", "lr": "0.0005"},
    "vit_small_simpool_no_gamma": {"mode": "simpool", "gamma": "None", "clip_grad": "0.0"},
    "vit_small_simpool_300ep": {"mode": "simpool", "epochs": "300"},
    "vit_small_simpool_imagenet20": {"mode": "simpool", "subset": "260"},
    "resnet50_official": {"arch": "resnet50", "mode": "official", "optimizer": "lars", "global_batch_size": "1440"},
    "resnet50_simpool": {"arch": "resnet50", "mode": "simpool", "lr": "0.3", "out_dim": "60000"},
    "resnet50_simpool_no_gamma": {"arch": "resnet50", "gamma": "None"},
    "convnext_small_official": {"arch": "convnext_small", "mode": "official", "global_batch_size": "480"},
    "convnext_small_simpool": {"arch": "convnext_small", "mode": "simpool", "clip_grad": "0.3", "lr": "0.001"},
    "convnext_small_simpool_no_gamma": {"arch": "convnext_small", "gamma": "None", "drop_path_rate": "0.4"},
}


def run(script: str, *flags: str, **env: str) -> subprocess.CompletedProcess:
    """A script under this Python, which the scripts take as the active environment."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(SCRIPTS / f"{script}.sh"), *flags], capture_output=True, text=True, timeout=120,
        env={**os.environ, "PATH": path, "NPROC": "1", **env}, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("script", EXPECTED)
def test_a_recipe_resolves_to_the_published_values(script):
    """--dry_run prints the configuration, which is the published one, and trains nothing."""
    done = run(script, "--dry_run", DATA="demo")
    assert done.returncode == 0, done.stderr
    values = {line.split()[0]: line.split()[1] for line in done.stdout.splitlines() if len(line.split()) > 1}
    assert {key: values[key] for key in EXPECTED[script]} == EXPECTED[script]


def test_every_recipe_is_tested():
    """No script that calls `recipe` is missing above."""
    scripts = {path.stem for path in SCRIPTS.glob("*.sh") if "\nrecipe " in path.read_text()}
    assert scripts == set(EXPECTED)


def test_without_data_it_says_what_to_set():
    """A script without DATA ends at once with the remedy."""
    done = run("vit_small_simpool", DATA="")
    assert done.returncode == 2
    assert "set DATA" in done.stderr
