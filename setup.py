"""What `pip install .` installs: one package, simpool_dino, and the command simpool-dino.

In a checkout our modules are at the top level (`from data.loader import ...`), for those who clone it. Installed like
that they would clash with other people's `utils` and `data`, so while a wheel is built, each file is copied into
simpool_dino/ with our own imports prefixed, and `python main_dino.py` in a help text becomes `simpool-dino pretrain`.
The checkout stays as it is.
"""

import ast
import re
import runpy
import shutil
import sys
import tomllib
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = "simpool_dino"
PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"]
MODULES = {path.stem for path in ROOT.glob("*.py")} - {"setup"}
OURS = MODULES | {name.split(".")[-1] for name in PACKAGES[1:]}
THEIRS = {
    "PIL", "matplotlib", "numpy", "onnx", "onnxruntime", "safetensors", "scipy", "skimage", "sklearn", "tensorboardX",
    "tifffile", "timm", "torch", "torchvision", "umap", "yaml",
}  # fmt: skip
COMMANDS = {module: name for name, (module, _) in runpy.run_path(str(ROOT / "console.py"))["COMMANDS"].items()}

_names, _programs = "|".join(sorted(OURS)), "|".join(module for module in COMMANDS if "." not in module)
_FROM = re.compile(rf"^([ \t]*from )((?:{_names})(?:\.\w+)* import )", re.MULTILINE)
_IMPORT = re.compile(rf"^([ \t]*)(import (?:{_names})(?: as \w+)?[ \t]*(?:#.*)?)$", re.MULTILINE)
_TORCHRUN = re.compile(rf"(torchrun [^\n]*?)\b({_programs})\.py")
_RUN = re.compile(rf"python -m (tools\.\w+)|(?:python )?\b({_programs})\.py\b")


def packaged(text: str, path: str | Path) -> str:
    """A module's text as a part of the package. Raises ImportError for an import that it would not find there."""
    text = _IMPORT.sub(rf"\1from {PACKAGE} \2", _FROM.sub(rf"\1{PACKAGE}.\2", text))
    text = _TORCHRUN.sub(rf"\1-m {PACKAGE}.\2", text)
    text = _RUN.sub(lambda found: f"simpool-dino {COMMANDS[found[1] or found[2]]}", text)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for root, _, rest in (name.partition(".") for name in names):
            own = root == PACKAGE and rest.split(".")[0] in OURS
            if not own and root not in THEIRS and root not in sys.stdlib_module_names:
                unknown = f"{root}.{rest}" if rest else root
                raise ImportError(f"{path}:{node.lineno} imports {unknown}, which setup.py does not know")
    return text


class BuildPy(build_py):
    """Copies our modules into the package, rewritten."""

    def run(self) -> None:
        if self.editable_mode:
            raise SystemExit("error: an editable install can't prefix our imports; run the checkout's own programs")
        left = {path.name for path in Path(self.build_lib).glob("*")} - {PACKAGE}
        if left:
            raise SystemExit(f"error: {self.build_lib} holds {', '.join(sorted(left))} of an older build; delete it")
        shutil.rmtree(Path(self.build_lib, PACKAGE), ignore_errors=True)  # modules that are no longer there
        super().run()
        Path(self.build_lib, PACKAGE, "__init__.py").touch()  # a checkout has none at its root

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        return [entry for entry in super().find_package_modules(package, package_dir) if entry[1] != "setup"]

    def build_module(self, module: str, module_file: str, package: str) -> tuple[str, bool]:
        target = Path(self.get_module_outfile(self.build_lib, package.split("."), module))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(packaged(Path(module_file).read_text("utf-8"), module_file), "utf-8")
        return str(target), True


if __name__ == "__main__":
    setup(cmdclass={"build_py": BuildPy})
