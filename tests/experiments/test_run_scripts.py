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
CALLED=$*
while [ $# -gt 0 ]; do [ "$1" = --output_dir ] && folder=$2; shift; done
mkdir -p "$folder"
case $folder in
*/$FAILING/*) case $CALLED in eval_*) ;; *) exit 2 ;; esac ;;
*/$UNMEASURED/*) case $CALLED in eval_*) exit 1 ;; esac ;;
*/$PREEMPTED/seed1) touch "$folder/PREEMPTED"; exit 75 ;;
esac
touch "$folder/DONE"
"""


def run(folder: Path, name: str, *flags: str, **env: str) -> tuple[int, list[list[str]], str]:
    """Exit code, what Python was called with, and what was printed."""
    python = folder / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    calls = folder / "calls"
    calls.write_text("")
    settings = {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(calls), "MODES": " ".join(MODES),
                "FAILING": "-", "UNMEASURED": "-", "PREEMPTED": "-", "NPROC": "1", **env}  # fmt: skip
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


SELF_SUPERVISED = {
    "simpool": ["vit_official", "resnet_official", "vit_simpool", "resnet_simpool"],
    "precision": ["vit_none", "resnet_none", "vit_bf16", "resnet_bf16"],
    "published": ["vit_ours", "resnet_ours", "vit_plain", "resnet_plain"],
    "attmask": ["attmask_high", "attmask_hint", "attmask_low", "rand", "block"],
}


@pytest.mark.parametrize("name", SELF_SUPERVISED)
def test_finished_runs_are_evaluated_once(tmp_path, name):
    """Each run is trained, then measured in its folder; a failed evaluation is tried again, a finished one is not."""
    labels = SELF_SUPERVISED[name]
    flags = ["--data_path", "demo", "--output_dir", str(tmp_path / "out"), "--seeds", "0", "--epochs", "2"]
    code, calls, printed = run(tmp_path, name, *flags, UNMEASURED=labels[1])
    assert code == 1, printed
    assert f"failed: {labels[1]}, seed 0: evaluation" in printed
    trained = [call for call in calls if not call[0].startswith("eval_")]
    assert [Path(call[call.index("--output_dir") + 1]).parent.name for call in trained] == labels
    folders = [call[call.index("--output_dir") + 1] for call in calls if call[0] == "eval_knn.py"]
    assert folders == [str(tmp_path / "out" / label / "seed0") for label in labels]
    code, calls, printed = run(tmp_path, name, *flags)
    assert code == 0, printed
    assert {call[0][:5] for call in calls} == {"eval_"}
    assert {Path(call[call.index("--output_dir") + 1]).parent.name for call in calls} == {labels[1]}


def test_a_part_of_the_images_is_the_same_for_training_and_evaluation(tmp_path):
    """--subset reaches every program, in both spellings."""
    for subset in (["--subset", "50"], ["--subset=50"]):
        out = tmp_path / str(len(subset))
        flags = ["--data_path", "demo", "--output_dir", str(out), "--seeds", "0", "--only", "vit_simpool", *subset]
        _, calls, printed = run(tmp_path, "simpool", *flags)
        assert [call[0] for call in calls] == ["main_dino.py", "eval_knn.py", "eval_linear.py"], printed
        assert all(" ".join(subset) in " ".join(call) for call in calls)


@pytest.mark.parametrize("name", [*SELF_SUPERVISED, "pooling", "depth", "gamma"])
def test_the_programs_take_what_the_scripts_give(tmp_path, name):
    """Every command line of the scripts is read by the program that it is for, and completed without an error."""
    import main_attmask
    import main_dino
    import main_supervised
    from eval_knn import get_args_parser as knn_flags

    parse = {"main_dino.py": main_dino.parse_arguments, "main_attmask.py": main_attmask.parse_arguments,
             "main_supervised.py": main_supervised.parse_arguments, "-m": main_dino.parse_arguments}  # fmt: skip
    flags = ["--data_path", "demo", "--output_dir", str(tmp_path / "out"), "--seeds", "0", "--img_size", "32"]
    _, calls, printed = run(tmp_path, name, *flags)
    assert calls, printed
    for call in calls:
        if call[0] in parse:
            parse[call[0]](call[2:] if call[0] == "-m" else call[1:])
        elif call[0] == "eval_knn.py":
            knn_flags().parse_args(call[1:])


def test_localisation_measures_the_models_of_the_other_question(tmp_path):
    """Each finished run's map is measured by each protocol that it has; a missing run is named."""
    runs, out = tmp_path / "runs", tmp_path / "out"
    for label in ("vit_official", "vit_simpool"):
        (runs / label / "seed0").mkdir(parents=True)
        (runs / label / "seed0" / "DONE").touch()
        (runs / label / "seed0" / "config.json").write_text("{}")
    flags = ["--data_path", str(tmp_path), "--runs", str(runs), "--output_dir", str(out), "--seeds", "0"]
    code, calls, printed = run(tmp_path, "localization", *flags)
    assert (code, len(calls)) == (1, 4)
    assert "resnet_simpool/seed0 is no finished run" in printed
    assert {call[call.index("--protocol") + 1] for call in calls} == {"maxboxacc", "dino_seg"}
    assert (out / "vit_simpool" / "seed0" / "DONE").exists()
