"""How a step's images are shared out."""

from __future__ import annotations

import argparse

import pytest

from runtime.guards import InputError
from training.plan import Plan, split_batch


def wanted(total=None, most=100, accum=None) -> argparse.Namespace:
    return argparse.Namespace(global_batch_size=total, batch_size_per_gpu=most, grad_accum=accum)


@pytest.mark.parametrize(
    ("world", "args", "expected"),
    [
        (1, wanted(), (100, 1)), (4, wanted(800), (100, 2)), (8, wanted(800), (100, 1)), (16, wanted(800), (50, 1)),
        (2, wanted(64, accum=4), (8, 4)), (1, wanted(accum=3), (100, 3)), (1, wanted(300), (100, 3)),
        (1, wanted(250), (50, 5)), (8, wanted(808, accum=101), (1, 101)),
    ],
)  # fmt: skip
def test_global_batch_is_shared_out(world, args, expected):
    """The global batch sets the batch per process, and accumulation if that would be too large."""
    assert split_batch(args, world) == expected


@pytest.mark.parametrize(
    ("world", "args", "message"),
    [
        (2, wanted(65), "65 cannot be shared equally by 2"),
        (2, wanted(64, accum=3), "32 images each, which --grad_accum 3 does not divide"),
        (8, wanted(808), "101 forwards of only 1; choose a global batch such as 800 or 816"),
    ],
)
def test_a_batch_that_cannot_be_shared(world, args, message):
    """Refused with the numbers and the remedy; a prime number of images is not run one by one without being asked."""
    with pytest.raises(InputError, match=message):
        split_batch(args, world)


def test_the_global_batch_of_a_plan():
    """Images per forward, times forwards, times processes."""
    assert Plan(batch_size=5, accum=3, steps_per_epoch=9, world_size=4).global_batch == 60
