"""A run's state: all of it goes into a checkpoint, and all comes back."""

from __future__ import annotations

from typing import Any

import torch

import main_dino
from tests.pretraining import VIT
from training.run import Run
from training.state import load_training_state, training_state


def make_run(seed: int) -> Run:
    """A tiny run in fp16 whose every part has moved away from where it started, by numbers of its seed."""
    flags = [*VIT, "--data_path", "demo", "--device", "cpu", "--amp", "fp16", "--seed", str(seed)]
    run = main_dino.build(main_dino.parse_arguments(flags), 96, torch.device("cpu"))
    torch.manual_seed(seed)
    for tensor in (*run.teacher.parameters(), run.loss.center):
        torch.nn.init.normal_(tensor)
    for parameter in run.student.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    run.optimizer.step()
    run.scaler.scale(torch.zeros(1))  # makes the scale
    run.scaler.update(2.0 ** (10 + seed))
    return run


def leaves(value: Any, name: str = "") -> dict[str, Any]:
    """Every number and tensor of a nested state, under the path to it."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {path: leaf for key, item in items for path, leaf in leaves(item, f"{name}/{key}").items()}
    return {name: value}


def equal(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def differing(one: Run, other: Run) -> set[str]:
    """Which parts of two runs' states are not the same to the last bit."""
    a, b = (leaves(training_state(run, main_dino.METHOD)) for run in (one, other))
    assert a.keys() == b.keys()
    return {name.split("/")[1] for name in a if not equal(a[name], b[name])}


def test_a_state_is_loaded_whole():
    """Student, teacher, moments, center and loss scale of a run that differed in all of them are the saved ones."""
    saved, other = make_run(1), make_run(2)
    assert differing(saved, other) == {"student", "teacher", "optimizer", "dino_loss", "fp16_scaler"}
    load_training_state(other, main_dino.METHOD, training_state(saved, main_dino.METHOD))
    assert not differing(saved, other)
