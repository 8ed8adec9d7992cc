"""experiments/gallery.sh: the gallery's pictures from trained models."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.boxed_images import boxed_folder
from tests.small_images import tiny_checkpoint

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "gallery.sh"


def draw(*flags: object) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", str(SCRIPT), *map(str, flags)], capture_output=True, text=True, check=False)


@pytest.mark.full
def test_every_picture_is_drawn(tmp_path):
    """Maps, masks and boxes of the runs' models, as JPEGs; the drawn photographs follow from the seed alone."""
    for mode in ("official", "simpool"):
        tiny_checkpoint(tmp_path / "runs" / "simpool" / f"vit_{mode}" / "seed0" / "checkpoint.pth", mode)
    boxes = boxed_folder(tmp_path / "VOC", count=8)
    flags = ["--photos", boxes / "JPEGImages", "--boxes", boxes, "--runs", tmp_path / "runs", "--size", 32]
    pictures = {}
    for folder, seed in (("one", 3), ("same", 3), ("other", 4)):
        done = draw(*flags, "--output_dir", tmp_path / folder, "--seed", seed)
        assert done.returncode == 0, done.stdout + done.stderr
        pictures[folder] = {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()}
    assert sorted(pictures["one"]) == ["attention.jpg", "boxes_cls.jpg", "boxes_simpool.jpg", "masks.jpg"]
    assert pictures["one"]["attention.jpg"] == pictures["same"]["attention.jpg"] != pictures["other"]["attention.jpg"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give the images"),
        (["--photos", ".", "--boxes", ".", "--runs", "."], "run experiments/simpool first"),
        (["--photo", "."], "--photo is no flag of this script"),
    ],
)
def test_bad_input_leaves_with_code_2(flags, message):
    """One line, before anything is drawn."""
    done = draw(*flags)
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr
