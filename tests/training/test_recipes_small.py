"""The recipes for small images and for continuing: published figures, and what follows from them."""

from __future__ import annotations

import argparse

import pytest

import main_dino
from runtime.guards import InputError
from tests.small_images import tiny_checkpoint
from training.recipes import RECIPES


def resolved(*flags) -> argparse.Namespace:
    return main_dino.parse_arguments(["--data_path", "some/images", *map(str, flags)])


def test_imagenette_has_lightlys_figures():
    """ResNet-18 at 128 pixels: SGD .06 per 256, a constant teacher, a head of three layers with BatchNorm."""
    args = resolved("--recipe", "imagenette")
    expected = {
        "arch": "resnet18", "img_size": 128, "stem": "standard", "epochs": 200, "batch_size_per_gpu": 256,
        "optimizer": "sgd", "lr": 0.06, "min_lr": 0, "warmup_epochs": 0, "weight_decay": 5e-4, "weight_decay_end": 5e-4,
        "clip_grad": 0, "out_dim": 2048, "head_layers": 3, "head_hidden_dim": 2048, "bottleneck_dim": 256,
        "use_bn_in_head": True, "norm_last_layer": True, "momentum_teacher": 0.99, "momentum_teacher_end": 0.99,
        "teacher_temp": 0.04, "warmup_teacher_temp": 0.04, "global_crops_scale": (0.4, 1),
        "local_crops_scale": (0.05, 0.4), "local_crops_number": 6, "local_crops_size": 64,
        "freeze_last_layer": 0, "blur_prob": (1.0, 0.1, 0.5),
    }  # fmt: skip
    assert {key: getattr(args, key) for key in expected} == expected
    assert args.sources["lr"] == "recipe imagenette"


@pytest.mark.parametrize(("arch", "stem"), [("vit_tiny", "standard"), ("resnet18", "small")])
def test_cifar_has_two_crops_without_blur(arch, stem):
    """32 pixels, no local crops, a head of two layers, batch 128; a ResNet's stem is small."""
    args = resolved("--recipe", "cifar", "--arch", arch)
    expected = {
        "img_size": 32, "stem": stem, "global_crops_number": 2, "local_crops_number": 0, "head_layers": 2,
        "blur_prob": (0, 0, 0), "batch_size_per_gpu": 128, "patch_size": 4 if arch == "vit_tiny" else 16,
    }  # fmt: skip
    assert {key: getattr(args, key) for key in expected} == expected
    assert resolved("--recipe", "cifar", "--arch", arch, "--lr", 0.5).lr == 0.5


@pytest.mark.parametrize("family", ["vit", "resnet", "convnext"])
def test_continuing_is_the_published_recipe_made_gentle(family):
    """A tenth of the rate, a slow teacher, two frozen epochs; optimizer and crops stay those of the family."""
    before, after = RECIPES["dino"][f"simpool_{family}"], RECIPES["dino"][f"continue_{family}"]
    assert (after["lr"], after["min_lr"]) == (before["lr"] / 10, before["min_lr"] / 10)
    assert after["momentum_teacher"] > before["momentum_teacher"]
    assert after["warmup_epochs"] > after["freeze_backbone_epochs"] == 2
    for key in ("optimizer", "global_crops_scale", "local_crops_scale", "local_crops_number", "clip_grad"):
        assert after[key] == before[key], key


def test_continuing_takes_the_model_from_the_checkpoint(tmp_path):
    """Its architecture chooses the family; the teacher's backbone is taken; without a checkpoint it says so."""
    path = tiny_checkpoint(tmp_path / "checkpoint.pth")
    args = resolved("--recipe", "continue", "--init_from", path, "--img_size", 32)
    assert (args.embed_dim, args.mode, args.checkpoint_key) == (24, "simpool", "teacher")
    assert args.sources["lr"] == "recipe continue_vit"
    assert resolved("--recipe", "continue", "--init_from", path, "--epochs", 2).freeze_backbone_epochs == 1
    with pytest.raises(InputError, match="--recipe continue starts from a trained backbone: give its checkpoint"):
        resolved("--recipe", "continue")
