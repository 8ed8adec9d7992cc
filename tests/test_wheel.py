"""The wheel, built from the checkout and installed into an environment that has nothing else of ours."""

from __future__ import annotations

import json
import os
import site
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

import console
from tests.mutate import copy_tree
from tests.pretraining import TINY, VIT

ROOT = Path(__file__).resolve().parents[1]
PROBE = ["--data_path", "demo", "--subset", "6", "--num_workers", "0"]
MODEL = [*VIT[:4], *TINY[:10]]  # architecture, mode and shape
IMPORTED = "import sys; print(*sorted(name for name in sys.modules if '.' not in name))"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder of an environment's programs; torch and the like are those of the environment of these tests."""
    folder = tmp_path_factory.mktemp("wheel")
    copy_tree(ROOT, folder / "checkout")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", ".", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", str(folder)]
    subprocess.run(build, cwd=folder / "checkout", check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], check=True)
    python = str(folder / "env" / "bin" / "python")
    install = ["install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([*pip, "--python", python, *install], cwd=folder, check=True)
    (packages,) = (folder / "env").glob("lib/python*/site-packages")
    assert {path.name.split("-")[0] for path in packages.iterdir()} == {"simpool_dino"}
    (packages / "others.pth").write_text("\n".join(site.getsitepackages()))
    return folder / "env" / "bin"


def run(installed: Path, folder: Path, *command: str, code: int = 0) -> str:
    """What a command prints, run in a folder that holds nothing of ours, as after a login."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment = {**kept, "PATH": f"{installed}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.full
def test_the_quick_start_in_an_installed_package(installed, tmp_path):
    """Pretraining, k-NN, probe and attention maps, then an export: each command suggests the next by its own name."""
    command = partial(run, installed, tmp_path, "simpool-dino")
    command("knn", *MODEL, *PROBE, "--nb_knn", "5", "--output_dir", "before")
    flags = [*MODEL, *TINY[10:-2], "--data_path", "demo", "--subset", "6", "--epochs", "1", "--num_workers", "2"]
    shown = command("pretrain", *flags, "--output_dir", "out")
    assert "simpool-dino knn --pretrained_weights out/checkpoint.pth" in shown
    assert "sha: N/A, status: simpool-dino 0.1.0, installed" in shown
    assert (tmp_path / "out" / "DONE").exists()
    assert (tmp_path / "out" / "report.html").exists()
    weights = ["--pretrained_weights", "out/checkpoint.pth"]
    command("knn", *weights, *PROBE, "--nb_knn", "5", "--output_dir", "after")
    command("linear", *weights, *PROBE, "--batch_size_per_gpu", "16", "--epochs", "1", "--output_dir", "after")
    assert json.loads((tmp_path / "after" / "eval_linear.json").read_text())["results"]
    command("attention", *weights, "--data_path", "demo", "--num_images", "1", "--untrained", "--output_dir", "maps")
    assert (tmp_path / "maps" / "grid.png").exists()
    command("export", *weights, "--format", "torch", "--output", "hub/model.pt")
    assert "from simpool_dino import portable" in (tmp_path / "hub" / "MODEL_CARD.md").read_text()
    load = f"from simpool_dino import portable; portable.load('hub/model.pt'); {IMPORTED}"
    loaded = set(run(installed, tmp_path, "python", "-W", "ignore", "-c", load).split())
    assert "simpool_dino" in loaded
    assert not loaded & {"utils", "data", "tools", "runtime", "evaluation", "training", "backbones", "sp", "optim"}


@pytest.mark.full
def test_every_command_shows_its_own_name(installed, tmp_path):
    """--help begins with the command, and a wrong flag is one line and exit code 2."""
    for name in console.COMMANDS:
        assert run(installed, tmp_path, "simpool-dino", name, "--help").startswith(f"usage: simpool-dino {name} ")
    assert run(installed, tmp_path, "simpool-dino", "knn", "--x", code=2).startswith("error: unknown flag --x")
    assert run(installed, tmp_path, "simpool-dino", "check", "--data_path", "demo:32", "--num_workers", "2")


@pytest.mark.full
def test_two_processes_of_an_installed_program(installed, tmp_path):
    """torchrun starts the module, and both processes share the run."""
    torchrun = ["python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    flags = [*VIT, "--data_path", "demo:32", "--subset", "6", "--max_steps", "2", "--output_dir", "out"]
    shown = run(installed, tmp_path, *torchrun, "simpool_dino.main_dino", *flags)
    assert "2 process" in shown
    assert (tmp_path / "out" / "checkpoint.pth").exists()
