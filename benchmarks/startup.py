"""How long main_dino.py takes to answer --help and to refuse a wrong flag, compared with importing torch alone.

    python -m benchmarks.startup [--rounds 5]

Each command is a separate process, run in turn; medians in seconds. A first round warms the system's file cache.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.measure import timed_in_turn
from runtime.cli import parse_described
from runtime.guards import EXIT_BAD_INPUT, EXIT_DONE, run_program
from runtime.terminal import say

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {
    "import torch": (["-c", "import torch"], EXIT_DONE),
    "--help": (["main_dino.py", "--help"], EXIT_DONE),
    "a wrong flag": (["main_dino.py", "--no_such_flag"], EXIT_BAD_INPUT),
}


def answer(name: str) -> str:
    """Run one of COMMANDS and return its output. Raises RuntimeError if its exit code is not the expected one."""
    flags, expected = COMMANDS[name]
    done = subprocess.run([sys.executable, *flags], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != expected:
        raise RuntimeError(f"{name}: exit code {done.returncode}, not {expected}:\n{done.stderr}")
    return done.stdout + done.stderr


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("benchmarks.startup", add_help=False)
    parser.add_argument("--rounds", type=int, default=5, help="rounds, each running every command once")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = parse_described(get_args_parser(), __doc__, argv)
    seconds = timed_in_turn({name: (lambda n=name: answer(n)) for name in COMMANDS}, args.rounds)
    say("| command | seconds | above torch's own import |\n|---|---|---|")
    for name, value in seconds.items():
        say(f"| {name} | {value:.2f} | {value - seconds['import torch']:.2f} |")
    return 0


if __name__ == "__main__":
    run_program(main)
