"""The pretraining program: arguments, the step, runs on real images, resume, several ranks."""

from __future__ import annotations

import argparse
import math
import re
import shutil
from pathlib import Path

import pytest
import torch

import main_dino
from runtime.checkpoint import read_checkpoint
from runtime.distributed import leave
from runtime.guards import InputError, NonFiniteError, run_program
from tests import processes
from tests.pretraining import FAMILIES, TINY, VIT, assert_equal_states, rows, train

# ---- arguments


def resolved(*flags) -> argparse.Namespace:
    return main_dino.parse_arguments(["--data_path", "some/images", *map(str, flags)])


def test_defaults_come_from_the_family_and_flags_win():
    """The recipe follows the architecture; an explicit flag wins; every value's source is told."""
    vit, resnet = resolved("--arch", "vit_small"), resolved("--arch", "resnet50", "--lr", 0.1)
    assert (vit.optimizer, vit.out_dim, vit.lr) == ("adamw", 65536, 5e-4)
    assert (resnet.optimizer, resnet.out_dim, resnet.lr) == ("lars", 60000, 0.1)
    assert vit.sources["lr"] == "recipe simpool_vit"
    assert resnet.sources["lr"] == "flag"
    assert resolved("--recipe", "dino").local_crops_number == 8


def test_scripts_that_fill_their_own_namespace(small, tmp_path, capsys):
    """DINO's way: a parser with ours as parent, then train_dino(args)."""
    parser = argparse.ArgumentParser("DINO", parents=[main_dino.get_args_parser()])
    args = parser.parse_args([*VIT, "--data_path", str(small), "--output_dir", str(tmp_path), "--max_steps", "2"])
    try:
        assert main_dino.train_dino(args) == 0
    finally:
        leave()
    assert "done: 2 steps" in capsys.readouterr().out


def test_config_file_of_a_run_is_a_config(small, tmp_path):
    """A run's config.json repeats the run; flags on the line still win."""
    assert train(*VIT, "--data_path", small, "--output_dir", tmp_path / "a", "--epochs", 1, "--max_steps", 3) == 0
    config = tmp_path / "a" / "config.json"
    args = main_dino.parse_arguments(["--config", str(config), "--output_dir", "b", "--lr", "0.25"])
    assert (args.embed_dim, args.output_dir, args.lr) == (24, "b", 0.25)
    assert (args.sources["embed_dim"], args.sources["lr"]) == ("config", "flag")
    assert train("--config", config, "--output_dir", tmp_path / "b") == 0
    assert_equal_states(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    ("img", "patch", "arch", "expected"),
    [(224, 16, "vit_small", 96), (32, 4, "vit_small", 12), (224, 16, "resnet50", 96), (32, 16, "resnet50", 14)],
)
def test_local_crop_size(img, patch, arch, expected):
    """Without a flag local crops keep the published proportion, in whole patches for a ViT."""
    args = resolved("--arch", arch, "--img_size", img, "--patch_size", patch)
    assert args.local_crops_size == expected


def test_warmups_longer_than_training_are_cut():
    """Warm-ups longer than the training are cut, with a note; the published code crashes."""
    args = resolved("--epochs", 3)
    assert (args.warmup_epochs, args.warmup_teacher_temp_epochs) == (3, 3)
    assert any("warmup_teacher_temp_epochs 30" in note for note in args.notes)


def test_published_flags_are_all_there():
    """Every flag of DINO's and SimPool's programs parses under its name, with dashes too."""
    line = " ".join(
        [
            "--arch vit_small --mode simpool --gamma None --patch_size 16 --out_dim 65536 --norm_last_layer false",
            "--momentum_teacher 0.996 --use_bn_in_head false --warmup_teacher_temp 0.04 --teacher_temp 0.07",
            "--warmup_teacher_temp_epochs 30 --use_fp16 true --weight_decay 0.04 --weight_decay_end 0.4 --clip_grad 0",
            "--batch_size_per_gpu 100 --epochs 100 --freeze_last_layer 1 --lr 0.0005 --warmup_epochs 10 --min_lr 1e-5",
            "--optimizer adamw --drop_path_rate 0.1 --global_crops_scale 0.25 1 --local_crops_number 6",
            "--local_crops_scale 0.05 0.25 --backend nccl --data_path demo --output_dir x --saveckp_freq 20 --seed 0",
            "--num_workers 10 --dist_url env:// --local_rank 0 --subset 260 --eval_every 5 --nb_knn 10 20",
            "--temperature 0.07",
        ]
    ).split(" ")
    args = main_dino.parse_arguments(line)
    assert (args.gamma, args.amp, args.subset) == (None, "fp16", 260)
    dashed = [word.replace("_", "-") if word.startswith("--") else word for word in line]
    assert vars(main_dino.parse_arguments(dashed)) == vars(args)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arch", "vit_smal"], "vit_small"),
        (["--epochs", "0"], "--epochs 0"),
        (["--global_crops_scale", "0", "1"], "--global_crops_scale"),
        (["--local_crops_scale", "0.5", "0.1"], "0.1 0.5"),
        (["--img_size", "33"], "33 is not divisible by --patch_size 8; use 32 or 40"),
        (["--local_crops_size", "20"], "use 16 or 24"),
        (["--recipe", "mine"], "simpool_vit"),
        (["--batch_size_per_gpu", "97"], "96 images, fewer than one global batch of 97"),
        (["--global_batch_size", "0"], "--global_batch_size 0"),
        (["--init_from", "nowhere.pth"], "nowhere.pth does not exist"),
        (["--data_path", "/nonexistent"], "/nonexistent"),
        (["--lr", "nan"], "--lr nan"),
        (["--momentum_teacher", "2"], "--momentum_teacher 2"),
        (["--config", "nowhere.json"], "nowhere.json does not exist"),
        (["--output_dir", "/proc/nothing"], "/proc/nothing cannot be written"),
        (["--arch", "resnet18", "--depth", "3"], "depth"),
        (["--local_crops_number", "-1"], "--local_crops_number -1"),
    ],
)
def test_bad_input_is_one_clear_error(small, tmp_path, flags, message):
    """Each mistake names its value and the remedy, before any training."""
    with pytest.raises(InputError, match=re.escape(message)):
        train(*VIT, "--data_path", small, "--output_dir", tmp_path, *flags)
    assert not (tmp_path / "checkpoint.pth").exists()


def test_reduced_precision_is_refused_where_torch_errs(small, tmp_path):
    """ResNet-18 on 14-pixel crops meets one-pixel maps, whose bf16 gradients on a CPU are garbage: a clear error."""
    flags = [*FAMILIES["resnet"], "--local_crops_size", 14, "--data_path", small, "--output_dir", tmp_path]
    with pytest.raises(InputError, match=r"--local_crops_size 14 with --amp bf16.*--amp none"):
        train(*flags, "--amp", "bf16", "--device", "cpu")


def test_a_size_that_no_crop_has_is_no_reason_to_refuse():
    """Without local crops their size, which would meet one-pixel maps, is not tried."""
    flags = ["--local_crops_number", 0, "--local_crops_size", 14, "--amp", "bf16", "--device", "cpu"]
    args = resolved(*FAMILIES["resnet"], *flags)
    args.torch_device = torch.device("cpu")
    student, _ = main_dino.build_models(args)
    assert student.backbone.num_features == 512


@pytest.mark.parametrize("flags", [["--mode", "both"], ["--optimizer", "adam"], ["--nonsense", "1"], ["--lr", "fast"]])
def test_wrong_words_leave_with_code_2(flags, capsys):
    """argparse's own errors are one line that names the flag, and exit with 2, as all bad input does."""
    with pytest.raises(SystemExit) as leaving:
        run_program(main_dino.main, ["--data_path", "demo", *flags])
    assert leaving.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert flags[0] in error
    assert error.count("\n") == 1


# ---- runs on real images


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_trains_and_is_read_back(small, tmp_path, name):
    """Three steps on real images; the checkpoint has DINO's keys and prefixes, and loads strictly by itself."""
    import utils

    assert (
        train(*FAMILIES[name], "--data_path", small, "--output_dir", tmp_path, "--max_steps", 3, "--eval_every", 0) == 0
    )
    content = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert {"student", "teacher", "optimizer", "epoch", "args", "dino_loss", "iteration", "config"} <= set(content)
    assert all(key.startswith(("module.backbone.", "module.head.")) for key in content["student"])
    assert all(key.startswith(("backbone.", "head.")) for key in content["teacher"])
    assert {"head.last_layer.weight_g", "head.last_layer.weight_v"} <= set(content["teacher"])
    loaded = utils.load_checkpoint_model(tmp_path / "checkpoint.pth")
    assert loaded.config["arch"] == FAMILIES[name][1]
    x = torch.randn(2, 3, 32, 32)
    if name == "vit":
        torch.testing.assert_close(loaded.model(x)[:1], loaded.model(x[:1]))
    assert (tmp_path / "DONE").exists()


def test_log_evaluation_and_tensorboard(small, tmp_path, capsys):
    """One JSON row an epoch with the losses and k-NN, TensorBoard's tags, the printed sources and progress."""
    flags = [
        *VIT,
        "--data_path",
        small,
        "--output_dir",
        tmp_path,
        "--epochs",
        2,
        "--eval_every",
        1,
        "--nb_knn",
        1,
        5,
        500,
    ]
    assert train(*flags) == 0
    first, second = rows(tmp_path)
    assert (first["epoch"], second["epoch"]) == (0, 1)
    assert set(first["k-NN"]) == {"1", "5", "96"}
    assert 0 <= first["k-NN"]["5"]["top1"] <= 100
    assert math.isclose(first["train_kl"], first["train_loss"] - first["train_entropy"], rel_tol=1e-4)
    out = capsys.readouterr().out
    for words in ("recipe simpool_vit", "matmul precision", "images/s", "global batch: 16", "lr ", "entropy"):
        assert words in out
    from tests.tensorboard_tags import tags

    assert {"train/loss", "train/kl", "optim/teacher_temp", "perf/data_wait", "eval/knn5_top1"} <= tags(tmp_path)


def test_unlabelled_images_train(imagenet_sample, tmp_path, capsys):
    """A bare folder of photographs trains, and it is said why there is no k-NN."""
    assert train(*VIT, "--data_path", imagenet_sample, "--output_dir", tmp_path, "--max_steps", 2) == 0
    assert "no k-NN evaluation while training: the images have no labels" in capsys.readouterr().out


def test_training_from_a_published_checkpoint(small, tmp_path, capsys):
    """--init_from takes a backbone from a checkpoint of the reference's format."""
    from tests.reference import reference_checkpoint_path

    flags = [
        "--arch",
        "vit_small",
        *TINY,
        "--embed_dim",
        48,
        "--num_heads",
        3,
        "--img_size",
        64,
        "--local_crops_size",
        32,
    ]
    flags += ["--data_path", small, "--output_dir", tmp_path, "--max_steps", 1, "--lr", 0, "--min_lr", 0]
    assert train(*flags, "--init_from", reference_checkpoint_path()) == 0
    ours = read_checkpoint(tmp_path / "checkpoint.pth")["student"]
    theirs = read_checkpoint(reference_checkpoint_path())["student"]
    name = "module.backbone.blocks.1.attn.qkv.weight"
    assert torch.equal(ours[name], theirs[name])
    assert "new run from the backbone of" in capsys.readouterr().out


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_optimizers_and_precisions_learn(small, tmp_path, optimizer, amp):
    """With each optimizer and precision a few steps move the student, and the teacher follows, all finite."""
    flags = [*VIT, "--data_path", small, "--output_dir", tmp_path, "--optimizer", optimizer, "--amp", amp]
    assert train(*flags, "--epochs", 1, "--eval_every", 0, "--warmup_epochs", 0) == 0
    content = read_checkpoint(tmp_path / "checkpoint.pth")
    name = "backbone.blocks.0.attn.qkv.weight"
    student, teacher = content["student"][f"module.{name}"], content["teacher"][name]
    assert student.isfinite().all()
    assert not torch.equal(student, teacher)
    assert ("fp16_scaler" in content) == (amp == "fp16")


# ---- the step


def test_student_and_teacher_share_the_pooling():
    """gamma reaches both, drop path the student only, and they start from the same weights."""
    args = main_dino.parse_arguments([*VIT, "--data_path", "demo", "--gamma", "1.5", "--drop_path_rate", "0.3"])
    student, teacher = main_dino.build_models(args)
    assert student.backbone.simpool.gamma == teacher.backbone.simpool.gamma == 1.5
    rates = [[m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath"] for model in (student, teacher)]
    assert max(rates[0]) == pytest.approx(0.3)
    assert not any(rates[1])
    for name, value in student.state_dict().items():
        assert torch.equal(value, teacher.state_dict()[name])
    assert not any(p.requires_grad for p in teacher.parameters())


def test_grad_accumulation_is_the_large_batch(small, tmp_path):
    """Four forwards of 8 images give the step of one forward of 32, center and loss included."""
    for name, flags in (
        ("one", ["--batch_size_per_gpu", 32]),
        ("four", ["--batch_size_per_gpu", 8, "--grad_accum", 4]),
    ):
        common = [*VIT, "--data_path", small, "--eval_every", 0, "--epochs", 1, "--output_dir", tmp_path / name]
        assert train(*common, *flags, "--max_steps", 3, "--warmup_epochs", 0) == 0
    one, four = (read_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("one", "four"))
    assert rows(tmp_path / "one")[0]["train_loss"] == pytest.approx(rows(tmp_path / "four")[0]["train_loss"], rel=1e-5)
    torch.testing.assert_close(one["dino_loss"]["center"], four["dino_loss"]["center"], rtol=1e-5, atol=1e-6)


# ---- resume


STOPS = [
    (name, stop) if name == "vit" or stop == 5 else pytest.param(name, stop, marks=pytest.mark.full)
    for name in ("vit", "resnet")
    for stop in (1, 5, 6, 8)
]


@pytest.mark.parametrize(("name", "stop"), STOPS)
def test_a_stopped_run_ends_as_if_it_had_not_been(small, tmp_path, name, stop):
    """Stopped within or at the end of an epoch and started again, a run ends bit for bit the same, log included."""
    flags = [*FAMILIES[name], "--data_path", small, "--epochs", 2, "--eval_every", 1, "--nb_knn", 5]
    assert train(*flags, "--output_dir", tmp_path / "whole") == 0
    assert train(*flags, "--output_dir", tmp_path / "parts", "--max_steps", stop) == 0
    assert train(*flags, "--output_dir", tmp_path / "parts", "--num_workers", 2) == 0
    assert_equal_states(tmp_path / "whole", tmp_path / "parts")


def test_starting_a_complete_run_again_does_nothing(small, tmp_path, capsys):
    """The same command after the end says so and exits with 0."""
    flags = [*VIT, "--data_path", small, "--epochs", 1, "--eval_every", 0, "--output_dir", tmp_path]
    assert train(*flags) == 0
    before = (tmp_path / "checkpoint.pth").read_bytes()
    assert train(*flags) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert (tmp_path / "checkpoint.pth").read_bytes() == before


def test_changed_mathematics_are_refused_with_a_diff(small, tmp_path, capsys):
    """A changed lr or global batch is refused with old and new; a cosmetic change is mentioned; a flag accepts."""
    flags = [*VIT, "--data_path", small, "--epochs", 3, "--eval_every", 0, "--output_dir", tmp_path, "--lr", 0.0005]
    assert train(*flags, "--max_steps", 7) == 0
    with pytest.raises(InputError, match=re.escape("lr: 0.0005 -> 0.01")):
        train(*flags, "--lr", 0.01)
    with pytest.raises(InputError, match=re.escape("global_batch: 16 -> 8")):
        train(*flags, "--batch_size_per_gpu", 8)
    capsys.readouterr()
    assert train(*flags, "--max_steps", 8, "--saveckp_freq", 3) == 0
    assert "saveckp_freq 20 -> 3" in capsys.readouterr().out
    assert train(*flags, "--batch_size_per_gpu", 8, "--allow_changed_args", "true") == 0
    assert [row["epoch"] for row in rows(tmp_path)] == [0, 1, 2]


def test_a_published_checkpoint_is_no_run_to_continue(small, tmp_path):
    """The reference's checkpoint in the output folder is refused, with the way to start from it."""
    from tests.reference import reference_checkpoint_path

    shutil.copy(reference_checkpoint_path(), tmp_path / "checkpoint.pth")
    with pytest.raises(InputError, match="--init_from"):
        train(*VIT, "--data_path", small, "--output_dir", tmp_path)


def test_two_runs_in_one_folder(small, tmp_path):
    """The second is refused while the first holds the folder."""
    from runtime.lock import FolderLock

    lock = FolderLock(tmp_path)
    with pytest.raises(InputError, match="another run is using"):
        train(*VIT, "--data_path", small, "--output_dir", tmp_path)
    lock.release()


# ---- several ranks


def test_two_ranks_are_one_process(small, tmp_path):
    """At the same global batch two gloo processes give the losses and weights of one."""
    flags = [*VIT, "--data_path", small, "--epochs", 2, "--eval_every", 1, "--nb_knn", 5, "--global_batch_size", 16]
    processes.run([*flags, "--output_dir", tmp_path / "one"], tmp_path)
    processes.run([*flags, "--output_dir", tmp_path / "two"], tmp_path, world=2)
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        for key in ("train_loss", "train_entropy", "train_grad_norm"):
            assert two[key] == pytest.approx(one[key], rel=1e-5)
        assert one["k-NN"] == two["k-NN"]
    a, b = (read_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("one", "two"))
    torch.testing.assert_close(a["dino_loss"]["center"], b["dino_loss"]["center"], rtol=1e-4, atol=1e-6)


def test_a_refused_step_can_be_replayed(small, tmp_path, capsys):
    """A run that diverges leaves a replay file with the images' names; replaying it refuses the step again."""
    flags = [*VIT, "--data_path", small, "--epochs", 9, "--eval_every", 0, "--output_dir", tmp_path, "--lr", 1e30]
    with pytest.raises(NonFiniteError, match="replay_step"):
        train(*flags, "--max_bad_steps", 2, "--warmup_epochs", 0)
    (file,) = tmp_path.glob("replay_step*.pth")
    assert "truck" in str(read_checkpoint(file)["replay"]["names"]) or Path(small).name in str(
        read_checkpoint(file)["replay"]["names"]
    )
    capsys.readouterr()
    assert train("--replay", file) == 3
    assert "not finite, refused" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["vit", "resnet", "convnext"])
def test_gradient_checkpointing_changes_nothing(small, tmp_path, name):
    """Recomputing activations gives the same loss and the same weights."""
    for setting in ("false", "true"):
        flags = ["--data_path", small, "--eval_every", 0, "--output_dir", tmp_path / setting, "--max_steps", 2]
        assert train(*FAMILIES[name], *flags, "--grad_checkpointing", setting) == 0
    a, b = (read_checkpoint(tmp_path / s / "checkpoint.pth") for s in ("false", "true"))
    for key, value in a["student"].items():
        torch.testing.assert_close(value, b["student"][key])


def test_the_report_of_a_run(small, tmp_path):
    """A finished run leaves a page with its curves, and the attention maps of its probe images."""
    flags = [*VIT, "--data_path", small, "--epochs", 2, "--eval_every", 1, "--output_dir", tmp_path, "--report", "true"]
    assert train(*flags) == 0
    assert "<img" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "attention.png").stat().st_size > 10_000
    assert set(rows(tmp_path)[0]["monitors"]) >= {"entropy", "information", "mean_cosine", "effective_rank"}


def test_refused_input_ends_all_ranks(tmp_path):
    """An error that every rank meets ends every rank with code 2 and its message."""
    ranks = processes.start([*VIT, "--data_path", "/nonexistent", "--output_dir", tmp_path / "x"], tmp_path, world=2)
    assert ranks.wait() == [2, 2]
    assert "error: " in ranks.text(0)
