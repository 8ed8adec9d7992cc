"""The scripts of examples/, run as a user runs them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from examples import attention_of_a_photograph, nearest_images, simpool_on_timm
from runtime.guards import InputError
from tests.small_images import small_root, tiny_checkpoint


def test_simpool_on_a_timm_model_learns(capsys):
    """One epoch on the demo set is well above chance, which is 5 % of 19 photographs."""
    simpool_on_timm.main(["--epochs", "1"])
    lines = capsys.readouterr().out.splitlines()
    before, after = (float(line.split(": ")[1].split(" %")[0]) for line in (lines[0], lines[-1]))
    assert after > before + 10
    with pytest.raises(InputError, match="--epochs 0"):
        simpool_on_timm.main(["--epochs", "0"])


def test_nearest_images_of_a_checkpoint(cifar10, tmp_path, capsys):
    """Every row of the picture is a query and five neighbours, and the classes that agree are counted."""
    root = small_root(cifar10, tmp_path / "root")
    checkpoint = tiny_checkpoint(tmp_path / "c.pth")
    picture = tmp_path / "nearest.png"
    nearest_images.main(
        ["--pretrained_weights", str(checkpoint), "--data_path", str(root), "--output", str(picture)]
    )  # fmt: skip
    with Image.open(picture) as image:
        assert image.size == (6 * 96, 8 * 96)
    assert "of 40 neighbours are of the query's class" in capsys.readouterr().out


def test_attention_of_ones_own_photograph(imagenet_sample, tmp_path, capsys):
    """The photograph, its map and the overlay lie side by side; sizes and files that do not do are named."""
    photograph = str(sorted(imagenet_sample.iterdir())[0])
    picture = tmp_path / "map.png"
    flags = ["--pretrained_weights", str(tiny_checkpoint(tmp_path / "c.pth")), "--output", str(picture)]
    attention_of_a_photograph.main([photograph, *flags, "--size", "64"])
    shown = np.asarray(Image.open(picture))
    assert shown.shape == (64, 3 * 64, 3)
    assert not np.array_equal(shown[:, :64], shown[:, 128:])
    assert "times uniform" in capsys.readouterr().out
    for wrong, message in (
        ([photograph, "--size", "65"], "size 65: image size 65x65 is not divisible"),
        (["/nowhere.jpg"], "nowhere.jpg cannot be opened"),
        ([str(tmp_path / "c.pth")], r"c\.pth "),
    ):
        with pytest.raises(InputError, match=message):
            attention_of_a_photograph.main([*wrong, *flags])


@pytest.mark.full
def test_the_examples_run_without_any_argument(tmp_path, monkeypatch, capsys):
    """Untrained networks on the demo set, into the current folder."""
    monkeypatch.chdir(tmp_path)
    nearest_images.main([])
    attention_of_a_photograph.main([])
    assert {path.name for path in tmp_path.iterdir()} == {"nearest.png", "attention_map.png"}
    assert "random weights" in capsys.readouterr().out
