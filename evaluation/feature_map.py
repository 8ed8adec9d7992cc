"""Features drawn in two dimensions: one point per image, coloured by class.

t-SNE and PCA are scikit-learn's, UMAP is umap-learn's if that is installed. The features are brought to unit length
first, as k-NN compares them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from evaluation.plots import new_figure
from runtime.checkpoint import write_atomic
from runtime.guards import InputError
from runtime.terminal import say

METHODS = ("tsne", "umap", "pca")
MOST_POINTS = 50_000  # more are a blot, and t-SNE takes hours
LISTED_CLASSES = 20  # a legend of more is not read


def check_method(method: str) -> None:
    """Raise InputError if UMAP is asked for and is not installed."""
    if method == "umap":
        try:
            import umap  # noqa: F401
        except ImportError as error:
            raise InputError("--plot umap needs umap-learn: pip install umap-learn, or take tsne or pca") from error


def plot_features(
    features: np.ndarray, labels: np.ndarray | None, classes: Sequence[str] | None, method: str, path: Path
) -> Path:
    """Write a picture of features (N, D), projected to two dimensions, to `path`; returns it.

    labels: class number of each row, or None. Above MOST_POINTS, evenly spread rows are drawn, which the output says.
    Raises InputError if there are fewer than three rows.
    """
    if len(features) < 3:
        raise InputError(f"--plot {method}: {len(features)} images are too few to draw; give at least 3")
    if len(features) > MOST_POINTS:
        say(f"--plot {method}: {MOST_POINTS} of {len(features)} images are drawn, evenly spread over the set")
        rows = np.linspace(0, len(features) - 1, MOST_POINTS).astype(np.int64)
        features, labels = features[rows], None if labels is None else labels[rows]
    features = features.astype(np.float32)
    features /= np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    points = project(features, method)
    figure, axis = new_figure(8.4, 6.4, "constrained")
    axis.grid(False)
    axis.set(xticks=[], yticks=[], title=f"{method} of {len(points)} features", aspect="equal")
    size = float(np.clip(6000 / len(points), 2, 30))
    colours = "#3b528b" if labels is None else labels
    drawn = axis.scatter(*points.T, s=size, c=colours, cmap="tab20" if labels is not None else None, linewidths=0)
    if labels is not None and classes is not None and len(classes) <= LISTED_CLASSES:
        present = np.unique(labels)
        handles = [
            axis.plot([], [], "o", color=drawn.cmap(drawn.norm(number)), label=classes[number])[0] for number in present
        ]
        figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8)
    write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))
    return path


def project(features: np.ndarray, method: str) -> np.ndarray:
    """(N, D) -> (N, 2); the same points each time. Raises InputError as `check_method` does."""
    check_method(method)
    if method == "umap":
        import umap

        return umap.UMAP(random_state=0, n_jobs=1).fit_transform(features)
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if method == "pca":
        return PCA(2, random_state=0).fit_transform(features)
    few = PCA(min(50, *features.shape), random_state=0).fit_transform(features)  # distances stay, and it is faster
    return TSNE(2, perplexity=min(30.0, (len(few) - 1) / 3), init="pca", random_state=0).fit_transform(few)
