"""Schedules: a value for every iteration of a run, as in DINO."""

from __future__ import annotations

import math

import numpy as np


def cosine_scheduler(
    base_value: float,
    final_value: float,
    epochs: int,
    niter_per_ep: int,
    warmup_epochs: int = 0,
    start_warmup_value: float = 0.0,
) -> np.ndarray:
    """A value for every iteration, (epochs · niter_per_ep,): linear warm-up, then half a cosine to `final_value`.

    A warm-up longer than the training is cut off at its end.
    """
    total, warmup = epochs * niter_per_ep, warmup_epochs * niter_per_ep
    ramp = np.linspace(start_warmup_value, base_value, warmup) if warmup else np.array([])
    steps = np.arange(max(0, total - warmup))
    cosine = final_value + 0.5 * (base_value - final_value) * (1 + np.cos(math.pi * steps / max(1, len(steps))))
    return np.concatenate([ramp, cosine])[:total]
