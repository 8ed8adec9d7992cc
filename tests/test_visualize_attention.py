"""visualize_attention.py from the command line."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import visualize_attention
from runtime.guards import InputError
from tests.small_images import small_root, tiny_checkpoint


@pytest.fixture(scope="module")
def root(cifar10, tmp_path_factory):
    return small_root(cifar10, tmp_path_factory.mktemp("root"), train=1, val=3)


def test_two_checkpoints_are_shown_side_by_side(root, tmp_path):
    """Official beside SimPool gives a grid and, for each image and model, pictures, every [CLS] head included."""
    one = tiny_checkpoint(tmp_path / "run" / "official.pth", mode="official")
    two = tiny_checkpoint(tmp_path / "run" / "simpool.pth")
    flags = ["--threshold", "0.6", "--num_images", "2", "--image_size", "64", "96", "--data_path", str(root)]
    assert visualize_attention.main(["--pretrained_weights", str(one), str(two), *flags]) == 0
    files = sorted(p.name for p in (tmp_path / "run" / "attention").iterdir())
    assert "grid.png" in files
    assert sum(name.endswith("-image.png") for name in files) == 2
    assert sum("SimPool" in name for name in files) == 2 * 3
    assert sum("CLS" in name for name in files) == 2 * (3 + 2)
    single = next(name for name in files if name.endswith("overlay.png"))
    assert np.asarray(Image.open(tmp_path / "run" / "attention" / single)).shape == (64, 96, 3)


def test_a_folder_of_frames_becomes_a_video(root, tmp_path):
    """--video writes one picture per frame, the image next to its overlay, and a GIF of all of them."""
    checkpoint = tiny_checkpoint(tmp_path / "simpool.pth")
    assert visualize_attention.main(["--pretrained_weights", str(checkpoint), "--image_path", str(root / "val"),
                                     "--video", "--output_dir", str(tmp_path / "out")]) == 0  # fmt: skip
    frames = sorted((tmp_path / "out" / "video").iterdir())
    assert len(frames) == 12
    assert np.asarray(Image.open(frames[0])).shape == (32, 64, 3)
    with Image.open(tmp_path / "out" / "video.gif") as film:
        assert film.n_frames == 12


def test_a_video_has_as_many_frames_as_asked(root, tmp_path):
    """--num_images limits the frames of a folder."""
    checkpoint = tiny_checkpoint(tmp_path / "simpool.pth")
    flags = ["--image_path", str(root / "val"), "--video", "--num_images", "5", "--output_dir", str(tmp_path / "out")]
    assert visualize_attention.main(["--pretrained_weights", str(checkpoint), *flags]) == 0
    assert len(list((tmp_path / "out" / "video").iterdir())) == 5


def test_the_demo_shows_photographs_beside_an_untrained_network(tmp_path):
    """--data_path demo takes whole photographs, and --untrained adds a column of the same network's random weights."""
    checkpoint = tiny_checkpoint(tmp_path / "simpool.pth")
    flags = ["--num_images", "2", "--image_size", "64", "--untrained", "--output_dir", str(tmp_path / "out")]
    assert visualize_attention.main(["--pretrained_weights", str(checkpoint), "--data_path", "demo", *flags]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"cat-image.png", "cat-untrained-map.png", "grid.png"} <= names


def test_masks_are_drawn_for_every_checkpoint(root, tmp_path):
    """--masks writes what masked image modelling would hide of the images, by each checkpoint's attention."""
    paths = [str(tiny_checkpoint(tmp_path / f"{mode}.pth", mode=mode)) for mode in ("official", "simpool")]
    flags = ["--data_path", str(root), "--num_images", "2", "--masks", "--mask_ratio", "0.4"]
    flags += ["--output_dir", str(tmp_path / "out")]
    assert visualize_attention.main(["--pretrained_weights", *paths, *flags]) == 0
    assert len(list((tmp_path / "out").glob("*-masks.png"))) == 2
    assert visualize_attention.main(["--pretrained_weights", paths[0], *flags]) == 0
    with Image.open(tmp_path / "out" / "masks.png") as picture:
        assert picture.width > 7 * 224


def test_images_of_a_labelled_set_come_from_different_classes(root):
    """The first images of a labelled set are taken class by class in turn."""
    source = visualize_attention.open_images(root, "val")
    assert source.labels[visualize_attention.spread(source, 4)].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--masks", "--mask_ratio", "0"], "--mask_ratio 0"),
        (["--masks", "--show_max", "1"], "--show_max 1"),
        (["--masks", "--video"], "leave one of them out"),
        (["--image_size", "33"], "33 33.*32 32"),
        (["--threshold", "1.5"], "1.5"),
        (["--titles", "a", "b"], "2 names for 1"),
        (["--num_images", "0"], "num_images 0"),
        (["--fps", "0"], "fps 0"),
        (["--fps", "nan"], "fps nan"),
        (["--image_size", "1000000"], "image_size 1000000"),
        (["--image_path", "/nowhere.jpg"], "either --image_path"),
    ],
)
def test_bad_input_is_an_error_that_shows_the_value(root, tmp_path, flags, message):
    """Sizes that no patch divides, thresholds out of range and flags that contradict each other are named."""
    checkpoint = tiny_checkpoint(tmp_path / "simpool.pth")
    with pytest.raises(InputError, match=message):
        visualize_attention.main(["--pretrained_weights", str(checkpoint), "--data_path", str(root), *flags])


def test_missing_images_and_models_without_attention_are_errors(tmp_path, imagenet_sample):
    """A file that is not there is named; a network pooled by averaging is an error that names SimPool."""
    checkpoint = tiny_checkpoint(tmp_path / "simpool.pth")
    with pytest.raises(InputError, match=r"nowhere\.jpg"):
        visualize_attention.main(["--pretrained_weights", str(checkpoint), "--image_path", "/nowhere.jpg"])
    photo = str(sorted(imagenet_sample.iterdir())[0])
    with pytest.raises(InputError, match=r"(?i)simpool"):
        visualize_attention.main(["--arch", "resnet18", "--gamma", "2.0", "--img_size", "32", "--image_path", photo,
                                  "--output_dir", str(tmp_path)])  # fmt: skip


def test_maps_of_any_attentive_pooling(tmp_path, imagenet_sample):
    """The checkpoint tells the operator; one without a map is an error that names those with one."""
    flags = ["--image_path", str(imagenet_sample), "--num_images", "1", "--image_size", "64", "--output_dir"]
    for mode in ("cls", "kmeans", "cbam"):
        checkpoint = tiny_checkpoint(tmp_path / f"{mode}.pth", mode=mode)
        weights = ["--pretrained_weights", str(checkpoint)]
        assert visualize_attention.main([*weights, *flags, str(tmp_path / mode)]) == 0
        with Image.open(tmp_path / mode / "grid.png") as picture:
            assert picture.width > picture.height
    checkpoint = tiny_checkpoint(tmp_path / "max.pth", mode="max")
    with pytest.raises(InputError, match=r'"max" has no attention map; build it with mode="simpool", or with how'):
        visualize_attention.main(["--pretrained_weights", str(checkpoint), *flags, str(tmp_path / "max")])
