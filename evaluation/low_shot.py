"""Low-shot k-NN (AttMask's protocol): a few training images of each class, mean accuracy over several draws."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from data.sampler import shard_for_eval
from evaluation.knn import knn_classifier
from runtime.distributed import all_gather_objects, get_rank, get_world_size
from runtime.guards import InputError

LOW_SHOT_STARTS = {1: (0, 5, 10, 15, 20), 5: (0, 5, 10, 15, 20), 10: (0, 10, 20, 30, 40), 20: (0, 20, 40, 60, 80)}


def low_shot_indices(
    labels: Tensor | np.ndarray, nu: int, start: int | None, seed: int = 0, classes: Sequence[str] | None = None
) -> Tensor:
    """Indices of `nu` images of each class: those from `start` in file order, or, with start None, a seeded draw.

    Raises InputError naming the first class that has too few images.
    """
    labels = np.asarray(labels)
    rng = np.random.default_rng([seed, nu])
    chosen = []
    for c in range(int(labels.max()) + 1):
        members = np.flatnonzero(labels == c)
        needed = nu if start is None else start + nu
        if len(members) < needed:
            name = f"{classes[c]!r}" if classes else str(c)
            remedy = "lower --low_shot" if len(members) < nu else "lower --low_shot or take --low_shot_draw random"
            raise InputError(
                f"class {name} has {len(members)} training images; nu = {nu}"
                + (f" from image {start} on" if start else "")
                + f" needs {needed}: {remedy}"
            )
        chosen.append(rng.choice(members, nu, replace=False) if start is None else members[start : start + nu])
    return torch.from_numpy(np.sort(np.concatenate(chosen)))


def low_shot_knn(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    nus: Sequence[int] = (1, 5, 10, 20),
    T: float = 0.07,
    draw: str = "files",
    runs: int = 5,
    seed: int = 0,
    classes: Sequence[str] | None = None,
    *,
    sharded: bool = False,
) -> dict[int, dict]:
    """Low-shot k-NN: nu training images per class, k = 1 for nu = 1 and 20 otherwise, mean top-1 over 5 runs.

    `draw` "files" follows AttMask: file order from the starts of LOW_SHOT_STARTS (other nu: 0, nu, 2 nu ...);
    "random": seeded draws, run r from seed + r. Returns {nu: {"k", "runs": [top-1 ...], "mean", "std"}}, the sample
    standard deviation over the runs (NaN for one run).
    `sharded`: every rank calls with all features, classifies its share of the queries, and gets the same answer.
    """
    if draw not in ("files", "random"):
        raise ValueError(f"low-shot draw must be 'files' or 'random', got {draw!r}")
    world = get_world_size() if sharded else 1
    share = shard_for_eval(len(test_labels), get_rank() if sharded else 0, world)
    mine = slice(share[0], share[-1] + 1) if len(share) else slice(0)
    hits: dict[int, list[int]] = {}
    for nu in nus:
        if nu < 1:
            raise ValueError(f"low-shot k-NN needs at least one image per class, got nu = {nu}")
        starts = LOW_SHOT_STARTS.get(nu, tuple(nu * r for r in range(runs)))
        hits[nu] = []
        for run in range(runs if draw == "random" else len(starts)):
            start = None if draw == "random" else starts[run]
            index = low_shot_indices(train_labels, nu, start, seed + run, classes)
            if len(share):
                part = (test_features[mine], test_labels[mine])
                k = min(_low_shot_k(nu), len(index))
                top1, _ = knn_classifier(train_features[index], train_labels[index], *part, k, T)
                hits[nu].append(round(top1 * len(share) / 100))
            else:  # more ranks than queries
                hits[nu].append(0)
    results = {}
    everywhere = all_gather_objects(hits) if world > 1 else [hits]
    for nu in nus:
        top1 = (100 * np.sum([of_rank[nu] for of_rank in everywhere], axis=0) / len(test_labels)).tolist()
        spread = float(np.std(top1, ddof=1)) if len(top1) > 1 else float("nan")
        results[nu] = {"k": _low_shot_k(nu), "runs": top1, "mean": float(np.mean(top1)), "std": spread}
    return results


def _low_shot_k(nu: int) -> int:
    return 1 if nu == 1 else 20
