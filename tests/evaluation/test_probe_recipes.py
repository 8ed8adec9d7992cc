"""Protocols of probes: optimisers, rates, warm-up."""

from __future__ import annotations

import math

import pytest
import torch

from evaluation.linear import DEFAULT_LRS
from evaluation.probe_heads import build_head
from evaluation.probe_names import read_probes
from evaluation.probe_recipes import RECIPES


def test_published_grids():
    """dino is the linear probe's, ep has the published 0.1 among its rates, capi ten rates and three decays."""
    dino, ep, capi = (RECIPES[name] for name in ("dino", "ep", "capi"))
    assert (dino.lrs, dino.wds, dino.epochs) == (DEFAULT_LRS, (0.0,), 100)
    assert (ep.wds, ep.epochs, ep.warmup_epochs(90)) == ((0.0,), 90, 10)
    assert 0.1 in ep.lrs
    assert (len(capi.lrs), min(capi.lrs), max(capi.lrs)) == (10, 1e-5, 1e-2)
    assert capi.wds == (5e-4, 1e-3, 5e-2)


def test_rates_are_per_256_images_but_adams():
    """SGD's and LARS's peaks grow with the batch, AdamW's do not."""
    assert RECIPES["dino"].peaks([0.1], 1024) == [0.4]
    assert RECIPES["ep"].peaks([0.1], 4096) == [1.6]
    assert RECIPES["capi"].peaks([0.1], 4096) == [0.1]


def test_the_published_schedule_warms_up_for_ten_epochs_of_ninety():
    """A line from 0 to the peak over 10 epochs' steps, then half a cosine to 0 over the other 80's; no step is lost."""
    scales = [scale for epoch in range(90) for scale in RECIPES["ep"].scales(epoch, 90, 4)]
    assert len(scales) == 360
    assert scales[:40] == pytest.approx([i / 39 for i in range(40)])
    assert scales[40:] == pytest.approx([0.5 * (1 + math.cos(math.pi * i / 320)) for i in range(320)])


def test_a_shorter_training_has_a_shorter_warm_up():
    """A ninth of the epochs, and none below nine: a warm-up of ten epochs of five would never reach the peak."""
    assert [RECIPES["ep"].warmup_epochs(epochs) for epochs in (5, 9, 45, 90, 200)] == [0, 1, 5, 10, 10]
    assert RECIPES["capi"].scales(0, 2, 2) == pytest.approx([1, 0.5 * (1 + math.cos(math.pi / 4))])
    assert RECIPES["dino"].scales(1, 3, 2) == pytest.approx(0.75)


def test_optimizers_are_the_published_ones():
    """LARS with momentum .9 and trust .001; AdamW with betas .9 and .95; biases and 1-D parameters do not decay."""
    (probe,) = read_probes(["capi"])
    heads = [build_head(probe, 64, 5) for _ in range(2)]
    for name, kind in (("dino", "SGD"), ("ep", "LARS"), ("capi", "AdamW")):
        optimizer = RECIPES[name].build_optimizer(heads, [0.1, 0.2], [0.01, 0.02])
        assert type(optimizer).__name__ == kind
        groups = optimizer.param_groups
        assert [group["peak"] for group in groups] == [0.1, 0.1, 0.2, 0.2]
        assert [group["weight_decay"] for group in groups] == [0.01, 0, 0.02, 0]
        assert all(p.ndim > 1 for p in groups[0]["params"])
        assert all(p.ndim == 1 for p in groups[1]["params"])
        if name == "capi":
            assert groups[0]["betas"] == (0.9, 0.95)
        else:
            assert groups[0]["momentum"] == 0.9
        if name == "ep":
            assert groups[0]["eta"] == 0.001
    assert sum(len(group["params"]) for group in groups) == 2 * len(list(heads[0].parameters()))
    assert torch.is_tensor(groups[0]["params"][0])
