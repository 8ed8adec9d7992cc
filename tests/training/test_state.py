"""A run as a checkpoint: what is in it, and which run may be continued."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import main_dino
from data.datasets import open_images
from runtime.guards import InputError
from tests.pretraining import VIT
from training import state


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


def test_a_state_that_is_loaded_is_the_state(run_and_images):
    """Every tensor of student, teacher and center comes back bit for bit."""
    run, images = run_and_images
    content = checkpoint(run, images)
    content = {**content, "teacher": {name: value + 1 for name, value in content["teacher"].items()}}
    state.load_training_state(run, main_dino.METHOD, content, Path("file"))
    for name, value in run.teacher.state_dict().items():
        assert torch.equal(value, content["teacher"][name])


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
