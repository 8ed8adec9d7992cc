"""Logistic regression: the optimum of its objective, chosen without the test set."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from evaluation import logistic
from evaluation.linear import split_train
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


def test_the_penalty_is_scored_on_images_that_it_was_not_fitted_on():
    """On noise, where weak penalties fit their training part perfectly, held-out scores stay near chance."""
    generator = torch.Generator().manual_seed(0)
    x, target = torch.randn(120, 80, generator=generator), torch.arange(120) % 4
    scores = logistic.logistic_regression(x, target, x[:4], target[:4])["held_out"]
    kept, held_out = (torch.from_numpy(part) for part in split_train(target.numpy()))
    weight = logistic.fit_logistic((x[kept] - x.mean(0)) / x.std(0), target[kept], 1e-6, 4)
    fitted = torch.nn.functional.linear((x[kept] - x.mean(0)) / x.std(0), weight[:, :-1], weight[:, -1]).argmax(1)
    assert (fitted == target[kept]).float().mean() > 0.95
    assert len(held_out) == 12
    assert scores[1e-6] < 75


def test_the_test_set_is_standardised_as_the_training_set_is():
    """A part of the data scores as it does within the whole: its own mean and spread are not used."""
    x, target = next(batches(1, 400))
    one_class = target == 2
    whole = logistic.logistic_regression(x, target, x, target)
    alone = logistic.logistic_regression(x, target, x[one_class], target[one_class])
    assert alone["penalty"] == whole["penalty"]
    assert alone["top1"] > whole["top1"] - 15  # standardised by itself, this class would sit at the origin
    shifted = logistic.logistic_regression(x, target, x[one_class] + 50, target[one_class])
    assert shifted["top1"] != alone["top1"]
