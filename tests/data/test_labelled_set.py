"""Labelled training batches: timm's pixels, seeded by (seed, epoch, index)."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch
from PIL import Image

from data.datasets import open_images
from data.draws import TRANSFORM, seed_generators
from data.labelled_set import LabelledSet, TransformSpec, TransformViews, transforms
from data.loader import build_loader
from data.sampler import TrainSampler
from runtime.guards import InputError

FULL = TransformSpec(size=24, auto_augment="rand-m9-mstd0.5-inc1", reprob=0.5)
SPLITS = dataclasses.replace(FULL, splits=3, reprob=1.0, erase_first_split=False)


@pytest.fixture(scope="module")
def source():
    return open_images("demo:32", "train", subset=2)


def pairs(*indices: int, epoch: int = 0) -> list[tuple[int, int]]:
    return [(epoch, index) for index in indices]


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", None, "augmix-m3-w3"])
def test_an_image_is_what_timms_own_pipeline_makes_of_it(source, policy, mode):
    """Crop, flip, augmentation, normalisation and erasing: timm's transform under the same seeds, to float rounding."""
    from timm.data import create_transform

    spec = dataclasses.replace(FULL, auto_augment=policy, reprob=0.7, remode=mode)
    views = TransformViews(spec)
    (found,) = views.on_device(views.dataset(source, seed=3).__getitems__(pairs(*range(12), epoch=2)))
    whole = create_transform(
        24, is_training=True, auto_augment=policy, interpolation="random", re_prob=0.7, re_mode=mode, color_jitter=0.4
    )
    for index in range(12):
        image = Image.fromarray(source.load(index))
        seed_generators(3, TRANSFORM, 2, index)
        try:
            expected = whole(image)
        except ValueError as error:  # timm's posterize, with versions of Pillow that refuse 0 bits
            if "bits must be between" not in str(error):
                raise
            continue
        torch.testing.assert_close(found[index], expected, rtol=1e-5, atol=1e-5)  # two orders of /255, -mean, /std


def test_batches_do_not_depend_on_workers_or_on_their_neighbours(source):
    """The same pixels, labels and rectangles with 0 and 2 workers, and alone in a batch."""
    dataset = LabelledSet(source, SPLITS, seed=1)
    alone = [dataset.__getitems__(pairs(i)) for i in (4, 7)]
    together = dataset.__getitems__(pairs(4, 7))
    assert torch.equal(together.crops[0], torch.cat([b.crops[0] for b in alone], dim=1))
    for workers in (0, 2):
        batches = list(build_loader(dataset, TrainSampler(len(source), 4, seed=1), workers))
        if workers == 0:
            expected = batches
    for one, other in zip(expected, batches, strict=True):
        assert torch.equal(one.crops[0], other.crops[0])
        assert all(torch.equal(a, b) for a, b in zip(one[1:], other[1:], strict=True))


def test_the_process_draws_on_as_if_nothing_had_happened(source):
    """Loading in the training process leaves its random generators alone."""
    states = []
    for load in (False, True):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        if load:
            LabelledSet(source, FULL, seed=1).__getitems__(pairs(0, 1))
        states.append((random.random(), np.random.rand(), torch.rand(()).item()))
    assert states[0] == states[1]


def test_epochs_seeds_and_repetitions_differ(source):
    """Another epoch, seed or repetition gives other pixels of the same image, with its label."""
    one = LabelledSet(source, FULL, seed=1)
    shown = [
        one.__getitems__(pairs(5)), one.__getitems__(pairs(5, epoch=1)),
        LabelledSet(source, FULL, seed=2).__getitems__(pairs(5)), one.__getitems__(pairs(5 + len(source))),
    ]  # fmt: skip
    assert len({batch.crops[0].numpy().tobytes() for batch in shown}) == 4
    assert {int(batch.labels) for batch in shown} == {int(source.labels[5])}
    assert int(shown[3].index) == 5 + len(source)


def test_splits_lie_one_after_the_other_and_the_first_is_clean(source):
    """The first crop is cropped and flipped only, and not erased; labels repeat split by split."""
    batch = LabelledSet(source, SPLITS, seed=0).__getitems__(pairs(0, 1, 2))
    clean = dataclasses.replace(SPLITS, splits=1, auto_augment=None, color_jitter=0.0, reprob=0.0)
    expected = LabelledSet(source, clean, seed=0).__getitems__(pairs(0, 1, 2))
    assert batch.crops[0].shape == (3, 3, 3, 24, 24)
    assert torch.equal(batch.crops[0][0], expected.crops[0][0])
    assert not torch.equal(batch.crops[0][1], batch.crops[0][2])
    assert batch.labels.tolist() == expected.labels.tolist() * 3
    assert batch.boxes[:, 0].min() >= 3  # crops 0 to 2 are the first split
    views = TransformViews(SPLITS)
    (images,) = views.on_device(batch)
    (whole,) = views.on_device(batch._replace(boxes=batch.boxes[:0], noise=batch.noise[:0]))
    changed = (images != whole).flatten(1).any(dim=1)
    assert sorted({int(row) for row in batch.boxes[:, 0]}) == changed.nonzero().flatten().tolist()


def test_a_substitute_brings_its_own_label(tmp_path):
    """Where a file is broken, the batch shows another image with that image's label, and marks it as bad."""
    for name, colour in (("a", 40), ("b", 200)):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (32, 32), (colour,) * 3).save(tmp_path / "train" / name / f"{i}.png")
    (tmp_path / "train" / "a" / "1.png").write_bytes(b"no image")
    source = open_images(tmp_path, "train")
    plain = dataclasses.replace(FULL, auto_augment=None, color_jitter=0.0, reprob=0.0)
    batch = LabelledSet(source, plain, seed=0).__getitems__([(epoch, 1) for epoch in range(20)])
    assert batch.bad.all()
    shown = (batch.crops[0][0, :, 0, 0, 0] > 100).long()
    assert torch.equal(batch.labels, shown)
    assert set(batch.labels.tolist()) == {0, 1}
    with pytest.raises(InputError, match=r"1\.png"):
        LabelledSet(source, plain, seed=0, on_bad_image="raise").__getitems__(pairs(1))


def test_every_magnitude_of_a_policy_works(source):
    """The strongest posterize keeps 0 bits, which some versions of Pillow refuse: the image is black instead."""
    _, augment, _ = transforms(dataclasses.replace(FULL, auto_augment="rand-m10-n4-p1.0-inc1"))
    image = Image.fromarray(source.load(0))
    for seed in range(60):
        seed_generators(seed, TRANSFORM)
        assert augment(image).size == image.size


@pytest.mark.parametrize(("policy", "named"), [("wild-m9", "wild-m9"), ("rand-x9", "rand-x9")])
def test_unknown_policies_are_named(policy, named):
    """The error shows how a policy is written."""
    with pytest.raises(InputError, match=f"--auto_augment {named}.*rand-m9-mstd0.5-inc1"):
        transforms(dataclasses.replace(FULL, auto_augment=policy))
