"""The teacher's momentum and the size of the head, in both methods that have them."""

from __future__ import annotations

import argparse
from itertools import pairwise

import numpy as np
import pytest
from torch import nn

import main_attmask
import main_dino
from runtime.guards import InputError
from tests.pretraining import VIT
from training.plan import Plan
from training.self_distillation import momentum_schedule

PROGRAMS = (main_dino, main_attmask)


def resolved(*flags, program=main_dino) -> argparse.Namespace:
    return program.parse_arguments([*VIT, "--data_path", "some/images", *map(str, flags)])


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_momentum_rises_to_its_end(program):
    """By default to 1 as published; with the start as its end it is constant, bit for bit."""
    plan = Plan(8, 1, 5)
    rising = momentum_schedule(resolved("--momentum_teacher", 0.9, "--epochs", 4, program=program), plan)
    assert (rising[0], len(rising)) == (0.9, 20)
    assert (np.diff(rising) > 0).all()
    assert rising[-1] == pytest.approx(1, abs=1e-3)
    halved = resolved("--momentum_teacher", 0.9, "--momentum_teacher_end", 0.95, "--epochs", 4, program=program)
    np.testing.assert_allclose(momentum_schedule(halved, plan) - 0.9, (rising - 0.9) / 2, atol=1e-12)
    constant = resolved("--momentum_teacher", 0.99, "--momentum_teacher_end", 0.99, program=program)
    assert set(momentum_schedule(constant, plan).tolist()) == {0.99}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_the_head_has_the_size_that_was_asked_for(program, layers):
    """Layers, hidden width and bottleneck, of student and teacher; by default 3, 2048 and 256."""
    flags = ["--head_layers", layers, "--head_hidden_dim", 40, "--bottleneck_dim", 12]
    for model in program.build_models(resolved(*flags, program=program)):
        linear = [layer for layer in model.head.mlp.modules() if isinstance(layer, nn.Linear)]
        widths = [24, *[40] * (layers - 1), 12]
        assert [(layer.in_features, layer.out_features) for layer in linear] == list(pairwise(widths))
        assert model.head.last_layer.in_features == 12
    default = resolved(program=program)
    assert (default.head_layers, default.head_hidden_dim, default.bottleneck_dim) == (3, 2048, 256)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--momentum_teacher 2", "--momentum_teacher 2"), ("--momentum_teacher_end 1.1", "--momentum_teacher_end 1.1"),
        ("--momentum_teacher .99 --momentum_teacher_end .9", "0.9 is below --momentum_teacher 0.99"),
        ("--head_layers 0", "--head_layers 0"), ("--bottleneck_dim 0", "--bottleneck_dim 0"),
        ("--head_hidden_dim -1", "--head_hidden_dim -1"), ("--head_layers 1000", "--head_layers 1000: must be at most"),
    ],
)  # fmt: skip
def test_values_that_cannot_work_are_refused(program, flags, message):
    """One line with the flag and the value."""
    with pytest.raises(InputError, match=message):
        resolved(*flags.split(), program=program)
