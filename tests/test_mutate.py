"""The mutations can be applied, and the program that applies them tells what was noticed."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
from pathlib import Path

import pytest

from tests import mutate
from tests.mutate import Mutation

MUTATIONS = mutate.mutations()
TEST = "test_doubling.py::test_double"


@functools.cache
def functions(file: str) -> set[str]:
    """The functions at the top level of a test file."""
    return {node.name for node in ast.parse((mutate.ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS)
def test_every_mutation_can_be_applied(mutation):
    """Its text is there exactly once, what it leaves is Python and not the same program, and its tests exist."""
    original = (mutate.ROOT / mutation.file).read_text()
    changed = mutation.apply(original)
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(original))
    assert "\n" not in mutation.old + mutation.new
    assert mutation.tests
    for test in mutation.tests:
        file, _, name = test.partition("::")
        assert name.partition("[")[0] in functions(file), test


@pytest.mark.parametrize(("old", "times"), [("3 *", 0), ("x", 2)])
def test_a_text_that_is_not_there_once_is_an_error(old, times):
    """Nothing is changed in a place that nobody meant."""
    with pytest.raises(ValueError, match=f"m: doubling.py has {re.escape(repr(old))} {times} times"):
        Mutation("m", "doubling.py", old, "y", (TEST,)).apply("def double(x):\n    return 2 * x\n")


@pytest.fixture
def checkout(tmp_path):
    """A git checkout with one function, one test of it, and a file that git ignores."""
    root = tmp_path / "checkout"
    root.mkdir()
    (root / "doubling.py").write_text("def double(x):\n    return 2 * x\n")
    test = "from doubling import double\n\n\ndef test_double():\n    assert double(2) == 4\n"
    (root / "test_doubling.py").write_text(test)
    (root / ".gitignore").write_text("ignored\n")
    (root / "ignored").write_text("")
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    return root


def test_verdicts(checkout, capsys):
    """Noticed, survived, and broken mutations are told apart, and the checkout stays as it was."""
    before = {path: path.read_bytes() for path in checkout.iterdir() if path.is_file()}
    noticed = Mutation("noticed", "doubling.py", "2 * x", "3 * x", (TEST,))
    survives = Mutation("survives", "doubling.py", "2 * x", "x**2", (TEST,))
    broken = Mutation("broken", "doubling.py", "def double", "def triple", (TEST,))
    assert mutate.mutate(checkout, [noticed]) == 0
    assert "1 of 1 mutations noticed" in capsys.readouterr().out
    assert mutate.mutate(checkout, [survives, broken, noticed], jobs=2) == 1
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    verdicts = {line[-1]: line[0] for line in lines if len(line) == 4 and line[2] == "s"}
    assert verdicts == {"noticed": "noticed", "survives": "SURVIVED", "broken": "BROKEN"}
    assert {path: path.read_bytes() for path in checkout.iterdir() if path.is_file()} == before


def test_tests_that_fail_by_themselves_show_nothing(checkout, capsys):
    """The program stops before it takes their failure for a mutation that was noticed."""
    (checkout / "doubling.py").write_text("def double(x):\n    return 2 * x + 1\n")
    assert mutate.mutate(checkout, [Mutation("m", "doubling.py", "2 * x", "3 * x", (TEST,))]) == 2
    assert "do not pass without any mutation" in capsys.readouterr().out


def test_a_copy_has_what_git_would_have(checkout, tmp_path):
    """Files that are new or changed are copied, ignored ones are not."""
    (checkout / "new.py").write_text("")
    mutate.copy_tree(checkout, tmp_path / "a" / "copy")
    assert {path.name for path in Path(tmp_path / "a" / "copy").iterdir()} == {
        "doubling.py", "test_doubling.py", "new.py", ".gitignore"
    }  # fmt: skip


def test_the_list_names_everything(capsys):
    """--list changes nothing and runs nothing."""
    assert mutate.main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(MUTATIONS)
