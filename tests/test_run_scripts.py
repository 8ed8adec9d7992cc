"""The published recipes' scripts, printed and not run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.boxed_images import boxed_folder
from tests.patience import PATIENCE_S
from tests.small_images import small_root, tiny_checkpoint

SCRIPTS = Path(__file__).resolve().parents[1] / "run_scripts"
EXPECTED = {
    "vit_small_official": {"arch": "vit_small", "mode": "official", "gamma": "auto", "global_batch_size": "800"},
    "vit_small_simpool": {"arch": "vit_small", "mode": "simpool", "gamma": "auto", "epochs": "100", "lr": "0.0005"},
    "vit_small_simpool_no_gamma": {"mode": "simpool", "gamma": "None", "clip_grad": "0.0"},
    "vit_small_simpool_300ep": {"mode": "simpool", "epochs": "300"},
    "vit_small_simpool_imagenet20": {"mode": "simpool", "subset": "260"},
    "resnet50_official": {"arch": "resnet50", "mode": "official", "optimizer": "lars", "global_batch_size": "1440"},
    "resnet50_simpool": {"arch": "resnet50", "mode": "simpool", "lr": "0.3", "out_dim": "60000"},
    "resnet50_simpool_no_gamma": {"arch": "resnet50", "gamma": "None"},
    "convnext_small_official": {"arch": "convnext_small", "mode": "official", "global_batch_size": "480"},
    "convnext_small_simpool": {"arch": "convnext_small", "mode": "simpool", "clip_grad": "0.3", "lr": "0.001"},
    "convnext_small_simpool_no_gamma": {"arch": "convnext_small", "gamma": "None", "drop_path_rate": "0.4"},
    "attmask_vit_small_hint": {"pred_shape": "attmask_hint", "global_batch_size": "240", "out_dim": "8192"},
    "attmask_vit_small_high": {"pred_shape": "attmask_high", "teacher_temp": "0.07", "shared_head": "True"},
    "attmask_vit_small_high_300ep": {"pred_shape": "attmask_high", "epochs": "300", "global_batch_size": "800"},
    "attmask_vit_small_imagenet20": {"momentum_teacher": "0.99", "local_crops_number": "6", "subset": "260"},
    "imagenette_resnet18": {"arch": "resnet18", "lr": "0.06", "global_batch_size": "256", "img_size": "128"},
    "cifar_resnet18": {"arch": "resnet18", "stem": "small", "global_batch_size": "128", "head_layers": "2"},
    "cifar_vit": {"arch": "vit_tiny", "patch_size": "4", "img_size": "32", "local_crops_number": "0"},
    "attmask_ibot": {"pred_shape": "block", "local_crops_number": "10"},
    **{
        f"supervised_{arch}_{mode}{'_300ep' if epochs == '300' else ''}": {
            "arch": arch, "mode": mode, "epochs": epochs, "global_batch_size": batch, "lr": lr, **more,
        }
        for arch, batch, lr, more in (
            ("vit_small", "592", "0.0005", {"mixup": "0.2", "model_ema_decay": "0.99996"}),
            ("resnet50", "1024", "0.4", {"optimizer": "nesterov", "jsd_loss": "True", "aug_splits": "3"}),
            ("convnext_small", "1024", "0.001", {"cutmix": "1.0", "drop_path_rate": "0.4"}),
        )
        for mode in ("official", "simpool")
        for epochs in ("100", "300")
    },
}  # fmt: skip


@pytest.mark.full
def test_fine_tuning_resolves_to_the_published_values(tmp_path):
    """finetune.sh takes the model from the checkpoint, DeiT's recipe from AttMask; without a checkpoint it says so."""
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint.pth")
    done = run("finetune", "--dry_run", DATA="demo", CHECKPOINT=str(checkpoint))
    assert done.returncode == 0, done.stderr
    values = {line.split()[0]: line.split()[1] for line in done.stdout.splitlines() if len(line.split()) > 1}
    expected = {"embed_dim": "24", "global_batch_size": "900", "aug_repeats": "3", "epochs": "500", "cutmix": "1.0"}
    assert {key: values[key] for key in expected} == expected
    assert float(values["lr"]) == 7.5e-6 * 900 / 512
    assert run("finetune", DATA="demo", CHECKPOINT="").returncode == 2


@pytest.mark.full
def test_continuing_takes_the_model_from_the_checkpoint(tmp_path):
    """continue.sh takes the checkpoint's model and the gentle recipe; without a checkpoint it says so."""
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint.pth")
    done = run("continue", "--dry_run", "--img_size", "32", DATA="demo", CHECKPOINT=str(checkpoint))
    assert done.returncode == 0, done.stderr
    values = {line.split()[0]: line.split()[1] for line in done.stdout.splitlines() if len(line.split()) > 1}
    expected = {"embed_dim": "24", "freeze_backbone_epochs": "2", "lr": "5e-05", "checkpoint_key": "teacher"}
    assert {key: values[key] for key in expected} == expected
    assert run("continue", DATA="demo", CHECKPOINT="").returncode == 2


def run(script: str, *flags: str, **env: str) -> subprocess.CompletedProcess:
    """A script under this Python, which the scripts take as the active environment."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(SCRIPTS / f"{script}.sh"), *flags], capture_output=True, text=True, timeout=PATIENCE_S,
        env={**os.environ, "PATH": path, "NPROC": "1", **env}, check=False,
    )  # fmt: skip


# One of each program, and one with every kind of flag; the others differ in values only.
QUICK = (
    "vit_small_simpool",
    "resnet50_simpool_no_gamma",
    "attmask_vit_small_high_300ep",
    "supervised_resnet50_simpool",
)


@pytest.mark.parametrize("script", [s if s in QUICK else pytest.param(s, marks=pytest.mark.full) for s in EXPECTED])
def test_a_recipe_resolves_to_the_published_values(script):
    """--dry_run prints the configuration, which is the published one, and trains nothing."""
    done = run(script, "--dry_run", DATA="demo")
    assert done.returncode == 0, done.stderr
    values = {line.split()[0]: line.split()[1] for line in done.stdout.splitlines() if len(line.split()) > 1}
    assert {key: values[key] for key in EXPECTED[script]} == EXPECTED[script]


def test_every_recipe_is_tested():
    """No script that calls `recipe` is missing above."""
    scripts = {path.stem for path in SCRIPTS.glob("*.sh") if "\nrecipe " in path.read_text()}
    assert scripts == set(EXPECTED) | {"finetune", "continue"}


def test_without_data_it_says_what_to_set():
    """A script without DATA ends at once with the remedy."""
    done = run("vit_small_simpool", DATA="")
    assert done.returncode == 2
    assert "set DATA" in done.stderr


def test_one_command_runs_every_evaluation(cifar10, tmp_path):
    """evaluate_all.sh: a JSON of each evaluation, attention maps, one table of all, and the page."""
    checkpoint = tiny_checkpoint(tmp_path / "run" / "checkpoint.pth")
    data = small_root(cifar10, tmp_path / "data")
    settings = {"EPOCHS": "1", "BATCH": "32", "WORKERS": "0", "OMP_NUM_THREADS": "1"}
    done = run("evaluate_all", str(checkpoint), str(data), LOW_SHOT_DRAW="random", **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    output = checkpoint.with_name("checkpoint-evaluation")
    knn = json.loads((output / "eval_knn.json").read_text())["results"]["knn"][0]
    assert (output / "eval_linear.json").is_file()
    assert (output / "attention" / "grid.png").is_file()
    assert (output / "report.html").is_file()
    table = done.stdout.rpartition(f"== {checkpoint}")[2]
    assert f"{knn['top1']:.2f}" in table
    for words in ("low-shot", "linear", "logistic"):
        assert words in table.lower(), table


@pytest.mark.full
def test_images_with_boxes_are_localised_by_the_same_command(tmp_path):
    """On a VOC folder evaluate_all.sh leaves k-NN and probes out, and every protocol stands on its page."""
    checkpoint = tiny_checkpoint(tmp_path / "run" / "checkpoint.pth")
    data = boxed_folder(tmp_path / "VOC", count=4)
    done = run("evaluate_all", str(checkpoint), str(data), BATCH="4", WORKERS="0", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "k-NN and probes are left out" in done.stdout
    output = checkpoint.with_name("checkpoint-evaluation")
    for protocol in ("maxboxacc", "dino_seg", "lost", "summary"):
        assert (output / f"eval_localization_{protocol}.json").is_file()
    page = (output / "report.html").read_text()
    for words in ("MaxBoxAccV2 (4 images)", "DINO-seg (4 images)", "LOST (4 images)", "central box"):
        assert words in page
        assert words in done.stdout
    assert page.count("_best") == 3


def test_evaluating_without_arguments_shows_the_usage():
    """evaluate_all.sh without a checkpoint ends with code 2 and says what it takes."""
    done = run("evaluate_all")
    assert done.returncode == 2
    assert "CHECKPOINT DATA" in done.stderr
