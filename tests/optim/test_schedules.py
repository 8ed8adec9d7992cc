"""Schedules against the published numbers."""

from __future__ import annotations

import numpy as np

from optim.schedules import cosine_scheduler
from tests.reference import golden


def test_cosine_schedules():
    """Both golden schedules hold."""
    np.testing.assert_allclose(cosine_scheduler(0.5, 0.01, 10, 7, 3), golden("cosine")["a"].numpy(), rtol=2e-6)
    np.testing.assert_allclose(cosine_scheduler(0.996, 1, 5, 11), golden("cosine")["b"].numpy(), rtol=2e-6)


def test_a_warmup_longer_than_training_is_cut():
    """The schedule always has epochs x steps entries."""
    assert len(cosine_scheduler(1.0, 0.0, 2, 5, warmup_epochs=10)) == 10
