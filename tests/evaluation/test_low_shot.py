"""Low-shot k-NN: which images vote, and what is reported."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evaluation import low_shot
from evaluation.knn import knn_classifier
from runtime.guards import InputError
from tests.evaluation.test_knn import CASES, golden_features


@pytest.fixture(scope="module")
def data():
    return golden_features(CASES[0])


def test_low_shot_takes_file_order_from_the_published_starts(data):
    """nu = 5 from start 10 are the images 10 to 14 of each class, and five runs give their mean and spread."""
    labels = data[1]
    index = low_shot.low_shot_indices(labels, 5, 10)
    for c in range(20):
        assert index[labels[index] == c].tolist() == torch.where(labels == c)[0][10:15].tolist()
    result = low_shot.low_shot_knn(*data, nus=(1, 5))
    runs = []
    for start in (0, 5, 10, 15, 20):
        chosen = low_shot.low_shot_indices(labels, 5, start)
        runs.append(knn_classifier(data[0][chosen], labels[chosen], *data[2:], 20, 0.07)[0])
    assert result[5]["runs"] == runs
    assert result[5]["mean"] == pytest.approx(np.mean(runs))
    assert result[1]["k"] == 1


def test_low_shot_draws_depend_on_the_seed_alone(data):
    """Random draws repeat for a seed, differ for another, and hold nu images of every class."""
    first, again, other = (low_shot.low_shot_indices(data[1], 10, None, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.bincount(data[1][first]).tolist() == [10] * 20


def test_low_shot_names_the_class_with_too_few_images(data):
    """A class with fewer than nu images is an error that names it."""
    keep = (data[1] != 3) | (torch.cumsum(data[1] == 3, 0) <= 4)
    names = [f"class{c}" for c in range(20)]
    with pytest.raises(InputError, match="'class3' has 4 training images"):
        low_shot.low_shot_indices(data[1][keep], 5, None, classes=names)
    with pytest.raises(InputError, match="low_shot_draw random"):
        low_shot.low_shot_indices(data[1][keep], 4, 10, classes=names)
