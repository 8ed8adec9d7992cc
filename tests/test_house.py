"""The house rules: who may import whom."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEVELS = {
    "sp": 0, "torchfile": 0.1, "pretrained": 0.2, "runtime": 0.3,  # in this order
    "distill": 1, "optim": 1, "data": 1, "poolings": 1,
    "pooled_backbone": 1.5, "vision_transformer": 2, "resnet_simpool": 2, "convnext_simpool": 2, "timm_stem": 2,
    "timm_backbone": 2,
    "backbones": 3, "portable": 3.5,
    "evaluation": 4, "timm_models": 4,
    "utils": 5, "training": 5, "exporting": 5,
    "main_dino": 6, "main_attmask": 6, "main_supervised": 6, "tools": 6,
    "eval_knn": 6, "eval_linear": 6, "eval_localization": 6, "eval_background": 6, "visualize_attention": 6,
    "export": 6, "hubconf": 6, "console": 7, "setup": 7,
    "benchmarks": 7, "run_scripts": 7, "examples": 7, "experiments": 8,
}  # fmt: skip
MODELS = ("vision_transformer", "resnet_simpool", "convnext_simpool", "timm_stem", "timm_backbone")
READING = ("pretrained", "torchfile.read", "torchfile.archive", "torchfile.plain_pickle", "torchfile.safe")
OPERATORS = (
    "base", "choose", "clusters", "efficient", "gates", "how", "multiple_instance", "otk", "probes", "queries",
    "shapes", "simple", "simpool", "slot", "tokens",
)  # fmt: skip
POOLINGS = tuple(f"poolings.{name}" for name in OPERATORS)
BACKBONE_FILES = (
    "sp",
    *POOLINGS,
    "pooled_backbone",
    *READING,
    *MODELS,
    "backbones",
    "portable",
    "distill.heads",
    "hubconf",
    "timm_models",
)
PROGRAMS = (
    "main_dino", "main_attmask", "main_supervised", "eval_knn", "eval_linear", "eval_localization", "eval_background",
    "visualize_attention", "export", "hubconf",
)  # fmt: skip


@functools.cache
def modules() -> dict[str, Path]:
    """Dotted name -> file, of everything that is ours and no test."""
    folders = [path for path in ROOT.iterdir() if path.is_dir() and path.name not in ("tests", ".venv", "build")]
    files = [*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def imports(path: Path) -> set[str]:
    """Dotted names of every import in a file, those inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(name: str, known: dict[str, Path]) -> str | None:
    """The module of ours that an imported name means, if any."""
    while name:
        if name in known:
            return name
        name = name.rpartition(".")[0]
    return None


GRAPH = {
    name: {target for n in imports(path) if (target := ours(n, modules())) and target != name}
    for name, path in modules().items()
}


@pytest.mark.parametrize("name", sorted(GRAPH))
def test_a_file_imports_lower_levels_or_its_own_room(name):
    """No file imports a higher level, another room of its level, or a program."""
    room = name.split(".")[0]
    for target in GRAPH[name]:
        other = target.split(".")[0]
        program_for_tools = room in ("benchmarks", "run_scripts", "experiments") and other in PROGRAMS
        assert other not in PROGRAMS or program_for_tools, f"{name} imports the program {target}"
        together = room == other or {room, other} <= set(MODELS)  # one room, though at the top level
        assert together or LEVELS[other] < LEVELS[room] or program_for_tools, f"{name} must not import {target}"


def test_no_circles():
    """The imports, those inside functions included, form no circle."""
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for target in GRAPH[name]:
                visit(target, (*path, name))
            done.add(name)

    for name in GRAPH:
        visit(name, ())


@pytest.mark.parametrize("name", BACKBONE_FILES)
def test_backbones_keep_to_themselves(name):
    """SimPool, the backbones and what reads their files reach for nothing but torch, timm, each other and the head."""
    for target in GRAPH[name]:
        assert target in (*BACKBONE_FILES, "distill", "torchfile", "poolings"), f"{name} imports {target}"


@pytest.mark.parametrize("name", [name for name in sorted(GRAPH) if name.split(".")[0] == "poolings"])
def test_poolings_need_torch_and_simpool_only(name):
    """The pooling operators reach for nothing but torch, the standard library, sp and each other."""
    import sys

    allowed = {"torch", "sp", "poolings", *sys.stdlib_module_names}
    assert {imported.split(".")[0] for imported in imports(modules()[name])} <= allowed


def test_sp_is_one_file():
    """sp.py needs nothing but torch and the standard library."""
    import sys

    roots = {name.split(".")[0] for name in imports(ROOT / "sp.py")}
    assert roots <= {"torch", *sys.stdlib_module_names}


@pytest.mark.parametrize(
    "package",
    [
        "torchfile",
        "poolings",
        "distill",
        "optim",
        "data",
        "runtime",
        "evaluation",
        "training",
        "exporting",
        "tools",
        "benchmarks",
        "experiments",
        "examples",
    ],
)
def test_package_init_files_are_empty(package):
    """Importing a package runs nothing."""
    assert (ROOT / package / "__init__.py").read_text() == ""


def test_heavy_imports_wait():
    """No import at a file's top level pulls in torchvision, timm or another heavy or optional package.

    timm_models is imported by timm's users, to register names with it.
    """
    heavy = r"\b(torchvision|timm|matplotlib|skimage|sklearn|umap|onnx\w*|safetensors)\b"
    for name, path in modules().items():
        if name.split(".")[0] in ("benchmarks", "run_scripts", "examples", "timm_models"):
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                text = ast.unparse(node)
                assert not re.search(heavy, text), f"{name}: {text}"


def test_what_is_imported_is_required():
    """Every package that the programs import stands in requirements.txt."""
    import sys

    distribution = {"PIL": "pillow", "yaml": "pyyaml", "skimage": "scikit-image", "sklearn": "scikit-learn"}
    required = {
        re.split(r"[><=]", line)[0].strip().lower() for line in (ROOT / "requirements.txt").read_text().splitlines()
    }
    optional = {"submitit", "onnx", "onnxruntime", "safetensors", "setuptools", "umap"}
    known = set(GRAPH) | {name.split(".")[0] for name in GRAPH}
    for name, path in modules().items():
        for target in imports(path):
            root = target.split(".")[0]
            if root not in sys.stdlib_module_names and root not in known | optional:
                assert distribution.get(root, root).lower() in required, f"{name} imports {root}"
