"""What a sample looks like depends on (seed, epoch, index) and on nothing else."""

from __future__ import annotations

import hashlib

import pytest

from data.augment import CropSpec
from data.datasets import open_images
from data.loader import build_train_loader
from data.sampler import TrainSampler

SAMPLES, BATCH = 1000, 20  # BATCH: images per step over all ranks


def hashes(source, workers: int = 0, world: int = 1, parts: tuple[int, ...] = (SAMPLES // BATCH,)) -> dict[int, str]:
    """Image -> SHA-256 of its crops and colour parameters, of one epoch read by `world` ranks. `parts`: the steps
    between one start of the loaders and the next.
    """
    spec = CropSpec(global_size=32, local_size=16, local_number=2)
    found: dict[int, str] = {}
    for rank in range(world):
        first = 0
        for steps in parts:
            sampler = TrainSampler(SAMPLES, BATCH // world, 1, 7, rank, world)
            sampler.set_position(3, first)
            loader = build_train_loader(source, spec, sampler, workers, seed=7)
            for _, batch in zip(range(steps), loader, strict=False):
                for b, index in enumerate(batch.index.tolist()):
                    pieces = [t[:, b].contiguous().numpy().tobytes() for t in (*batch.crops, *batch.colour)]
                    assert index not in found
                    found[index] = hashlib.sha256(b"".join(pieces)).hexdigest()
            first += steps
    return found


@pytest.fixture(scope="module")
def source(cifar10):
    images = open_images(cifar10, "train", subset=100)
    assert len(images) == SAMPLES
    return images


@pytest.fixture(scope="module")
def expected(source):
    return hashes(source)


def test_the_hashes_tell_samples_apart(expected):
    """1,000 samples, 1,000 different hashes: equality below means something."""
    assert len(set(expected.values())) == len(expected) == SAMPLES


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # torch's advice on machines with few cores
@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.full), 4])
def test_number_of_workers(source, expected, workers):
    """The same pixels from 0, 1, 2 and 4 loader workers."""
    assert hashes(source, workers=workers) == expected


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.full)])
def test_number_of_ranks(source, expected, world):
    """The same pixels, each once, over 1, 2 and 4 ranks."""
    assert hashes(source, world=world) == expected


def test_after_resume(source, expected):
    """The pixels are the same if the epoch is read in parts, by new loaders."""
    assert hashes(source, workers=1, world=2, parts=(1, 7, 42)) == expected
