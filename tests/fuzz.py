"""Damaged and hostile files of every format that the programs read: each must be read, or refused with a clear error.

    python -m tests.fuzz --cases 3000            all formats
    python -m tests.fuzz --only config --seed 1  one of them, with other cases

The formats are those of the modules in tests/fuzzing. Each of those has

    FORMATS: dict[str, Callable[[numpy.random.Generator, pathlib.Path], str]]

A function makes one case in the folder that it is given and hands it to the code under test. It returns "read" or
"refused", and raises AssertionError for anything else: another exception, a wrong result, too much memory or time.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

import tests.fuzzing

Case = Callable[[np.random.Generator, Path], str]
OUTCOMES = ("read", "refused")


def formats() -> dict[str, Case]:
    """Every format by name, of all modules in tests/fuzzing."""
    found: dict[str, Case] = {}
    for module in pkgutil.iter_modules(tests.fuzzing.__path__):
        mine = importlib.import_module(f"tests.fuzzing.{module.name}").FORMATS
        assert not found.keys() & mine.keys(), f"{module.name}: {found.keys() & mine.keys()} is taken"
        found |= mine
    return found


def fuzz(name: str, case: Case, seed: int, cases: int) -> Counter[str]:
    """Run cases of one format; how many ended in which way. Raises AssertionError naming the first bad case."""
    outcomes: Counter[str] = Counter()
    for number in range(cases):
        # A case depends on nothing but these numbers, so that it can be made again alone.
        rng = np.random.default_rng([seed, zlib.crc32(name.encode()), number])
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            try:
                outcome = case(rng, Path(folder))
            except Exception as error:  # the code under test must raise nothing but what the case expects
                raise AssertionError(f"{name}, seed {seed}, case {number}: {type(error).__name__}: {error}") from error
        assert outcome in OUTCOMES, f"{name} returned {outcome!r}"
        outcomes[outcome] += 1
    return outcomes


def main(argv: list[str] | None = None) -> int:
    """The program; 1 if any format failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of the cases (0)")
    parser.add_argument("--cases", type=int, default=3000, help="cases per format (3000)")
    parser.add_argument("--only", choices=sorted(formats()), help="one format")
    args = parser.parse_args(argv)
    failed = 0
    print(f"{'format':24} {'read':>8} {'refused':>8} {'seconds':>8}")
    for name, case in formats().items():
        if args.only not in (None, name):
            continue
        begin = time.monotonic()
        try:
            outcomes = fuzz(name, case, args.seed, args.cases)
        except AssertionError as error:
            failed += 1
            print(f"{name:24} FAILED: {error}")
            continue
        print(f"{name:24} {outcomes['read']:8} {outcomes['refused']:8} {time.monotonic() - begin:8.1f}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
