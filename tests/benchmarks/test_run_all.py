"""benchmarks/run_all.sh with a stand-in for Python, which prints a table for every benchmark."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "run_all.sh"
STAND_IN = """#!/bin/bash
[ "$1" = - ] && exit 0
[ "$1" = -c ] && echo python && exit 0
echo "$2" >>"$CALLS"
[ "$2" = benchmarks.into_docs ] && { cat "$3" >"$4"; exit 0; }
[ "$2" = "$FAILING" ] && { echo "no luck" >&2; exit 1; }
[ "$2" = "$KILLING" ] && { kill -TERM $PPID; sleep 5; exit 1; }
echo "| table of $2 |"
"""


def run(folder: Path, *flags: str, **env: str) -> tuple[int, list[str], str]:
    """Exit code, modules that were run, and the document afterwards."""
    folder.mkdir(exist_ok=True)
    python = folder / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    calls, document = folder / "calls", folder / "performance.md"
    calls.write_text("")
    settings = {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(calls), "DOCUMENT": str(document),
                "TABLES": str(folder / "tables"), "FAILING": "", "KILLING": "", **env}  # fmt: skip
    done = subprocess.run(
        ["bash", str(SCRIPT), *flags], env={**os.environ, **settings}, capture_output=True, text=True, check=False
    )
    return done.returncode, calls.read_text().split(), document.read_text() if document.exists() else done.stdout


def test_an_interrupted_run_keeps_its_tables_and_goes_on(tmp_path):
    """What was measured is written when a signal comes; the next start runs the rest only, and forgets nothing."""
    code, modules, document = run(tmp_path, KILLING="benchmarks.startup")
    assert code == 130
    assert "table of benchmarks.optimizer" in document
    assert "Interrupted" in document
    assert "benchmarks.simpool_layer" not in modules
    code, modules, document = run(tmp_path)
    assert code == 0
    assert modules[0] == "benchmarks.startup"
    assert document.count("| table of") == 21
    assert "Interrupted" not in document
    assert len(run(tmp_path)[1]) == 22, "a complete run is followed by a new one"


def test_a_failing_benchmark_does_not_stop_the_others(tmp_path):
    """Its message stands in place of its table, the code is 1, and the next start tries it alone again."""
    code, _, document = run(tmp_path, FAILING="benchmarks.optimizer")
    assert code == 1
    assert "failed: no luck" in document
    assert "table of benchmarks.knn" in document
    code, modules, document = run(tmp_path)
    assert (code, modules) == (0, ["benchmarks.optimizer", "benchmarks.into_docs"])
    assert "failed" not in document


def test_quick_numbers_stay_out_of_the_document(tmp_path):
    """--quick prints its tables."""
    code, modules, printed = run(tmp_path, "--quick", "IMAGES")
    assert code == 0
    assert "benchmarks.into_docs" not in modules
    assert printed.count("| table of") == 23
