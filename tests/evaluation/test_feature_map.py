"""Features in two dimensions: what is drawn, from how many, and what is refused."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from evaluation import feature_map
from runtime.guards import InputError


def clusters(count=40):
    """Three groups of directions in 12 dimensions, of different lengths, and their numbers."""
    generator = np.random.default_rng(0)
    labels = np.arange(count) % 3
    points = np.eye(12)[labels] + 0.05 * generator.standard_normal((count, 12))
    return (points * generator.uniform(0.5, 5, (count, 1))).astype(np.float16), labels


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_classes_that_lie_apart_are_drawn_apart(method, tmp_path):
    """Each point's nearest neighbour in the plane is of its own class; the same features give the same picture."""
    features, labels = clusters()
    unit = features.astype(np.float32) / np.linalg.norm(features.astype(np.float32), axis=1, keepdims=True)
    points = feature_map.project(unit, method)
    distances = np.linalg.norm(points[:, None] - points[None], axis=2) + 1e9 * np.eye(len(points))
    assert np.array_equal(labels[distances.argmin(1)], labels)
    for name in ("a.png", "b.png"):
        feature_map.plot_features(features, labels, ["x", "y", "z"], method, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_too_many_points_are_thinned_out_and_said(tmp_path, monkeypatch, capsys):
    """Above the limit evenly spread rows are drawn, and the output says how many."""
    monkeypatch.setattr(feature_map, "MOST_POINTS", 10)
    drawn = []
    monkeypatch.setattr(feature_map, "project", lambda features, method: drawn.append(features) or features[:, :2])
    feature_map.plot_features(*clusters(), None, "pca", tmp_path / "a.png")
    assert len(drawn[0]) == 10
    assert "10 of 40 images are drawn" in capsys.readouterr().out


def test_unlabelled_features_are_drawn_in_one_colour(tmp_path):
    """No labels are needed; fewer than three images are refused."""
    features, _ = clusters()
    assert feature_map.plot_features(features, None, None, "pca", tmp_path / "a.png").stat().st_size > 0
    with pytest.raises(InputError, match="too few"):
        feature_map.plot_features(features[:2], None, None, "pca", tmp_path / "a.png")


def test_a_missing_umap_is_named_with_its_remedy(monkeypatch):
    """Without umap-learn the error says how to get it."""
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(InputError, match="pip install umap-learn"):
        feature_map.check_method("umap")
