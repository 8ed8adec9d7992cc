"""The experiments' scripts with a stand-in for Python that writes down what would be trained."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from pooled_backbone import MODES

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
STAND_IN = """#!/bin/bash
[ "$1" = - ] && exit 0
if [ "$1" = -c ]; then case $2 in *MODES*) echo "$MODES" ;; *) echo 1 ;; esac; exit 0; fi
echo "$*" >>"$CALLS"
while [ $# -gt 0 ]; do [ "$1" = --output_dir ] && folder=$2; shift; done
mkdir -p "$folder"
case $folder in
*/$FAILING/*) exit 2 ;;
*/$PREEMPTED/seed1) touch "$folder/PREEMPTED"; exit 75 ;;
esac
touch "$folder/DONE"
"""


def run(folder: Path, name: str, *flags: str, **env: str) -> tuple[int, list[list[str]], str]:
    """Exit code, what main_supervised.py was called with, and what was printed."""
    python = folder / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    calls = folder / "calls"
    calls.write_text("")
    settings = {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(calls), "MODES": " ".join(MODES),
                "FAILING": "-", "PREEMPTED": "-", "NPROC": "1", **env}  # fmt: skip
    done = subprocess.run(
        ["bash", str(EXPERIMENTS / name / "run.sh"), *flags],
        env={**os.environ, **settings}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, [line.split() for line in calls.read_text().splitlines()], done.stdout + done.stderr


def test_every_variant_with_every_seed_and_the_same_command_continues(tmp_path):
    """16 poolings and two seeds; what is finished is not trained again, and other flags come last."""
    flags = ["--data_path", "demo", "--output_dir", str(tmp_path / "out"), "--seeds", "3", "4", "--epochs", "2"]
    code, calls, printed = run(tmp_path, "pooling", *flags)
    assert code == 0, printed
    assert [call[call.index("--mode") + 1] for call in calls] == [mode for mode in MODES for _ in range(2)]
    gem = ["main_supervised.py", "--arch", "resnet18", "--mode", "gem", "--epochs", "2", "--data_path", "demo"]
    assert [*gem, "--output_dir", str(tmp_path / "out" / "gem" / "seed3"), "--seed", "3"] in calls
    assert f"experiments.tables pooling --runs {tmp_path / 'out'}" in printed
    (tmp_path / "out" / "gem" / "seed4" / "DONE").unlink()
    code, calls, _ = run(tmp_path, "pooling", *flags)
    assert (code, len(calls)) == (0, 1)
    assert calls[0][-1] == "4"


@pytest.mark.parametrize(
    ("name", "env", "expected"),
    [
        ("depth", {"BLOCKS": "4"}, {"cls_more_5": "--depth 9 --mode official", "simpool_fewer_3":
                                    "--depth 4 --mode simpool --pool_depth 3", "gap": "--depth 4 --mode gap"}),
        ("gamma", {}, {"gamma_none": "--mode simpool --gamma None", "gamma_1.25": "--mode simpool --gamma 1.25"}),
    ],
)  # fmt: skip
def test_the_variants_of_depth_and_gamma(tmp_path, name, env, expected):
    """Each label trains what it says, and table.json knows all of them."""
    import json

    flags = ["--data_path=demo", "--output_dir", str(tmp_path / "out"), "--seeds", "0"]
    code, calls, printed = run(tmp_path, name, *flags, **env)
    assert code == 0, printed
    found = {Path(call[call.index("--output_dir") + 1]).parent.name: " ".join(call) for call in calls}
    assert list(found) == json.loads((EXPERIMENTS / name / "table.json").read_text())["order"]
    for label, words in expected.items():
        assert f"main_supervised.py --arch vit_small {words} --data_path demo" in found[label].replace(
            "--depth 12 ", ""
        )


def test_a_failure_does_not_stop_the_others_and_a_preemption_does(tmp_path):
    """The failed variant is named at the end, with code 1; preempted means 75, at once."""
    flags = [
        "--data_path",
        "demo",
        "--output_dir",
        str(tmp_path / "out"),
        "--only",
        "gap",
        "gem",
        "se",
        "--seeds",
        "0",
        "1",
    ]
    code, calls, printed = run(tmp_path, "pooling", *flags, FAILING="gem")
    assert (code, len(calls)) == (1, 6)
    assert "failed: gem, seed 0 (exit code 2)" in printed
    code, calls, printed = run(tmp_path, "pooling", *flags, PREEMPTED="gem")
    assert (code, len(calls)) == (75, 2)
    assert "the same command continues" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give the images"),
        (["--data_path", "demo", "--seeds", "a"], "--seeds a: give whole numbers"),
        (["--data_path", "demo", "--only", "gme"], "--only gme: no such variant; there are official gap"),
    ],
)
def test_bad_input_leaves_with_code_2(tmp_path, flags, message):
    """One line, before anything is trained."""
    code, calls, printed = run(tmp_path, "pooling", *flags, "--output_dir", str(tmp_path / "out"))
    assert (code, calls) == (2, [])
    assert message in printed
