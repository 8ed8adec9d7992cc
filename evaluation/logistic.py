"""Multinomial logistic regression on frozen features by L-BFGS: an answer in seconds, without augmentation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.linear import split_train
from runtime.guards import InputError

PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)


def logistic_regression(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    penalties: Sequence[float] = PENALTIES,
    num_classes: int | None = None,
    max_iterations: int = 100,
    seed: int = 0,
) -> dict[str, Any]:
    """Multinomial logistic regression on cached features by L-BFGS: an answer in seconds, without augmentation.

    The classifier is `chosen_classifier`'s. Returns {"top1", "top5", "penalty", "held_out": {penalty: top-1}}, percent.
    """
    if num_classes is None:
        num_classes = int(max(train_labels.max(), test_labels.max())) + 1
    fitted = chosen_classifier(train_features, train_labels, num_classes, penalties, max_iterations, seed)
    device = train_features.device
    top1, top5 = _top(fitted.standardise(test_features.to(device)), test_labels.to(device), fitted.weight)
    return {"top1": top1, "top5": top5, "penalty": fitted.penalty, "held_out": fitted.scores}


@dataclass
class Classifier:
    """A fitted classifier, with the standardisation of its training features."""

    mean: Tensor  # (D,)
    std: Tensor  # (D,)
    weight: Tensor  # (C, D + 1), bias last
    penalty: float
    scores: dict[float, float]  # top-1 on the held-out images, by penalty

    def standardise(self, x: Tensor) -> Tensor:
        return (x.float() - self.mean) / self.std

    def logits(self, x: Tensor) -> Tensor:
        """(n, D) -> (n, C)"""
        return F.linear(self.standardise(x), self.weight[:, :-1], self.weight[:, -1])


def chosen_classifier(
    train_features: Tensor,
    train_labels: Tensor,
    num_classes: int,
    penalties: Sequence[float] = PENALTIES,
    max_iterations: int = 100,
    seed: int = 0,
) -> Classifier:
    """The classifier (n, D) -> (n, C) that the training features give.

    Minimises mean cross entropy + penalty/2 * |W|^2 on standardised features, warm-started from the strongest penalty
    to the weakest. The penalty is chosen on a held-out tenth of train, and then fitted on all of it. Raises InputError
    if every class has one image only.
    """
    labels = train_labels.to(train_features.device, torch.int64)
    std, mean = torch.std_mean(train_features.float(), dim=0)
    std = std.clamp_min(1e-6 * std.max())

    train = (train_features.float() - mean) / std
    keep, held_out = (torch.from_numpy(part).to(train.device) for part in split_train(labels.cpu().numpy(), seed))
    if not len(held_out):
        raise InputError("logistic regression chooses its penalty on held-out images, but every class has only one")
    scores: dict[float, float] = {}
    start: Tensor | None = None
    for penalty in sorted(penalties, reverse=True):
        start = fit_logistic(train[keep], labels[keep], penalty, num_classes, max_iterations, start)
        scores[penalty] = _top(train[held_out], labels[held_out], start)[0]
    best = max(sorted(penalties, reverse=True), key=scores.__getitem__)
    weight = fit_logistic(train, labels, best, num_classes, max_iterations)
    return Classifier(mean, std, weight, best, scores)


def fit_logistic(
    x: Tensor, target: Tensor, penalty: float, num_classes: int, max_iterations: int = 100, start: Tensor | None = None
) -> Tensor:
    """Weights (C, D + 1), bias last, that minimise mean cross entropy + penalty/2 * |W|^2 (the bias is free)."""
    dim = x.shape[1]
    weight = torch.zeros(num_classes, dim + 1, device=x.device) if start is None else start.clone()
    weight.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [weight], max_iter=max_iterations, history_size=10, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight[:, :dim], weight[:, dim]), target)
        loss = loss + 0.5 * penalty * weight[:, :dim].square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(objective)
    return weight.detach()


def _top(x: Tensor, target: Tensor, weight: Tensor) -> tuple[float, float]:
    ranked = F.linear(x, weight[:, :-1], weight[:, -1]).topk(min(5, len(weight))).indices == target[:, None]
    return 100.0 * ranked[:, 0].float().mean().item(), 100.0 * ranked.any(1).float().mean().item()
