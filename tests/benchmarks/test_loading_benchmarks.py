"""The benchmarks of loading in quick form: both sides make the same of the same images; times are never judged here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import augmentation, eval_loading, file_list_memory
from data.augment import ColourStage, CropSpec
from data.datasets import open_images
from data.eval_set import EvalSet
from data.loader import normalize
from data.source import PackedStrings
from data.train_set import TrainSet
from runtime.reproduce import fix_random_seeds


@pytest.fixture(scope="module")
def photographs(imagenet_sample):
    return open_images(imagenet_sample)


def test_augmented_crops_are_alike(photographs, imagenet_sample):
    """The same shapes, and over 48 images the same brightness and contrast within what chance leaves."""
    fix_random_seeds(0)
    spec = CropSpec(32, 16, local_number=2)
    indices = list(range(48))
    batch = TrainSet(photographs, spec, seed=0).__getitems__([(0, i) for i in indices])
    ours = [crop for group in ColourStage(spec)(batch.crops, batch.colour) for crop in group.split(len(indices))]
    files = [Path(photographs.name(i)) for i in indices]
    published = augmentation.published_batch(files, augmentation.PublishedAugmentation(spec))
    assert [crop.shape for crop in ours] == [crop.shape for crop in published]
    a, b = (torch.cat([crop.flatten() for crop in crops]) for crops in (ours, published))
    assert abs(a.mean() - b.mean()) < 0.1
    assert abs(a.std() - b.std()) < 0.1
    assert all(value > 0 for value in augmentation.measure(imagenet_sample, spec, 8, 4, rounds=1).values())


def test_evaluation_images_are_alike(photographs):
    """Both ways give the same picture, but for the rounding of their resizes."""
    indices = [0, 1, 2, 3]
    usual = eval_loading.usual_batch(photographs, indices, eval_loading.usual_transform(64, 72))
    ours = normalize(EvalSet(photographs, 64, 72).__getitems__(indices)[0])
    assert usual.shape == ours.shape
    assert (usual - ours).abs().mean() < 0.02
    assert all(value > 0 for value in eval_loading.measure(photographs, 64, 72, 4, 2, rounds=1))


def test_lists_of_files_are_the_same():
    """The flat arrays hold the names of the list, and less memory in each process that reads them."""
    names = file_list_memory.names(200_000)
    packed = PackedStrings.pack(names)
    assert [packed[i] for i in (0, 1, 199_999)] == [names[i] for i in (0, 1, 199_999)]
    empty = file_list_memory.total_memory([], 2)
    flat = file_list_memory.total_memory(packed, 2) - empty
    assert file_list_memory.total_memory(names, 2) - empty > flat + 2 * 50 * len(names)
