"""Training crops of a probe: the published transform, and the label of the image that was cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from data.datasets import open_images
from data.sampler import TrainSampler
from data.source import ImageSource
from evaluation import crops
from runtime.guards import InputError


class Gradients(ImageSource):
    """Image i is a left-to-right ramp of brightness, of class i // 10."""

    def __init__(self, count=40):
        super().__init__(count, np.arange(count) // 10, [str(c) for c in range(4)], where="gradients")

    def load(self, i):
        ramp = np.linspace(0, 255, 60).astype(np.uint8)
        return np.broadcast_to(ramp[None, :, None], (50, 60, 3)).copy()


def test_labels_are_those_of_the_images_and_not_of_their_positions():
    """With a shuffled part of a source, each crop comes with the class of the image that it was cut from."""
    source = open_images("demo", "train")
    indices = np.random.default_rng(0).permutation(len(source))[:64]
    _, labels = crops.ProbeSet(source, indices, 32, 0).__getitems__([(0, position) for position in range(64)])
    assert labels.tolist() == source.labels[indices].tolist()
    assert labels.tolist() != source.labels[:64].tolist()


@pytest.mark.parametrize("size", [(50, 60), (32, 32), (20, 90)])
def test_resizing_is_pillows_bilinear(size):
    """A crop is resized as the published transform does it: antialiased and bilinear, within one level."""
    pixels = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    ours = crops.resize_bilinear(crops.as_batch(pixels), 32)[0].permute(1, 2, 0).numpy()
    theirs = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR))
    assert np.abs(ours.astype(int) - theirs).max() <= 1  # the two round their fixed-point weights differently


def test_half_of_the_crops_are_flipped():
    """On a ramp that rises to the right, about half of the crops fall instead."""
    images, _ = crops.ProbeSet(Gradients(200), np.arange(200), 16, 0).__getitems__([(0, i) for i in range(200)])
    falling = (images[..., 0].float().mean((1, 2)) > images[..., -1].float().mean((1, 2))).float().mean()
    assert 0.36 < falling < 0.64  # four standard deviations of 200 fair coins


def test_crops_cover_from_a_twelfth_of_the_image_to_all_of_it():
    """The width of a crop, told by the range of brightness in it, goes down to scale 0.08 and up to the whole."""
    images, _ = crops.ProbeSet(Gradients(300), np.arange(300), 16, 0).__getitems__([(0, i) for i in range(300)])
    spans = (images.amax((1, 2, 3)).float() - images.amin((1, 2, 3)).float()) / 255
    assert spans.min() < 0.35
    assert spans.max() > 0.9


def test_a_crop_depends_on_seed_epoch_and_image_alone():
    """The same epoch and image give the same crop in any batch; another epoch or seed another."""
    one, other = (crops.ProbeSet(open_images("demo"), np.arange(50), 32, seed) for seed in (0, 1))
    batch, _ = one.__getitems__([(3, 7), (3, 8)])
    assert torch.equal(batch[1], one.__getitems__([(3, 8)])[0][0])
    assert not torch.equal(batch[1], one.__getitems__([(4, 8)])[0][0])
    assert not torch.equal(batch[1], other.__getitems__([(3, 8)])[0][0])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_file_is_one_line_under_workers_too(tmp_path, workers):
    """A file that can't be decoded is an InputError that names it, whichever process met it."""
    for c in "ab":
        (tmp_path / c).mkdir()
        for i in range(4):
            Image.fromarray(np.full((20, 20, 3), 40 * i, np.uint8)).save(tmp_path / c / f"{i}.png")
    (tmp_path / "b" / "2.png").write_bytes(b"no image")
    source = open_images(tmp_path)
    loader = crops.build_probe_loader(source, np.arange(8), TrainSampler(8, 8), 16, workers, 0)
    with pytest.raises(InputError, match=r"2\.png.*on_bad_image skip"):
        list(loader)
