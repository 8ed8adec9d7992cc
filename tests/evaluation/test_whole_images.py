"""Whole images for localisation: squashed, or of their own size."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from data.datasets import open_images
from evaluation.whole_images import OwnSizeSet, SquashedSet, bounded
from runtime.guards import InputError


@pytest.fixture
def source(imagenet_sample, tmp_path):
    """Two photographs, and a file that is none."""
    for path, name in zip(sorted(imagenet_sample.iterdir())[:2], "ab", strict=False):
        Image.open(path).convert("RGB").save(tmp_path / f"{name}.png")
    (tmp_path / "c.jpg").write_bytes(b"no image")
    return open_images(tmp_path, check=False)


def test_nothing_is_cut_off(source):
    """The squashed image is the whole one, resized as Pillow resizes it, to a level of rounding."""
    images, index = SquashedSet(source, 48).__getitems__([0, 1])
    assert images.shape == (2, 3, 48, 48)
    assert index.tolist() == [0, 1]
    for i in range(2):
        expected = Image.fromarray(source.load(i)).resize((48, 48), Image.Resampling.BILINEAR)
        expected = torch.frombuffer(bytearray(expected.tobytes()), dtype=torch.uint8).view(48, 48, 3).permute(2, 0, 1)
        assert (images[i].int() - expected.int()).abs().max() <= 1


def test_images_keep_their_size_or_get_a_bound(source):
    """max_side concerns the longer side of larger images only, and keeps the shape."""
    height, width = source.load(0).shape[:2]
    image, index = OwnSizeSet(source).__getitems__([0])
    assert (tuple(image.shape), index.tolist()) == ((1, 3, height, width), [0])
    small = bounded(image, 50)
    assert max(small.shape[-2:]) == 50
    assert small.shape[-1] / small.shape[-2] == pytest.approx(width / height, rel=0.05)
    assert bounded(image, max(height, width)) is image
    assert bounded(torch.zeros(1, 3, 1, 900, dtype=torch.uint8), 100).shape == (1, 3, 1, 100)


def test_bad_files_are_named_or_left_out(source):
    """raise: an error with the file and the remedy; skip: the others only."""
    for images in (SquashedSet(source, 48), OwnSizeSet(source)):
        with pytest.raises(InputError, match=r"c\.jpg .*--on_bad_image skip"):
            images.__getitems__([2])
    images, index = SquashedSet(source, 48, "skip").__getitems__([0, 2, 1])
    assert (len(images), index.tolist()) == (2, [0, 1])
    images, index = OwnSizeSet(source, 0, "skip").__getitems__([2])
    assert (len(images), index.tolist()) == (0, [])
