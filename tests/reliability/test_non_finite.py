"""A number that is not finite on one rank: refused on all, nothing poisoned, and a file that shows it again."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from runtime.checkpoint import read_checkpoint
from tests import processes
from tests.pretraining import FAMILIES, VIT
from tests.reliability import injection


def assert_all_finite(path: Path) -> dict:
    """Student, teacher, center, optimizer and BatchNorm's statistics; returns the checkpoint."""
    content = read_checkpoint(path)
    moments = [v for state in content["optimizer"]["state"].values() for v in state.values()]
    for values in (content["student"].values(), content["teacher"].values(), content["dino_loss"].values(), moments):
        assert all(value.isfinite().all() for value in values if getattr(value, "is_floating_point", bool)())
    return content


@pytest.mark.parametrize(
    ("family", "fault"),
    [
        ("vit", injection.nan_loss),
        ("vit", injection.infinite_gradient),
        ("resnet", injection.nan_loss),
        pytest.param("resnet", injection.infinite_gradient, marks=pytest.mark.full),
    ],
)
def test_a_loss_or_gradient_of_one_rank_stops_both(small, tmp_path, family, fault):
    """Rank 1 alone is hit from step 2 on: both refuse the same steps, stop with code 3 after --max_bad_steps, and
    leave the state of step 2.
    """
    flags = [*FAMILIES[family], "--data_path", small, "--epochs", 9, "--eval_every", 0, "--global_batch_size", 16]
    flags += ["--max_bad_steps", 3, "--output_dir", tmp_path / "run", "--checkpoint_every_steps", 1]
    ranks = processes.start(flags, tmp_path, world=2, patch=partial(fault, first=2))
    assert ranks.wait() == [3, 3], ranks.text()
    assert "3 steps in a row were not finite, the last at step 4" in ranks.text(0)
    saved = assert_all_finite(tmp_path / "run" / "checkpoint.pth")
    replay = assert_all_finite(tmp_path / "run" / "replay_step00000004.pth")
    assert replay["replay"]["step"] == 4
    before = assert_all_finite(tmp_path / "run" / "checkpoint_step00000004.pth")
    for content in (saved, replay):
        for name, value in before["teacher"].items():
            assert (content["teacher"][name] == value).all(), name


def test_an_image_that_breaks_the_step_is_found_by_its_replay(small, tmp_path):
    """One image turns to NaN on the way to the network: both ranks stop, the file names it, and a replay shows the
    rank that had it, and the other finite.
    """
    root = tmp_path / "images"
    root.mkdir()
    for i, image in enumerate(sorted(small.glob("train/*/*"))[:3]):
        (root / f"{i}.png").write_bytes(image.read_bytes())
    Image.new("RGB", (48, 48)).save(root / "3.png")
    flags = [*VIT, "--data_path", root, "--epochs", 9, "--global_batch_size", 4, "--max_bad_steps", 2]
    ranks = processes.start(
        [*flags, "--output_dir", tmp_path / "run"], tmp_path, 2, patch=injection.black_images_become_nan
    )
    assert ranks.wait() == [3, 3], ranks.text()
    (file,) = (tmp_path / "run").glob("replay_step*.pth")
    names = assert_all_finite(file)["replay"]["names"]
    hit = [any(name.endswith("3.png") for batch in rank for name in batch) for rank in names]
    assert sorted(hit) == [False, True]
    again = processes.start(["--replay", file], tmp_path, patch=injection.black_images_become_nan)
    assert again.wait() == [3], again.text()
    for rank, bad in enumerate(hit):
        (line,) = [line for line in again.text().splitlines() if f", rank {rank}:" in line]
        assert line.endswith("not finite, refused" if bad else ": finite")
    processes.run(["--replay", file], tmp_path)  # without the fault: finite, code 0
