"""Recipes are the published ones."""

from __future__ import annotations

import argparse

import pytest

from backbones import family
from training.recipes import RECIPES, find, note_batch


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        ("vit_small", "vit"), ("deit_small", "vit"), ("resnet50", "resnet"), ("convnext_small", "convnext"),
        ("swin_tiny_patch4_window7_224", "vit"), ("regnety_016", "resnet"), ("convnextv2_tiny", "convnext"),
    ],
)  # fmt: skip
def test_family(arch, expected):
    """An architecture's family is read off its name."""
    assert family(arch) == expected


def test_published_values():
    """Spot checks against the published table: batch, learning rate, temperature warm-up, crops, clipping."""
    vit, resnet, convnext = (find("dino", a)[1] for a in ("vit_small", "resnet50", "convnext_small"))
    assert [r["batch_size_per_gpu"] for r in (vit, resnet, convnext)] == [100, 90, 60]
    assert [r["optimizer"] for r in (vit, resnet, convnext)] == ["adamw", "lars", "adamw"]
    assert [r["out_dim"] for r in (vit, resnet, convnext)] == [65536, 60000, 65536]
    assert [r["norm_last_layer"] for r in (vit, resnet, convnext)] == [False, True, True]
    assert [r["clip_grad"] for r in (vit, resnet, convnext)] == [0, 0, 0.3]
    assert find("dino", "vit_small", "dino")[1]["local_crops_number"] == 8


def test_all_recipes_set_the_same_flags():
    """No recipe leaves a flag of another open; those of small images, and the demo's, set more."""
    published, more = [], []
    for name, values in RECIPES["dino"].items():
        (published if name.startswith("simpool_") or name == "dino" else more).append(set(values))
    assert all(values == published[0] for values in published)
    assert all(published[0] < values for values in more)


def test_unknown_recipe():
    """The error lists the recipes."""
    with pytest.raises(ValueError, match="simpool_vit"):
        find("dino", "vit_small", "best")
    with pytest.raises(ValueError, match=r"did you mean cifar\?"):
        find("dino", "vit_small", "cifr")


@pytest.mark.parametrize(
    ("recipe", "arch", "name"),
    [
        ("cifar", "vit_tiny", "cifar_vit"), ("cifar", "resnet18", "cifar_resnet"),
        ("cifar_resnet", "vit_tiny", "cifar_resnet"), ("continue", "convnext_tiny", "continue_convnext"),
        ("imagenette", "vit_small", "imagenette"),
    ],
)  # fmt: skip
def test_a_recipe_of_several_families_follows_the_architecture(recipe, arch, name):
    """Its short name means that of the family; a full name means itself."""
    assert find("dino", arch, recipe) == (name, RECIPES["dino"][name])


def test_a_family_without_a_recipe():
    """The error names those that have one."""
    with pytest.raises(ValueError, match="'cifar' has no values for convnext_tiny; it is for vit and resnet networks"):
        find("dino", "convnext_tiny", "cifar")


def test_supervised_recipes_follow_the_family():
    """auto, official and simpool mean the family's recipe; all set the same flags, finetune its epochs besides."""
    for recipe in ("auto", "official", "simpool"):
        assert [find("supervised", arch, recipe)[0] for arch in ("vit_small", "resnet50", "convnext_small")] == [
            "vit", "resnet", "convnext",
        ]  # fmt: skip
    vit, resnet, convnext, finetune, demo = RECIPES["supervised"].values()
    assert set(vit) == set(resnet) == set(convnext) == set(finetune) - {"epochs"}
    assert set(vit) < set(demo)
    with pytest.raises(ValueError, match="choose auto"):
        find("dino", "vit_small", "official")


def test_a_rate_for_another_batch_is_noted():
    """A recipe's rate with another global batch: the note names both batches and what is in proportion."""
    args = argparse.Namespace(lr=0.4, sources={"lr": "recipe resnet"}, notes=[])
    note_batch(args, 1024)
    assert not args.notes
    note_batch(args, 256)
    assert "for a global batch of 1024, and this one is 256" in args.notes[0]
    assert "; 0.1 is in proportion" in args.notes[0]
    args = argparse.Namespace(lr=0.4, sources={"lr": "flag"}, notes=[])
    note_batch(args, 256)
    assert not args.notes
