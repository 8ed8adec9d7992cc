"""Image retrieval: PCA whitening, mean average precision of the revisited Oxford/Paris protocol, a pyramid of scales.

Names and signatures are DINO's, so that its retrieval and copy-detection scripts find them through `utils`. Average
precision follows Radenovic et al., "Revisiting Oxford and Paris" (2018): the area under the precision-recall curve by
the trapezoid rule, junk images taken out of the ranking.

Departure: `multi_scale` normalises each image's feature; the published code divides by the norm of the whole batch,
which is the same for the batch of one that its scripts use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SCALES = (1.0, 0.5**0.5, 0.5)


class PCA:
    """Projection onto the leading `dim` eigenvectors of a covariance, each divided by its eigenvalue to the `whit`.

    whit 0.5 whitens (unit variance per component), 0 only rotates. Set `mean` to have it subtracted first.
    """

    def __init__(self, dim: int = 256, whit: float = 0.5):
        self.dim = dim
        self.whit = whit
        self.mean: np.ndarray | None = None
        self.dvt: np.ndarray | None = None  # (dim, D), set by train_pca

    def train_pca(self, cov: np.ndarray) -> None:
        """Take the components from a covariance matrix (D, D); eigenvalues are kept above 1e-5 of the largest."""
        values, vectors = np.linalg.eigh(np.asarray(cov))
        values = np.maximum(values, values.max() * 1e-5)
        leading = np.argsort(values)[::-1][: self.dim]
        print(f"PCA keeps {100 * values[leading].sum() / values.sum():.2f} % of the variance")
        self.dvt = (vectors[:, leading] / values[leading] ** self.whit).T

    def apply(self, x: np.ndarray | Tensor) -> np.ndarray | Tensor:
        """(N, D) -> (N, dim), as an array or as a tensor on the device of `x`; `x` is left as it is."""
        if self.dvt is None:
            raise RuntimeError("PCA.apply before PCA.train_pca: there are no components yet")
        if isinstance(x, np.ndarray):
            return (x - (0 if self.mean is None else self.mean)) @ self.dvt.T
        if self.mean is not None:
            x = x - torch.as_tensor(self.mean, dtype=x.dtype, device=x.device)
        return x @ torch.as_tensor(self.dvt, dtype=x.dtype, device=x.device).T


def compute_ap(ranks: np.ndarray, nres: int) -> float:
    """Average precision of one query, in [0, 1].

    ranks: 0-based positions of the relevant images in the ranking, ascending; nres: how many relevant images there are.
    """
    found = np.arange(len(ranks))
    ranks = np.asarray(ranks, dtype=np.float64)
    # precision just before and at each relevant image; before the first of all it is 1
    before = np.divide(found, ranks, out=np.ones(len(ranks)), where=ranks > 0)
    at = (found + 1) / (ranks + 1)
    return float((before + at).sum() / (2 * nres))


def compute_map(
    ranks: np.ndarray, gnd: Sequence[dict], kappas: Sequence[int] = ()
) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
    """Mean average precision over queries, and precision at each kappa.

    ranks: (database, queries), each column the database indices of one query, best first. gnd: per query the indices of
    relevant images under "ok" and, optionally, of images to ignore under "junk". A query without relevant images does
    not count (NaN in what is given per query). Returns (mAP, APs (queries,), mean precisions (kappas,), precisions
    (queries, kappas)). Precision at kappa stops at the last relevant image, as in the protocol.
    """
    queries = len(gnd)
    aps = np.full(queries, np.nan)
    precisions = np.full((queries, len(kappas)), np.nan)
    for i, truth in enumerate(gnd):
        relevant = np.asarray(truth["ok"])
        if relevant.size == 0:
            continue
        ranking = ranks[:, i]
        kept = ranking[~np.isin(ranking, np.asarray(truth.get("junk", [])))]
        positions = np.flatnonzero(np.isin(kept, relevant))
        aps[i] = compute_ap(positions, len(relevant))
        if positions.size == 0:  # none of them is in the ranking
            precisions[i] = 0.0
            continue
        for j, kappa in enumerate(kappas):
            depth = min(int(positions[-1]) + 1, kappa)
            precisions[i, j] = (positions < depth).sum() / depth
    counted = ~np.isnan(aps)
    if not counted.any():
        return 0.0, aps, np.zeros(len(kappas)), precisions
    return float(aps[counted].mean()), aps, precisions[counted].mean(0), precisions


def multi_scale(samples: Tensor, model: Callable[[Tensor], Tensor]) -> Tensor:
    """Mean feature of the images (B, C, H, W) at scales 1, 1/sqrt(2) and 1/2, of unit length: (B, D).

    For a model with a patch size, a scaled image loses the rows and columns that fill no patch, as its strided patch
    embedding would drop them.
    """
    patch = getattr(model, "patch_size", 1)
    patch = patch if isinstance(patch, int) else max(patch)
    total = 0.0
    for scale in SCALES:
        scaled = samples
        if scale != 1.0:
            scaled = F.interpolate(samples, scale_factor=scale, mode="bilinear", align_corners=False)
        height, width = (side // patch * patch for side in scaled.shape[-2:])
        if not (height and width):
            raise ValueError(
                f"images of {tuple(samples.shape[-2:])} pixels scaled by {scale:.2f} hold no {patch}-pixel patch"
            )
        total = total + model(scaled[..., :height, :width])
    return F.normalize(total / len(SCALES), dim=-1)
