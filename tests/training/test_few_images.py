"""Labelled sets of a few thousand images get settings that fit them."""

from __future__ import annotations

import argparse

import pytest

from training.few_images import fit_to_few_images
from training.recipes import find


def resolved(arch: str, **more) -> argparse.Namespace:
    """Arguments with a recipe's values, as a run has them before it knows its images."""
    values = find("supervised", arch)[1]
    args = {"arch": arch, "epochs": 20, "recipe": "auto", "global_batch_size": None, "grad_accum": None, "notes": []}
    sources = dict.fromkeys(values, f"recipe {arch}") | dict.fromkeys(more, "flag")
    return argparse.Namespace(**{**values, **args, **more}, sources=sources)


def test_the_average_spans_a_tenth_of_the_run():
    """10,000 images, 20 epochs of 64: 3,125 steps, decay 1 - 1 / 312.5; the batch is even; AdamW's rate stays."""
    args = resolved("vit_small")
    fit_to_few_images(args, 10_000, {})
    assert args.batch_size_per_gpu == 64
    assert args.model_ema_decay == pytest.approx(1 - 1 / 312.5)
    assert (args.warmup_epochs, args.lr) == (2, 5e-4)
    assert "the average spans a tenth of the run" in args.notes[0]


def test_a_rate_of_sgd_follows_the_batch():
    """ResNet's .4 is for 1024 images; a run without an average gets none."""
    args = resolved("resnet50")
    fit_to_few_images(args, 10_000, {})
    assert args.lr == pytest.approx(0.4 * 64 / 1024)
    assert args.model_ema_decay == 0


def test_flags_and_large_sets_are_left_alone():
    """What the user gave stays, and so does everything with 20,000 images or with a recipe that was asked for."""
    args = resolved("vit_small", model_ema_decay=0.9, batch_size_per_gpu=10)
    fit_to_few_images(args, 10_000, {})
    assert (args.model_ema_decay, args.batch_size_per_gpu) == (0.9, 10)
    for images, recipe in ((20_000, "auto"), (10_000, "vit")):
        args = resolved("vit_small", recipe=recipe)
        fit_to_few_images(args, images, {})
        assert args.batch_size_per_gpu == 74
        assert not args.notes


def test_mixing_gets_pairs():
    """Half of 15 images is 7: the batch is 6."""
    args = resolved("vit_small")
    fit_to_few_images(args, 15, {})
    assert args.batch_size_per_gpu == 6
