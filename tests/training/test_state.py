"""A run as a checkpoint: all of it goes in and comes back, and which run may be continued."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import main_dino
from data.datasets import open_images
from runtime.guards import InputError
from tests.pretraining import VIT
from training import state
from training.run import Run


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
    a, b = (leaves(state.training_state(run, main_dino.METHOD)) for run in (one, other))
    assert a.keys() == b.keys()
    return {name.split("/")[1] for name in a if not equal(a[name], b[name])}


def test_a_state_is_loaded_whole():
    """Student, teacher, moments, center and loss scale of a run that differed in all of them are the saved ones."""
    saved, other = make_run(1), make_run(2)
    assert differing(saved, other) == {"student", "teacher", "optimizer", "dino_loss", "fp16_scaler"}
    state.load_training_state(other, main_dino.METHOD, state.training_state(saved, main_dino.METHOD), Path("file"))
    assert not differing(saved, other)


@pytest.fixture
def run_and_images(small):
    args = main_dino.parse_arguments([*VIT, "--data_path", str(small), "--device", "cpu", "--epochs", "2"])
    images = open_images(small, "train")
    return main_dino.build(args, len(images), torch.device("cpu")), images


def checkpoint(run, images, method=main_dino.METHOD) -> dict:
    content = state.training_state(run, method) | {"epoch": 0, "iteration": 0}
    return content | {
        "args": state.arguments.saved(run.args, method),
        "config": state.model_config(run, method, images),
    }


def test_the_published_keys_and_prefixes(run_and_images):
    """DINO's names, `module.` on the student only, and what a reader needs to build the model."""
    content = checkpoint(*run_and_images)
    assert {"student", "teacher", "optimizer", "dino_loss"} <= set(content)
    assert all(name.startswith("module.") for name in content["student"])
    assert {name.split(".")[0] for name in content["teacher"]} == {"backbone", "head"}
    config = content["config"]
    assert (config["method"], config["format"], config["gamma"], config["out_dim"]) == ("dino", 2, 1.25, 64)


def test_the_same_run_may_go_on(run_and_images):
    """Nothing changed: nothing is said, nothing refused; a file of before has no method and is DINO's."""
    run, images = run_and_images
    content = checkpoint(run, images)
    del content["config"]["method"]
    state.check_same_run(run, main_dino.METHOD, images, content, Path("file"))


@pytest.mark.parametrize(("key", "value"), [("lr", 7.0), ("seed", 5), ("out_dim", 65)])
def test_changed_mathematics(run_and_images, key, value):
    """Refused with old and new value."""
    run, images = run_and_images
    content = checkpoint(run, images)
    content["args"][key] = value
    with pytest.raises(InputError, match=f"{key}: {value} -> "):
        state.check_same_run(run, main_dino.METHOD, images, content, Path("file"))


def test_a_methods_own_cosmetic_flags(run_and_images, capsys):
    """What a method declares cosmetic may change, and is mentioned."""
    run, images = run_and_images
    content = checkpoint(run, images)
    content["args"]["momentum_teacher"] = 0.5
    method = dataclasses.replace(main_dino.METHOD, cosmetic=frozenset({"momentum_teacher"}))
    state.check_same_run(run, method, images, content, Path("file"))
    assert "momentum_teacher 0.5 -> " in capsys.readouterr().out
