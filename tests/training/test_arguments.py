"""Where the values of flags come from, and which values are refused."""

from __future__ import annotations

import argparse

import pytest

import main_dino
from runtime.guards import InputError
from training import few_images


def resolved(*flags, data_path="some/images") -> argparse.Namespace:
    return main_dino.parse_arguments(["--data_path", data_path, *map(str, flags)])


def test_the_demo_alone_brings_its_model():
    """`--data_path demo` trains a small ViT into a folder of its own name; run flags don't change that."""
    args = resolved("--epochs", 3, "--seed", 1, data_path="demo")
    assert (args.embed_dim, args.img_size, args.mode, args.epochs) == (96, 32, "simpool", 3)
    assert args.output_dir == "runs/demo_vit_small"
    assert resolved("--output_dir", "here", data_path="demo").output_dir == "here"


@pytest.mark.parametrize("flags", [("--arch", "resnet50"), ("--img_size", 64), ("--recipe", "dino")])
def test_the_demo_with_a_model_is_a_data_set_like_another(flags):
    """A flag that chooses the model or the recipe turns the demo's own off."""
    assert resolved(*flags, data_path="demo").embed_dim is None


@pytest.mark.parametrize(
    ("flags", "amp"),
    [
        (["--use_fp16", "true"], "fp16"), (["--use_fp16", "false"], "none"), (["--amp", "bf16"], "bf16"),
        (["--amp", "fp16", "--use_fp16", "true"], "fp16"),
    ],
)  # fmt: skip
def test_use_fp16_is_amp(flags, amp):
    """DINO's flag stands for ours."""
    assert resolved(*flags).amp == amp


def test_contradicting_precisions(tmp_path):
    """Two flags that contradict each other are refused; a flag wins over a config."""
    with pytest.raises(InputError, match="contradict"):
        resolved("--amp", "bf16", "--use_fp16", "true")
    config = tmp_path / "config.json"
    config.write_text('{"use_fp16": true}')
    assert resolved("--config", config, "--amp", "bf16").amp == "bf16"
    assert resolved("--config", config).amp == "fp16"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seed", -1], "--seed -1"), (["--seed", 2**63], "below 2"), (["--temperature", "nan"], "--temperature nan"),
        (["--lr", "nan"], "--lr nan"), (["--depth", 0], "--depth 0"), (["--num_heads", 0], "--num_heads 0"),
        (["--teacher_temp", "inf"], "--teacher_temp inf"), (["--val_fraction", 1], "--val_fraction 1"),
        (["--epochs", 10**9], "--epochs 1000000000: must be at most"), (["--out_dim", 10**11], "--out_dim"),
        (["--img_size", 10**6], "--img_size 1000000"), (["--max_bad_fraction", 2], "--max_bad_fraction 2"),
        (["--keep_checkpoints", 0], "--keep_checkpoints 0"),
    ],
)  # fmt: skip
def test_values_that_cannot_work(flags, message):
    """Refused before anything is built, naming flag and value."""
    with pytest.raises(InputError, match=message):
        resolved(*flags)


def test_few_images_get_settings_that_fit():
    """Values of the published recipe are replaced, with a reason; the user's stay."""
    args = resolved("--teacher_temp", 0.06)
    few_images.fit_to_few_images(args, 900, {})
    assert (args.out_dim, args.momentum_teacher, args.teacher_temp) == (1024, 0.98, 0.06)
    assert args.sources["out_dim"] == "for 900 images"
    assert "out_dim 65536 -> 1024" in args.notes[-1]


def test_a_run_of_few_images_keeps_what_it_began_with():
    """A run that began with published values, by an earlier version say, goes on with them."""
    args = resolved()
    few_images.fit_to_few_images(args, 900, {"out_dim": 65536, "momentum_teacher": 0.9})
    assert (args.out_dim, args.momentum_teacher, args.teacher_temp) == (65536, 0.9, 0.04)


def test_a_handful_of_images():
    """A batch is never more than half of them; a global batch that was asked for is not cut into small forwards."""
    args = resolved()
    few_images.fit_to_few_images(args, 20, {})
    assert args.batch_size_per_gpu == 10
    args = resolved("--global_batch_size", 400)
    few_images.fit_to_few_images(args, 900, {})
    assert args.batch_size_per_gpu == 100


@pytest.mark.parametrize(("flags", "images"), [((), 20_000), (("--recipe", "simpool"), 900)])
def test_published_settings_stay(flags, images):
    """With many images, and if a recipe was asked for by name."""
    args = resolved(*flags)
    few_images.fit_to_few_images(args, images, {})
    assert args.out_dim == 65536
