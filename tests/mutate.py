"""Small faults, put one at a time into a copy of the code: a quick test must notice each.

    python -m tests.mutate --jobs 2          all mutations, two at a time
    python -m tests.mutate --only ema_gpu    one of them
    python -m tests.mutate --list            their names, and what they change

Every fault is a mistake that somebody could make: training goes on with it, and only its results are worse, or wrong.
They stand in the modules of tests/mutations, each with the tests that must notice it. The checkout is never touched:
its files are copied to a temporary folder, where the tests are run first without a fault, and must pass. A mutation is
noticed if a test then fails; one that passes all of its tests has survived, which ends the program with code 1.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tests.mutations

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 300  # for the tests of one mutation; they take seconds
PASSED, FAILED = 0, 1  # exit codes of pytest; all others mean that no test was run to its end


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


def run_tests(tree: Path, tests: Iterable[str]) -> tuple[int | None, str]:
    """pytest's exit code in a tree, None after too long a time, and its output."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider"]
    command += [f"--basetemp={tree.parent / f'{tree.name}-tmp'}", *tests]
    # Compiled files are told apart by their source's size and second: two mutations may agree in both.
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return None, f"no end after {TIMEOUT_S} s"
    return done.returncode, done.stdout + done.stderr


def check(tree: Path, mutation: Mutation) -> Result:
    """Put the fault into a tree, run its tests, and take it out again."""
    path, begin = tree / mutation.file, time.monotonic()
    original = path.read_text(encoding="utf-8")
    path.write_text(mutation.apply(original), encoding="utf-8")
    try:
        code, output = run_tests(tree, mutation.tests)
    finally:
        path.write_text(original, encoding="utf-8")
    verdict = {PASSED: "SURVIVED", FAILED: "noticed"}.get(code, "BROKEN")
    return Result(mutation, verdict, time.monotonic() - begin, output)


def check_all(trees: Sequence[Path], chosen: Iterable[Mutation]) -> Iterator[Result]:
    """The results of all mutations in their order; as many at a time as there are trees."""
    free: queue.SimpleQueue[Path] = queue.SimpleQueue()
    for tree in trees:
        free.put(tree)

    def one(mutation: Mutation) -> Result:
        tree = free.get()
        try:
            return check(tree, mutation)
        finally:
            free.put(tree)

    with ThreadPoolExecutor(len(trees)) as pool:
        yield from pool.map(one, chosen)


def mutate(root: Path, chosen: Sequence[Mutation], jobs: int = 1) -> int:
    """Check mutations on copies of a checkout, and print what became of each.

    Returns 0 if all were noticed, 1 if one survived or its tests could not be run, 2 if a test fails without any.
    """
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        trees = [Path(folder) / f"tree{i}" for i in range(jobs)]
        for tree in trees:
            copy_tree(root, tree)
        code, output = run_tests(trees[0], sorted({test for mutation in chosen for test in mutation.tests}))
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
