"""Features: each image once, in order, stored so that they can be trusted later."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from data.datasets import open_images
from evaluation import features
from runtime.guards import InputError
from tests.small_images import small_root

SETTINGS = {"img_size": 32, "batch_size": 7, "num_workers": 0, "show_progress": False}


class Pixels(torch.nn.Module):
    """A model whose feature tells which image it saw, and whether it was in eval mode."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.modes = []

    def forward(self, x):
        self.modes.append(self.training)
        return torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1) * self.weight


@pytest.fixture(scope="module")
def root(cifar10, tmp_path_factory):
    return small_root(cifar10, tmp_path_factory.mktemp("root"))


def test_features_come_in_the_order_of_the_data_set(root):
    """Row i is the feature of image i, whatever the batches; the model runs in eval mode and gets its mode back."""
    source, model = open_images(root, "train"), Pixels().train()
    whole, order = features.extract(model, source, **SETTINGS)
    assert order.tolist() == list(range(96))
    assert whole.shape == (96, 48)
    assert not any(model.modes)
    assert model.training
    for i in (0, 50, 95):
        alone, index, _ = features.extract_shard(model, source, indices=np.array([i]), **SETTINGS)
        assert index.tolist() == [i]
        assert torch.equal(alone[0], whole[i])
    half, _ = features.extract(model, source, dtype=torch.float16, **SETTINGS)
    assert torch.equal(half, whole.half())


def test_features_that_are_not_finite_are_refused(root):
    """A diverged model is an error before anything is computed from its features."""
    model = Pixels()
    model.weight.data.fill_(float("nan"))
    with pytest.raises(InputError, match="not finite"):
        features.extract(model, open_images(root, "val"), **SETTINGS)


def test_an_image_of_another_number_of_channels_is_named(tmp_path):
    """One npy of 4 channels among those of 5: extraction stops, naming the file, its shape and the flag."""
    for i in range(6):
        np.save(tmp_path / f"{i}.npy", np.full((40, 40, 4 if i == 3 else 5), 9 * i, np.uint8))
    with pytest.raises(InputError, match=r"3\.npy has shape \(40, 40, 4\).*--in_chans"):
        features.extract(Pixels(), open_images(tmp_path, in_chans=5), **SETTINGS)


def test_labels_must_be_there_agree_and_fill_every_class(root, tmp_path):
    """Unlabelled images, classes that differ, one class only, and an empty class are errors that name them."""
    train, val = open_images(root, "train"), open_images(root, "val")
    features.require_labels(train, val)
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, image in enumerate(sorted((root / "val").rglob("*.*"))[:4]):
        shutil.copy(image, flat / f"{i}{image.suffix}")
    with pytest.raises(InputError, match="no labels"):
        features.require_labels(open_images(flat), val)
    name = train.classes[0]
    shutil.copytree(root, tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "val" / name)
    with pytest.raises(InputError, match=name):
        features.require_labels(open_images(tmp_path / "other", "train"), open_images(tmp_path / "other", "val"))
    for split in ("train", "val"):
        shutil.copytree(root / split / name, tmp_path / "one" / split / name)
    with pytest.raises(InputError, match=f"one class only.*{name}"):
        features.require_labels(open_images(tmp_path / "one", "train"), open_images(tmp_path / "one", "val"))
    lines = [f"{image} {label}" for image, label in zip(sorted((root / "val").rglob("*.*"))[:2], (0, 2), strict=True)]
    for split in ("train", "val"):
        (tmp_path / f"{split}.txt").write_text("\n".join(lines))
    with pytest.raises(InputError, match="no image of class '1'"):
        features.require_labels(open_images(tmp_path, "train"), open_images(tmp_path, "val"))


def test_small_images_are_evaluated_whole():
    """224 pixels are cut from 256 as published; images under 96 pixels are not cut at all."""
    assert features.eval_resize(224) == 256
    assert features.eval_resize(32) == 32
