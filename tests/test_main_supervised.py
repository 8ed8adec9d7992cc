"""The supervised program: whole tiny runs on real images, its flags, and what it refuses."""

from __future__ import annotations

import json
import math
import os
import signal

import pytest
import torch

import eval_knn
import main_supervised
from runtime.checkpoint import read_checkpoint
from runtime.guards import EXIT_NON_FINITE, EXIT_PREEMPTED, InputError, NonFiniteError, run_program
from tests import pretraining, processes
from tests.pretraining import assert_equal_states, rows
from tests.supervised import RESNET, VIT, train


def resolved(*flags):
    return main_supervised.parse_arguments(["--data_path", "some", *map(str, flags)])


# ------------------------------------------------------------------------------------------------ a run


def test_it_learns_and_validates_model_and_average(small, tmp_path):
    """The loss falls well below chance; each row has top-1, top-5 and loss of the model and of its average."""
    flags = [*VIT, "--data_path", small, "--output_dir", tmp_path, "--epochs", 8, "--auto_augment", "none"]
    flags += ["--mixup", 0, "--reprob", 0, "--drop_rate", 0, "--drop_path_rate", 0, "--smoothing", 0]
    assert train(*flags, "--crop_scale", 0.7, 1, "--lr", 0.01) == 0
    log = rows(tmp_path)
    assert log[-1]["train_loss"] < 0.9 * math.log(2)  # of two classes; 0.85 in the run that set this bound
    assert set(log[-1]["val"]) == {"model", "average"}
    assert set(log[-1]["val"]["model"]) == {"top1", "top5", "loss"}
    assert log[-1]["val"]["model"]["top1"] > 55  # 50 by chance, 72 in that run
    assert log[-1]["val"]["model"]["top5"] == 100
    content = read_checkpoint(tmp_path / "checkpoint.pth")
    assert (content["config"]["method"], content["config"]["num_classes"]) == ("supervised", 2)
    assert {"module.head.weight", "module.head.bias"} < set(content["student"])
    assert "head.weight" in content["teacher"]


@pytest.mark.parametrize(
    "flags",
    [
        [*VIT, "--mixup", 0.8, "--cutmix", 1.0, "--aug_repeats", 2, "--reprob", 0.5, "--drop_path_rate", 0.1],
        pytest.param([*RESNET, "--recipe", "resnet", "--drop_rate", 0.1], marks=pytest.mark.full),
    ],
    ids=["vit", "resnet"],
)
def test_a_continued_run_is_the_whole_run(flags, small, tmp_path):
    """Stopped within an epoch and continued with loader workers: the same bits, best.pth and log lines.

    With everything random at once: RandAugment, erasing, mixing, repeated augmentation, dropout, drop path, splits.
    """
    flags = [*flags, "--data_path", small, "--epochs", 2, "--keep_best", "true"]
    assert train(*flags, "--output_dir", tmp_path / "whole") == 0
    assert train(*flags, "--output_dir", tmp_path / "parts", "--max_steps", 4) == 0
    assert train(*flags, "--output_dir", tmp_path / "parts", "--num_workers", 2) == 0
    assert_equal_states(tmp_path / "whole", tmp_path / "parts")
    best, again = (read_checkpoint(tmp_path / name / "best.pth") for name in ("whole", "parts"))
    assert best["iteration"] == again["iteration"]


@pytest.mark.full
def test_killed_and_continued_it_ends_in_the_same_bits(small, tmp_path):
    """kill -9 in the second epoch, the same command again: weights, average, log and best.pth of a whole run."""
    flags = [*VIT, "--data_path", small, "--epochs", 3, "--keep_best", "true"]
    assert train(*flags, "--output_dir", tmp_path / "whole") == 0
    killed = [*flags, "--output_dir", tmp_path / "killed", "--checkpoint_every_steps", 1]
    ranks = processes.start(killed, tmp_path, program="main_supervised")
    ranks.wait_for("checkpoint.pth at step 8")  # after the first validation
    os.kill(ranks.pids[0], signal.SIGKILL)
    assert ranks.wait() == [-signal.SIGKILL]
    assert train(*killed) == 0
    assert_equal_states(tmp_path / "whole", tmp_path / "killed")
    best, again = (read_checkpoint(tmp_path / name / "best.pth") for name in ("whole", "killed"))
    assert best["epoch"] == again["epoch"]


@pytest.mark.full
def test_a_preempted_run_says_so_and_continues(small, tmp_path):
    """SIGTERM: code 75 and the marker; the same command again ends in the bits of a whole run."""
    flags = [*VIT, "--data_path", small, "--epochs", 3]
    assert train(*flags, "--output_dir", tmp_path / "whole") == 0
    ranks = processes.start([*flags, "--output_dir", tmp_path / "parts"], tmp_path, program="main_supervised")
    ranks.wait_for("epoch 0: val average")
    os.kill(ranks.pids[0], signal.SIGTERM)
    assert ranks.wait() == [EXIT_PREEMPTED]
    assert (tmp_path / "parts" / "PREEMPTED").exists()
    assert train(*flags, "--output_dir", tmp_path / "parts") == 0
    assert_equal_states(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.full
def test_two_processes_are_one(small, tmp_path):
    """The same global batch on two processes: equal weights to float32's rounding, every image validated once."""
    flags = [*VIT, "--data_path", small, "--epochs", 2, "--global_batch_size", 16, "--mixup", 0, "--drop_rate", 0]
    flags += ["--drop_path_rate", 0, "--optimizer", "nesterov", "--lr", 0.02]  # AdamW would divide by small numbers
    assert train(*flags, "--output_dir", tmp_path / "one") == 0
    processes.run([*flags, "--output_dir", tmp_path / "two"], tmp_path, world=2, program="main_supervised")
    one, two = (read_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("one", "two"))
    for key in ("student", "teacher"):
        for name, value in one[key].items():
            torch.testing.assert_close(two[key][name], value, rtol=1e-4, atol=1e-5)
    mine, theirs = (rows(tmp_path / name)[-1]["val"]["model"] for name in ("one", "two"))
    assert abs(mine["top1"] - theirs["top1"]) <= 100 / 40  # one image may lie on the line between two classes
    assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_the_best_checkpoint_is_that_of_the_best_average(small, tmp_path):
    """best.pth is the state after the epoch whose average had the highest top-1, the first one if several had it."""
    flags = [*VIT, "--data_path", small, "--output_dir", tmp_path, "--epochs", 4, "--lr", 0.05, "--keep_best", "true"]
    assert train(*flags) == 0
    scores = [row["val"]["average"]["top1"] for row in rows(tmp_path)]
    best = read_checkpoint(tmp_path / "best.pth")
    assert best["epoch"] == 1 + scores.index(max(scores))
    assert best["best"] == max(scores)


def test_the_average_has_its_statistics(small, tmp_path):
    """BatchNorm's running statistics of the average lie between the start's and the model's, its counter is equal."""
    flags = [*RESNET, "--recipe", "vit", "--drop_path_rate", 0, "--data_path", small, "--output_dir", tmp_path]
    assert train(*flags, "--epochs", 1, "--max_steps", 1, "--model_ema_decay", 0.75, "--eval_every", 0) == 0
    content = read_checkpoint(tmp_path / "checkpoint.pth")
    model, average = content["student"]["module.backbone.bn1.running_mean"], content["teacher"]
    torch.testing.assert_close(average["backbone.bn1.running_mean"], 0.25 * model)
    assert average["backbone.bn1.num_batches_tracked"] == 1


def test_evaluate_repeats_the_last_validation(small, tmp_path, capsys):
    """--evaluate on a run's folder takes its arguments from the checkpoint and gives the last epoch's numbers."""
    assert train(*VIT, "--data_path", small, "--output_dir", tmp_path, "--epochs", 1) == 0
    before = (tmp_path / "checkpoint.pth").stat().st_mtime_ns
    assert train("--evaluate", "--output_dir", tmp_path, "--num_workers", 0) == 0
    assert "val average top-1" in capsys.readouterr().out
    found = json.loads((tmp_path / "validation.json").read_text())
    assert found["val"] == rows(tmp_path)[-1]["val"]
    assert (tmp_path / "checkpoint.pth").stat().st_mtime_ns == before


def test_a_refused_step_changes_neither_statistics_nor_average(small, tmp_path):
    """A learning rate that overflows stops the run with code 3; the saved average and BatchNorm are finite."""
    flags = [*RESNET, "--data_path", small, "--output_dir", tmp_path, "--epochs", 9, "--lr", 1e30, "--eval_every", 0]
    with pytest.raises(NonFiniteError) as stopped:
        train(*flags, "--max_bad_steps", 2, "--model_ema_decay", 0.9, "--recipe", "vit", "--drop_path_rate", 0)
    assert stopped.value.exit_code == EXIT_NON_FINITE
    (replay,) = tmp_path.glob("replay_step*.pth")
    content = read_checkpoint(replay)
    statistics = {n: v for n, v in content["student"].items() if "running" in n}
    assert statistics
    assert all(value.isfinite().all() for value in statistics.values())
    assert train("--replay", replay, "--data_path", small, "--device", "cpu") == EXIT_NON_FINITE


def test_accumulation_and_bf16_run(small, tmp_path):
    """Two forwards per step in bfloat16, and a report with curves and attention."""
    flags = [*VIT, "--data_path", small, "--output_dir", tmp_path, "--epochs", 1, "--amp", "bf16", "--grad_accum", 2]
    assert train(*flags, "--report", "true") == 0
    page = (tmp_path / "report.html").read_text()
    assert "val average" in page
    assert (tmp_path / "attention.png").exists()


# ------------------------------------------------------------------------------------------------ other programs


def test_evaluations_read_its_checkpoints(small, tmp_path):
    """eval_knn takes teacher and student; the BatchNorms of augmentation splits are no part of the model."""
    flags = [*RESNET, "--recipe", "resnet", "--data_path", small, "--output_dir", tmp_path, "--max_steps", 1]
    assert train(*flags, "--epochs", 1, "--model_ema_decay", 0.5) == 0
    for key in ("teacher", "student"):
        weights = ["--pretrained_weights", tmp_path / "checkpoint.pth", "--checkpoint_key", key]
        command = [*weights, "--data_path", small, "--nb_knn", 5, "--num_workers", 0, "--output_dir", tmp_path / key]
        assert eval_knn.main([str(word) for word in command]) == 0
        assert (tmp_path / key / "eval_knn.json").exists()


def test_fine_tuning_starts_from_a_pretraining_of_another_size(small, tmp_path, capsys):
    """main_dino's backbone, its settings from the file, positions resampled and said; layer-wise rates in the groups.

    The run of the one method is not continued by the other.
    """
    flags = [*pretraining.VIT, "--data_path", small, "--epochs", 1, "--eval_every", 0, "--max_steps", 1]
    assert pretraining.train(*flags, "--output_dir", tmp_path / "dino") == 0
    checkpoint = tmp_path / "dino" / "checkpoint.pth"
    with pytest.raises(InputError, match="from a run by dino, which supervised can't continue"):
        train(*VIT, "--data_path", small, "--output_dir", tmp_path / "dino")
    flags = ["--recipe", "finetune", "--init_from", checkpoint, "--checkpoint_key", "teacher", "--img_size", 48]
    flags += ["--layer_decay", 0.5, "--batch_size_per_gpu", 16, "--num_workers", 0, "--report", "false"]
    flags += ["--data_path", small, "--epochs", 1, "--max_steps", 1, "--lr", 0, "--min_lr", 0, "--warmup_lr", 0]
    assert train(*flags, "--output_dir", tmp_path / "tuned") == 0
    said = capsys.readouterr().out
    assert "position embeddings resampled from 4x4 to 6x6 patches" in said
    tuned, start = read_checkpoint(tmp_path / "tuned" / "checkpoint.pth"), read_checkpoint(checkpoint)
    assert tuned["config"]["embed_dim"] == 24
    for name, value in start["teacher"].items():
        if name.startswith("backbone.blocks"):
            assert torch.equal(tuned["student"][f"module.{name}"], value)
    assert {group["lr_scale"] for group in tuned["optimizer"]["param_groups"]} == {1.0, 0.5, 0.25, 0.125}
    with pytest.raises(InputError, match="from a run by supervised, which dino can't continue"):
        pretraining.train(*pretraining.VIT, "--data_path", small, "--output_dir", tmp_path / "tuned")


# ------------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        ("vit_small", {"optimizer": "adamw", "lr": 5e-4, "weight_decay": 0.05, "drop_rate": 0.1, "drop_path_rate": 0.1,
                       "mixup": 0.2, "cutmix": 0.0, "smoothing": 0.1, "auto_augment": "rand-m9-mstd0.5-inc1",
                       "reprob": 0.25, "remode": "pixel", "model_ema_decay": 0.99996, "min_lr": 1e-6, "crop_pct": 0.9}),
        ("resnet50", {"optimizer": "nesterov", "lr": 0.4, "weight_decay": 2e-5, "aug_splits": 3, "jsd_loss": True,
                      "split_bn": True, "reprob": 0.6, "resplit": True, "crop_pct": 0.95}),
        ("convnext_small", {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05, "drop_path_rate": 0.4,
                            "mixup": 0.8, "cutmix": 1.0, "model_ema_decay": 0.9999, "crop_pct": 0.875}),
    ],
)  # fmt: skip
def test_recipes_are_the_published_ones(arch, expected):
    """Each family's recipe, and where its values came from."""
    args = resolved("--arch", arch)
    assert {key: getattr(args, key) for key in expected} == expected
    assert args.sources["lr"].startswith("recipe ")
    assert args.weight_decay_end == args.weight_decay


def test_a_flag_leaves_out_what_the_recipe_has_against_it():
    """Splits by flag switch the recipe's mixing off, mixing by flag the recipe's splits, and the sources tell."""
    splits = resolved("--aug_splits", 2)
    assert (splits.mixup, splits.cutmix, splits.aug_splits) == (0, 0, 2)
    assert splits.sources["mixup"] == "left out for aug_splits"
    mixing = resolved("--arch", "resnet50", "--mixup", 0.2)
    assert (mixing.aug_splits, mixing.jsd_loss, mixing.split_bn, mixing.mixup) == (0, False, False, 0.2)


def test_help_says_that_the_rate_is_not_scaled(capsys):
    """--help describes --lr, and does not offer the k-NN of self-supervised runs."""
    with pytest.raises(SystemExit):
        main_supervised.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "not scaled with the batch" in text
    assert "--nb_knn" not in text


def test_the_rate_is_as_given(small, tmp_path):
    """The peak of the schedule is --lr, whatever the batch."""
    flags = [*VIT, "--data_path", small, "--output_dir", tmp_path, "--epochs", 2, "--warmup_epochs", 0, "--lr", 0.003]
    assert train(*flags, "--min_lr", 0.003, "--max_steps", 2, "--global_batch_size", 32) == 0
    assert rows(tmp_path)[-1]["train_lr"] == pytest.approx(0.003)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--jsd_loss", "true"], r"--jsd_loss true needs augmentation splits; use --aug_splits 3"),
        (["--split_bn", "true"], r"--split_bn true needs augmentation splits"),
        (["--split_bn", "true", "--aug_splits", 3, "--mixup", 0], "no BatchNorm to split"),
        (["--aug_splits", 3, "--mixup", 0.2], "--aug_splits 3 with --mixup or --cutmix"),
        (["--aug_splits", 1], "--aug_splits 1"),
        (["--batch_size_per_gpu", 1], r"1 per process is odd; use --batch_size_per_gpu 2"),
        (["--batch_size_per_gpu", 15], r"15 per process is odd; use --batch_size_per_gpu 16"),
        (["--num_classes", 1], "--num_classes 1: .* has class number 1"),
        (["--recipe", "finetune"], "--init_from"),
        (["--recipe", "best"], "choose auto, vit, resnet, convnext, finetune, demo"),
        (["--auto_augment", "wild-m9"], "--auto_augment wild-m9: timm does not know"),
        (["--smoothing", 1], "--smoothing 1"),
        (["--layer_decay", 0], "--layer_decay 0"),
        (["--crop_pct", 2], "--crop_pct 2"),
        (["--crop_scale", 0.5, 0.1], "--crop_scale 0.5 0.1"),
        (["--in_chans", 1], "--in_chans 1"),
        (["--keep_best", "true", "--eval_every", 0], "--keep_best true with --eval_every 0"),
        (["--evaluate"], "checkpoint.pth does not exist"),
    ],
)
def test_bad_input_is_one_clear_error(small, tmp_path, flags, message):
    """One line with the flag, the value and what to do."""
    with pytest.raises(InputError, match=message) as raised:
        train(*VIT, "--data_path", small, "--output_dir", tmp_path, *flags)
    assert "\n" not in str(raised.value)


def test_images_without_labels_are_refused(imagenet_sample, tmp_path):
    """A bare folder of images can't be learned with labels."""
    with pytest.raises(InputError, match="has no labels, which supervised training needs"):
        train(*VIT, "--data_path", imagenet_sample, "--output_dir", tmp_path)


def test_other_classes_in_val_are_refused(small, tmp_path):
    """Train and val with different class folders: the error names them; exit code 2."""
    root = tmp_path / "data"
    for split in ("train", "val"):
        for folder in (small / split).iterdir():
            (root / split).mkdir(parents=True, exist_ok=True)
            os.symlink(folder, root / split / folder.name, target_is_directory=True)
    (first, *_) = sorted((root / "val").iterdir())
    first.rename(first.with_name("unheard_of"))
    flags = [*VIT, "--data_path", root, "--output_dir", tmp_path / "out"]
    with pytest.raises(InputError, match="unheard_of"):
        train(*flags)
    with pytest.raises(SystemExit) as stopped:
        run_program(main_supervised.main, [str(flag) for flag in flags])
    assert stopped.value.code == 2
