"""The flags of the crops: what they set, and what they leave alone."""

from __future__ import annotations

import argparse
from dataclasses import asdict

import pytest

import main_attmask
import main_dino
from data.augment import CropSpec
from runtime.checkpoint import read_checkpoint, save_checkpoint
from runtime.guards import InputError
from tests.pretraining import VIT, rows, train
from training.multicrop import crop_spec

PROGRAMS = (main_dino, main_attmask)


def resolved(*flags, program=main_dino) -> argparse.Namespace:
    return program.parse_arguments(["--data_path", "some/images", *map(str, flags)])


@pytest.mark.parametrize("program", PROGRAMS)
def test_without_flags_the_colours_are_the_published_ones(program):
    """Probabilities and strengths of the specification itself."""
    colours = ("jitter", "brightness", "contrast", "saturation", "hue", "gray", "blur", "solarize", "global_number")
    spec = asdict(crop_spec(resolved(program=program)))
    assert {key: spec[key] for key in colours} == {key: asdict(CropSpec())[key] for key in colours}


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_flag_reaches_the_augmentation(program):
    """In the order that the help tells."""
    flags = ["--blur_prob", 0, 0.25, 0.5, "--solarize_prob", 0.1, "--jitter", 0.8, 0.7, 0.6, 0.5]
    flags += ["--jitter_prob", 0.3, "--gray_prob", 0]
    spec = crop_spec(resolved(*flags, "--global_crops_number", 1, "--local_crops_number", 4, program=program))
    assert (spec.blur, spec.solarize, spec.gray, spec.jitter) == ((0, 0.25, 0.5), (0, 0.1, 0), 0, 0.3)
    assert (spec.brightness, spec.contrast, spec.saturation, spec.hue) == (0.8, 0.7, 0.6, 0.5)
    assert (spec.global_number, spec.local_number) == (1, 4)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--blur_prob 1 .1 1.5", "--blur_prob 1.5"), ("--solarize_prob -1", "--solarize_prob -1"),
        ("--jitter .4 .4 -.2 .1", "--jitter 0.4 0.4 -0.2 0.1"), ("--jitter .4 .4 .2 .7", "hue is at most 0.5"),
        ("--jitter_prob nan", "--jitter_prob nan"), ("--gray_prob 7", "--gray_prob 7"),
        ("--global_crops_number 3", "--global_crops_number 3: give 1 or 2"),
        ("--global_crops_number 1 --local_crops_number 0", "leaves no pair of views"),
    ],
)  # fmt: skip
def test_values_without_sense_are_refused(program, flags, message):
    """One line with the flag and the value."""
    with pytest.raises(InputError, match=message):
        resolved(*flags.split(), program=program)


def test_one_global_crop_trains(small, tmp_path):
    """A teacher of one view and two local ones for the student; the recorded run can be continued."""
    flags = [*VIT, "--global_crops_number", 1, "--data_path", small, "--eval_every", 0, "--output_dir", tmp_path]
    assert train(*flags, "--max_steps", 2) == 0
    assert train(*flags, "--max_steps", 4) == 0
    assert rows(tmp_path)[-1]["train_loss"] > 0
    content = read_checkpoint(tmp_path / "checkpoint.pth")
    assert content["args"]["global_crops_number"] == 1
    assert content["dino_loss"]["center"].abs().max() > 0


def test_colours_belong_to_the_mathematics_of_older_runs_too(small, tmp_path):
    """A run that recorded no probabilities had the published ones: it goes on with them, and refuses others."""
    flags = [*VIT, "--data_path", small, "--eval_every", 0, "--output_dir", tmp_path, "--max_steps"]
    assert train(*flags, 1) == 0
    content = read_checkpoint(tmp_path / "checkpoint.pth")
    for key in ("blur_prob", "solarize_prob", "jitter", "jitter_prob", "gray_prob", "momentum_teacher_end"):
        del content["args"][key]
    for file in tmp_path.glob("checkpoint*.pth"):
        file.unlink()
    save_checkpoint(content, tmp_path / "checkpoint.pth")
    with pytest.raises(InputError, match=r"gray_prob: 0\.2 -> 0\.5"):
        train(*flags, 2, "--gray_prob", 0.5)
    assert train(*flags, 2) == 0
