"""Logistic regression: the optimum of its objective, chosen without the test set."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from evaluation import logistic
from runtime.guards import InputError
from tests.evaluation.test_linear import batches


def test_logistic_regression_reaches_the_optimum_of_its_objective():
    """The fitted weights have a vanishing gradient, and beat the scikit-learn solution's objective to 1e-4."""
    from sklearn.linear_model import LogisticRegression

    x, target = next(batches(1, 400))
    weight = logistic.fit_logistic(x, target, 0.01, 5)
    theirs = LogisticRegression(C=1 / (0.01 * len(x)), max_iter=1000, tol=1e-8).fit(x.numpy(), target.numpy())
    other = torch.cat([torch.from_numpy(theirs.coef_), torch.from_numpy(theirs.intercept_)[:, None]], 1).float()

    def objective(w):
        return F.cross_entropy(F.linear(x, w[:, :-1], w[:, -1]), target) + 0.005 * w[:, :-1].square().sum()

    assert objective(weight).item() == pytest.approx(objective(other).item(), rel=1e-4)


def test_logistic_regression_chooses_its_penalty_without_the_test_set():
    """The penalty is that of the best held-out score, and classes with one image each are an error."""
    x, target = next(batches(1, 400))
    result = logistic.logistic_regression(x, target, x, target)
    assert result["held_out"][result["penalty"]] == max(result["held_out"].values())
    assert result["top1"] > 80
    with pytest.raises(InputError, match="only one"):
        logistic.logistic_regression(x[:5], torch.arange(5), x, target)
