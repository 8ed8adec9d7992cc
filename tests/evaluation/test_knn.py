"""Weighted k-NN: the published numbers, and what must not change them."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.datasets import open_images
from evaluation import knn
from runtime.guards import InputError
from tests.reference import golden, tensor


def golden_features(case):
    rng = np.random.RandomState(case["seed"])
    train_labels = torch.from_numpy(rng.randint(0, case["classes"], case["n"]))
    test_labels = torch.from_numpy(rng.randint(0, case["classes"], case["q"]))
    prototypes = tensor(case["seed"] + 1, (case["classes"], case["d"]))
    train = F.normalize(prototypes[train_labels] + 2.5 * tensor(case["seed"] + 2, (case["n"], case["d"])), dim=1)
    test = F.normalize(prototypes[test_labels] + 2.5 * tensor(case["seed"] + 3, (case["q"], case["d"])), dim=1)
    return train, train_labels, test, test_labels


CASES = golden("knn")


@pytest.fixture(scope="module")
def data():
    return golden_features(CASES[0])


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"k{case['k']}")
def test_matches_the_published_accuracies(case):
    """Top-1 is the published code's for every k, and top-5 where classes without a vote cannot tie (k >= 20)."""
    top1, top5 = knn.knn_classifier(*golden_features(case), case["k"], case["T"])
    assert top1 == pytest.approx(case["acc"][0].item(), abs=1e-4)
    if case["k"] >= 20:
        assert top5 == pytest.approx(case["acc"][1].item(), abs=1e-4)


def test_many_k_and_temperatures_equal_one_at_a_time(data):
    """One pass for several k and temperatures gives each the numbers that it gets alone."""
    together = knn.knn_accuracies(*data, [200, 1, 20], [0.07, 0.5])
    assert together == {(k, T): knn.knn_classifier(*data, k, T) for k in (200, 1, 20) for T in (0.07, 0.5)}


@pytest.mark.parametrize("chunk_bytes", [2_000, 60_000])
def test_memory_chunks_do_not_change_the_result(data, chunk_bytes):
    """Blocks of training images and chunks of queries, however small, give the same accuracies."""
    expected = knn.knn_accuracies(*data, [10, 200], [0.07])
    small = [part[:100] for part in data[2:]]
    assert knn.knn_accuracies(*data[:2], *small, [10, 200], [0.07], chunk_bytes=chunk_bytes) == knn.knn_accuracies(
        *data[:2], *small, [10, 200], [0.07]
    )
    assert expected[(10, 0.07)][0] > 30


def test_fp16_storage_is_compared_in_fp32(data):
    """Features stored in fp16 give what the same rounded features give in fp32."""
    half = [part.half() if part.is_floating_point() else part for part in data]
    full = [part.float() if part.is_floating_point() else part for part in half]
    assert knn.knn_classifier(*half, 20, 0.07) == knn.knn_classifier(*full, 20, 0.07)


def test_a_faster_matmul_setting_does_not_leak_in_or_out(data):
    """The accuracies are the exact ones under any float32 matmul setting, which is left as it was."""
    expected = knn.knn_accuracies(*data, [10, 200], [0.07])
    torch.set_float32_matmul_precision("medium")
    assert knn.knn_accuracies(*data, [10, 200], [0.07]) == expected
    assert torch.get_float32_matmul_precision() == "medium"


def test_k_above_the_training_set_is_clamped_and_said(data, capsys):
    """A k above n becomes n, stands under n in the result, and the output names both."""
    train, labels = data[0][:30], data[1][:30]
    result = knn.knn_classifier(train, labels, *data[2:], [20, 100], 0.07)
    assert set(result) == {20, 30}
    said = capsys.readouterr().out
    assert "100" in said
    assert "30" in said


def test_a_class_without_votes_is_never_a_hit():
    """If all neighbours are of one class, top-5 does not count other classes, which got no vote."""
    train, labels = torch.eye(3)[[0, 0, 1, 2]], torch.tensor([0, 0, 1, 2])
    queries = torch.eye(3)[[0, 0, 0, 0]]  # two neighbours, both of class 0, and two places among the first five
    assert knn.knn_classifier(train, labels, queries, torch.tensor([0, 0, 1, 2]), 2, 0.07) == (50.0, 50.0)


def test_small_temperatures_do_not_overflow(data):
    """At T = 0.005, where exp(1/T) overflows float32, the nearest image decides alone."""
    assert knn.knn_classifier(*data, 50, 0.005)[0] == pytest.approx(knn.knn_classifier(*data, 1, 0.07)[0], abs=2.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d[0][:, :5], *d[1:]), "width 5"),
        (lambda d: (d[0], d[1][:-1], *d[2:]), "1999 labels"),
        (lambda d: (d[0], d[1] - 1, *d[2:]), "-1"),
    ],
)
def test_features_that_do_not_fit_are_named(data, change, message):
    """Widths, lengths and labels that do not fit are errors that show the value."""
    with pytest.raises(ValueError, match=message):
        knn.knn_classifier(*change(data), 10, 0.07)


def test_accuracy_counts_hits_among_the_largest():
    """DINO's accuracy: percent of rows whose target is among the k largest outputs."""
    output = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    top1, top2 = knn.accuracy(output, torch.tensor([0, 1]), topk=(1, 2))
    assert (top1.item(), top2.item()) == (50.0, 100.0)


class Pixels(torch.nn.Module):
    """A model of 48 features without weights that train."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        return F.adaptive_avg_pool2d(x, 4).flatten(1) * self.scale


class Loud(Pixels):
    """The same directions, at lengths that grow steeply with an image's contrast."""

    def forward(self, x):
        features = super().forward(x)
        return features * features.std(dim=1, keepdim=True).mul(5).exp()


def test_an_evaluation_compares_directions_and_not_lengths(small):
    """Training and validation features are brought to unit length before they are compared."""
    sources = [open_images(small, split) for split in ("train", "val")]
    results = [knn.evaluate(model, *sources, (5, 20), img_size=32, num_workers=0) for model in (Pixels(), Loud())]
    assert results[0] == results[1]


def test_an_evaluation_while_training_skips_bad_files(small, tmp_path, capsys):
    """Broken files in train and val are left out and counted: the rest scores as a set without them does."""
    settings = {"img_size": 32, "num_workers": 0}
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    for root in (broken, whole):
        shutil.copytree(small, root)
    for split in ("train", "val"):
        file = sorted((broken / split).rglob("*.*"))[3]
        (whole / file.relative_to(broken)).unlink()
        file.write_bytes(b"no image")
    results = [
        knn.evaluate(Pixels(), open_images(root, "train"), open_images(root, "val"), (5, 20), **settings)
        for root in (broken, whole)
    ]
    assert results[0] == results[1]
    said = capsys.readouterr().out
    assert "1 of 96 training images left out" in said
    assert "1 of 40 validation images left out" in said
    with pytest.raises(InputError, match="leaves no image out"):
        knn.evaluate(
            Pixels(), open_images(broken, "train"), open_images(broken, "val"), on_bad_image="raise", **settings
        )


def test_a_set_without_one_readable_image_is_an_error(small, tmp_path):
    """If every validation image is broken there is nothing to say."""
    shutil.copytree(small, tmp_path / "images")
    train, val = (open_images(tmp_path / "images", split) for split in ("train", "val"))
    for file in (tmp_path / "images" / "val").rglob("*.*"):
        file.write_bytes(b"no image")
    with pytest.raises(InputError, match="none of the 40 validation images"):
        knn.evaluate(Pixels(), train, val, (5,), img_size=32, num_workers=0)
