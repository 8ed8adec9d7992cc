"""The images of a run, and what --keep_best needs of them."""

from __future__ import annotations

import pytest

from runtime.checkpoint import read_checkpoint
from runtime.guards import InputError
from tests.pretraining import VIT, rows, train


def test_the_best_checkpoint_is_that_of_the_best_knn(small, tmp_path):
    """In a self-supervised run the score is top-1 of the first k; the file stays while later epochs are worse."""
    flags = [*VIT, "--data_path", small, "--output_dir", tmp_path, "--epochs", 3, "--lr", 0.1, "--eval_every", 1]
    assert train(*flags, "--nb_knn", 5, 10, "--keep_best", "true") == 0
    scores = [row["k-NN"]["5"]["top1"] for row in rows(tmp_path)]
    best = read_checkpoint(tmp_path / "best.pth")
    assert (best["epoch"], best["best"]) == (1 + scores.index(max(scores)), max(scores))


def test_without_an_evaluation_there_is_no_best(imagenet_sample, tmp_path):
    """Images without labels are trained on, with a note; --keep_best true asks for more than that."""
    flags = [*VIT, "--data_path", imagenet_sample, "--output_dir", tmp_path, "--max_steps", 1]
    with pytest.raises(InputError, match=r"--keep_best true needs an evaluation while training: .* no labels"):
        train(*flags, "--keep_best", "true")
