"""Small faults, put one at a time into a copy of the code: a quick test must notice each.

    python -m tests.mutate --jobs 2          all mutations, two at a time
    python -m tests.mutate --only rate_late  one of them, or several
    python -m tests.mutate --list            their names, and what they change

Every fault is a mistake that somebody could make: training goes on with it, and only its results are worse, or wrong.
They stand in the modules of tests/mutations, each with the tests that must notice it. The checkout is never touched:
its files are copied to a temporary folder, where the tests are run first without a fault, and must pass. A mutation is
noticed if a test then fails; one that passes all of its tests has survived, which ends the program with code 1.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import multiprocessing.connection
import os
import pkgutil
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tests.mutations

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 600  # for the tests of one mutation, which take seconds, and for all of them without one
# Exit codes of a process that runs tests: pytest's and 10, so that an error of the process itself is none of them.
OFFSET = 10
PASSED, FAILED = OFFSET, OFFSET + 1
# A forked process has torch and pytest already, which saves most of the seconds that a few tests take.
_CONTEXT = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


@dataclass(frozen=True)
class Mutation:
    """A text of a file, what takes its place, and the tests (pytest's node ids) that must notice."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def apply(self, text: str) -> str:
        """The file's text with the fault in it. Raises ValueError unless the old text is there exactly once."""
        count = text.count(self.old)
        if count != 1:
            raise ValueError(f"{self.name}: {self.file} has {self.old!r} {count} times, and not once")
        return text.replace(self.old, self.new)


def of_file(file: str, *rows: tuple[str, ...]) -> list[Mutation]:
    """Mutations of one file, from rows of name, old text, new text, and tests."""
    return [Mutation(name, file, old, new, tuple(tests)) for name, old, new, *tests in rows]


def mutations() -> dict[str, Mutation]:
    """Every mutation by name, of all modules in tests/mutations."""
    found: dict[str, Mutation] = {}
    for module in pkgutil.iter_modules(tests.mutations.__path__):
        for mutation in importlib.import_module(f"tests.mutations.{module.name}").MUTATIONS:
            assert mutation.name not in found, f"{module.name}: {mutation.name} is taken"
            found[mutation.name] = mutation
    return found


@dataclass(frozen=True)
class Result:
    """What became of a mutation: "noticed", "SURVIVED", or "BROKEN" where its tests could not be run."""

    mutation: Mutation
    verdict: str
    seconds: float
    output: str


def copy_tree(root: Path, target: Path) -> None:
    """Copy a checkout's files to `target`, as they are now; without those that git ignores."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, check=True).stdout.decode().split("\0")
    for name in filter(None, listed):
        if (root / name).is_file():  # a file that was deleted, but not yet from the index, is not
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name)
    images = root.parent / "shared"
    if images.is_dir() and not (target.parent / "shared").exists():
        (target.parent / "shared").symlink_to(images)


class TestRun:
    """pytest in a process of its own, in a tree with a fault in it (or, for none, without)."""

    __test__ = False  # not pytest's to collect

    def __init__(self, tree: Path, tests: Iterable[str], mutation: Mutation | None = None) -> None:
        self.tree, self.mutation, self._begin = tree, mutation, time.monotonic()
        self.deadline = self._begin + TIMEOUT_S
        self._original: str | None = None
        if mutation is not None:
            self._original = (tree / mutation.file).read_text(encoding="utf-8")
            (tree / mutation.file).write_text(mutation.apply(self._original), encoding="utf-8")
        self._process = _CONTEXT.Process(target=_pytest, args=(tree, list(tests), self._output()))
        self._process.start()
        self.sentinel = self._process.sentinel

    def _output(self) -> Path:
        return self.tree.parent / f"{self.tree.name}.txt"

    def end(self) -> tuple[int | None, str]:
        """Wait, and take the fault out again; the exit code, negative after too long a time, and pytest's output."""
        self._process.join(max(0.0, self.deadline - time.monotonic()))
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        if self.mutation is not None:
            (self.tree / self.mutation.file).write_text(self._original, encoding="utf-8")
        return self._process.exitcode, self._output().read_text(encoding="utf-8", errors="replace")

    def result(self) -> Result:
        """What became of the mutation."""
        code, output = self.end()
        verdict = {PASSED: "SURVIVED", FAILED: "noticed"}.get(code, "BROKEN")
        return Result(self.mutation, verdict, time.monotonic() - self._begin, output)


def _pytest(tree: Path, tests: list[str], output: Path) -> None:
    """Run tests in `tree`, as if nothing of the checkout had been imported; exits with OFFSET and pytest's code."""
    stream = open(output, "w", encoding="utf-8")  # noqa: SIM115 (the process ends with it)
    for number in (1, 2):
        os.dup2(stream.fileno(), number)
    sys.stdout = sys.stderr = stream
    sys.path[:] = [str(tree), *(entry for entry in sys.path if Path(entry).resolve() != ROOT)]
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    os.chdir(tree)
    # Compiled files are told apart by their source's size and second: two mutations may agree in both.
    sys.dont_write_bytecode = True
    os.environ["OMP_NUM_THREADS"] = "1"
    import pytest

    temporary = f"--basetemp={tree.parent / f'{tree.name}-tmp'}"
    sys.exit(OFFSET + int(pytest.main(["-x", "-q", "-n", "0", "-p", "no:cacheprovider", temporary, *tests])))


def check_all(trees: Sequence[Path], chosen: Iterable[Mutation]) -> Iterator[Result]:
    """The results of all mutations, as they end; as many at a time as there are trees."""
    free, running, waiting = list(trees), [], list(chosen)
    while running or waiting:
        while free and waiting:
            mutation = waiting.pop(0)
            running.append(TestRun(free.pop(), mutation.tests, mutation))
        longest = min(run.deadline for run in running) - time.monotonic()
        ended = multiprocessing.connection.wait([run.sentinel for run in running], max(0.0, longest))
        for run in [run for run in running if run.sentinel in ended or run.deadline <= time.monotonic()]:
            running.remove(run)
            yield run.result()
            free.append(run.tree)


def mutate(root: Path, chosen: Sequence[Mutation], jobs: int = 1) -> int:
    """Check mutations on copies of a checkout, and print what became of each.

    Returns 0 if all were noticed, 1 if one survived or its tests could not be run, 2 if a test fails without any.
    """
    begin = time.monotonic()
    if _CONTEXT.get_start_method() == "fork":
        import pytest  # noqa: F401
        import torch._dynamo  # noqa: F401 (which every optimizer imports)
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        trees = [Path(folder) / f"tree{i}" for i in range(jobs)]
        for tree in trees:
            copy_tree(root, tree)
        code, output = TestRun(trees[0], sorted({test for mutation in chosen for test in mutation.tests})).end()
        if code != PASSED:
            print(f"the tests do not pass without any mutation:\n{output[-3000:]}")
            return 2
        print(f"without a mutation all tests pass ({time.monotonic() - begin:.0f} s)", flush=True)
        results = []
        for result in check_all(trees, chosen):
            results.append(result)
            print(f"{result.verdict:9} {result.seconds:6.1f} s  {result.mutation.name}", flush=True)
            if result.verdict == "BROKEN":
                print(result.output[-3000:])
    missed = [result.mutation for result in results if result.verdict != "noticed"]
    print(f"{len(results) - len(missed)} of {len(results)} mutations noticed in {time.monotonic() - begin:.0f} s")
    for mutation in missed:
        print(f"not noticed: {mutation.name}: {mutation.file}: {mutation.old!r} -> {mutation.new!r}")
    return 1 if missed else 0


def main(argv: list[str] | None = None) -> int:
    """The program."""
    by_name = mutations()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=sorted(by_name), help="these mutations")
    parser.add_argument("--jobs", type=int, default=1, help="mutations at a time (1)")
    parser.add_argument("--list", action="store_true", help="print the mutations and do nothing")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: give 1 or more")
    chosen = [by_name[name] for name in args.only or by_name]
    if args.list:
        for mutation in chosen:
            print(f"{mutation.name:32} {mutation.file}: {mutation.old} -> {mutation.new}")
        return 0
    return mutate(ROOT, chosen, min(args.jobs, len(chosen)))


if __name__ == "__main__":
    sys.exit(main())
