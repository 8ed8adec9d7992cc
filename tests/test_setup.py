"""setup.py: what is installed is one package, and everything in it finds the rest of it."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import console
from tests.mutate import copy_tree

pytest.importorskip("setuptools", minversion="77", reason="pyproject.toml names its licence as setuptools 77 reads it")
ROOT = Path(__file__).resolve().parents[1]
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")  # no main: nothing is built
packaged = SETUP["packaged"]


def test_our_imports_are_prefixed_and_others_stay():
    """Every form of import that our files use, inside functions too, and those that a docstring shows."""
    before = [
        "import portable  # ours", "import backbones", "import pretrained as _pretrained", "from data.loader import (",
        "from runtime.guards import InputError", "import torch", "from pathlib import Path",
    ]  # fmt: skip
    after = [
        "from simpool_dino import portable  # ours", "from simpool_dino import backbones",
        "from simpool_dino import pretrained as _pretrained", "from simpool_dino.data.loader import (",
        "from simpool_dino.runtime.guards import InputError", "import torch", "from pathlib import Path",
    ]  # fmt: skip
    text = '"""Use:\n\n    {}\n"""\n{}\ndef f():\n    {}\n{}\n    normalize,\n)\ndef g():\n    {}\n{}\n{}\n'
    assert packaged(text.format(*before), "a.py") == text.format(*after)


@pytest.mark.parametrize(
    "line",
    ["import torch, utils", "from tests.mutate import x", "import benchmarks.knn", "import data.loader", "import x"],
)
def test_an_unknown_import_fails_the_build(line):
    """What the wheel would not hold, a form that is not rewritten, and a package that nothing requires."""
    with pytest.raises(ImportError, match=r"a.py:1 imports \S+, which setup.py does not know"):
        packaged(line, "a.py")


def test_suggested_commands_are_those_of_the_package():
    """A help text names the console's command, and torchrun gets the module."""
    for here, there in (
        ("python main_dino.py --data_path demo", "simpool-dino pretrain --data_path demo"),
        ("as for main_dino.py", "as for simpool-dino pretrain"),
        ("torchrun --nproc_per_node 8 eval_knn.py", "torchrun --nproc_per_node 8 -m simpool_dino.eval_knn"),
        ("(python -m tools.check_images lists them)", "(simpool-dino check lists them)"),
        ("evaluation/linear.py and plain_main_dino.py", "evaluation/linear.py and plain_main_dino.py"),
    ):
        assert packaged(f"# {here}", "a.py") == f"# {there}"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The folder that a wheel is made of."""
    tree = tmp_path_factory.mktemp("copy") / "checkout"
    copy_tree(ROOT, tree)
    build = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", "../lib"]
    subprocess.run(build, cwd=tree, check=True)
    return tree.parent / "lib"


def test_the_package_holds_every_module_and_nothing_else(built):
    """No module of ours lies beside it under a name of its own, and none that the programs need is left out."""
    assert [path.name for path in built.iterdir()] == ["simpool_dino"]
    inside = {path.relative_to(built / "simpool_dino").as_posix() for path in built.rglob("*.py")}
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "*.py"], cwd=ROOT, capture_output=True)
    left_out = ("tests/", "benchmarks/", "examples/", "experiments/", "run_scripts/", "docs/", "setup.py")
    wanted = {name for name in listed.stdout.decode().split() if not name.startswith(left_out)}
    assert inside == wanted | {"__init__.py"}
    for path in built.rglob("*.py"):
        assert "python -m tools" not in path.read_text(), path


@pytest.mark.full
def test_all_of_it_is_imported_under_one_name(built):
    """Importing every module, from elsewhere, leaves no utils, data or runtime in sys.modules."""
    code = (
        "import importlib, pathlib, sys; root = pathlib.Path(sys.argv[1])\n"
        "for path in sorted(root.rglob('*.py')):\n"
        "    importlib.import_module('.'.join(path.relative_to(root).with_suffix('').parts))\n"
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    environment = {**os.environ, "PYTHONPATH": str(built), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code, str(built)]
    done = subprocess.run(command, cwd=built.parent, env=environment, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "simpool_dino" in loaded
    assert not loaded & SETUP["OURS"]


def test_an_older_build_and_an_editable_install_are_refused(built):
    """A folder with modules of another layout would be installed with ours; an editable install would not run."""
    (built / "utils.py").touch()
    try:
        build = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", "../lib"]
        done = subprocess.run(build, cwd=built.parent / "checkout", capture_output=True, text=True)
    finally:
        (built / "utils.py").unlink()
    assert done.returncode != 0
    assert "holds utils.py of an older build; delete it" in done.stderr
    build = [sys.executable, "setup.py", "-q", "editable_wheel", "--dist-dir", "../editable"]
    done = subprocess.run(build, cwd=built.parent / "checkout", capture_output=True, text=True)
    assert done.returncode != 0
    assert "an editable install can't prefix our imports" in done.stderr


def test_a_room_that_is_not_listed_is_noticed():
    """Every folder of modules that the programs import is a package of the wheel."""
    programs = {module.split(".")[0] for module, _ in console.COMMANDS.values()}
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert SETUP["OURS"] >= programs | rooms - {"tests", "benchmarks", "examples", "experiments"}
