"""Retrieval: average precision by hand, PCA by its definition, the pyramid of scales."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from evaluation.retrieval import PCA, compute_ap, compute_map, multi_scale
from tests.reference import tensor


def test_average_precision_by_hand():
    """Relevant images at places 0 and 2 of a ranking give the trapezoids (1 + 1)/2 and (1/2 + 2/3)/2, over two."""
    assert compute_ap(np.array([0, 2]), 2) == pytest.approx(0.5 * (1 + 7 / 12))
    assert compute_ap(np.array([1]), 1) == pytest.approx(0.25)
    assert compute_ap(np.array([0, 1, 2]), 3) == pytest.approx(1.0)


def test_junk_images_are_taken_out_of_the_ranking():
    """Junk before a relevant image costs nothing; a query without relevant images does not count."""
    ranks = np.array([[4, 0], [0, 1], [1, 2], [2, 3], [3, 4]])
    gnd = [{"ok": [0, 1], "junk": [4]}, {"ok": []}]
    mean, aps, precisions, per_query = compute_map(ranks, gnd, [1, 5])
    assert mean == pytest.approx(1.0)
    assert np.isnan(aps[1])
    assert precisions.tolist() == [1.0, 1.0]
    assert np.isnan(per_query[1]).all()
    assert compute_map(ranks, [{"ok": [0, 1], "junk": []}, {"ok": []}])[0] < 1


def test_pca_whitens():
    """With whit 0.5 the projected data have unit covariance; arrays and tensors agree, and stay as they were."""
    data = (tensor(1, (500, 6)) @ tensor(2, (6, 6))).double().numpy()
    data -= data.mean(0)
    pca = PCA(dim=4, whit=0.5)
    pca.train_pca(np.cov(data, rowvar=False))
    before = data.copy()
    projected = pca.apply(data)
    assert np.allclose(np.cov(projected, rowvar=False), np.eye(4), atol=1e-8)
    assert np.allclose(pca.apply(torch.from_numpy(data)).numpy(), projected)
    pca.mean = np.ones(6)
    assert np.allclose(pca.apply(data), projected - np.ones(6) @ pca.dvt.T)
    assert np.array_equal(data, before)


def test_multi_scale_is_the_normalised_mean_over_three_sizes():
    """Features at scales 1, 1/sqrt(2), 1/2 are averaged and normalised per image; remainders of patches are dropped."""
    images = tensor(3, (2, 3, 32, 32))
    seen = []

    class Model(torch.nn.Module):
        patch_size = 4

        def forward(self, x):
            seen.append(tuple(x.shape[-2:]))
            return x.mean((2, 3))

    feature = multi_scale(images, Model())
    assert seen == [(32, 32), (20, 20), (16, 16)]
    assert torch.allclose(feature.norm(dim=1), torch.ones(2))
    alone = torch.cat([multi_scale(image[None], Model()) for image in images])
    assert torch.allclose(feature, alone)
    scaled = F.interpolate(images, scale_factor=0.5, mode="bilinear", align_corners=False)
    assert scaled.shape[-1] == 16
