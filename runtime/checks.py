"""Checks of arguments' values: each raises InputError naming the flag, the value and what it must be."""

from __future__ import annotations

import argparse
import math
from collections.abc import Collection

from runtime.guards import InputError


def check_choice(args: argparse.Namespace, key: str, choices: Collection[str]) -> None:
    """One of some words; for values of a config or of a calling program, which no parser has looked at."""
    if getattr(args, key) not in choices:
        raise InputError(f"--{key} {getattr(args, key)!r} is unknown; choose {', '.join(choices)}")


def at_least_one(args: argparse.Namespace, *keys: str, optional: bool = False) -> None:
    """1 or more; None too if `optional`."""
    for key in keys:
        value = getattr(args, key)
        if value is not None and not value >= 1:
            raise InputError(f"--{key} {value}: must be at least 1" + (", or be left out" if optional else ""))


def at_most(args: argparse.Namespace, **bounds: int) -> None:
    """No more than what anybody has use for: a mistyped number fails here and not in an allocator."""
    for key, bound in bounds.items():
        value = getattr(args, key)
        if value is not None and value > bound:
            raise InputError(f"--{key} {value}: must be at most {bound}; is it mistyped?")


def zero_or_more(args: argparse.Namespace, *keys: str) -> None:
    """Finite numbers from 0 on."""
    for key in keys:
        if not (getattr(args, key) >= 0 and math.isfinite(getattr(args, key))):
            raise InputError(f"--{key} {getattr(args, key)}: must be a finite number, 0 or more")


def above_zero(args: argparse.Namespace, *keys: str) -> None:
    """Finite numbers above 0."""
    for key in keys:
        if not (getattr(args, key) > 0 and math.isfinite(getattr(args, key))):
            raise InputError(f"--{key} {getattr(args, key)}: must be a finite number above 0")


def from_zero_to_one(args: argparse.Namespace, *keys: str) -> None:
    """Fractions, both ends included."""
    for key in keys:
        if not 0 <= getattr(args, key) <= 1:
            raise InputError(f"--{key} {getattr(args, key)}: must be from 0 to 1")
