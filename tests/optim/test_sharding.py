"""Sharded runs: the numbers, checkpoints and refusals of runs whose models are copied to every process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import backbones
from distill.losses import DINOLoss
from optim import sharding
from runtime.checkpoint import read_checkpoint
from runtime.guards import InputError
from tests import processes
from tests.pretraining import FAMILIES, VIT, rows, train

RUN = ["--eval_every", 2, "--nb_knn", 5, "--global_batch_size", 16, "--epochs", 2, "--freeze_last_layer", 0,
       "--clip_grad", 0.3, "--lr", 0.01]  # fmt: skip
SETTINGS = {
    "adamw": [],
    "lars": ["--optimizer", "lars", "--lr", 1, "--grad_accum", 2, "--grad_checkpointing", "true"],
    "official": ["--mode", "official", "--norm_last_layer", "false", "--report", "true", "--use_bn_in_head", "true"],
}


def assert_near(one: Path, other: Path) -> None:
    """Losses, norms, k-NN and checkpoints of two runs agree but for the order of sums."""
    for mine, theirs in zip(rows(one), rows(other), strict=True):
        for key in ("train_loss", "train_entropy", "train_grad_norm"):
            assert theirs[key] == pytest.approx(mine[key], rel=1e-5)
        assert mine.get("k-NN") == theirs.get("k-NN")
        assert mine["monitors"] == pytest.approx(theirs["monitors"], rel=1e-3)
    a, b = (read_checkpoint(folder / "checkpoint.pth") for folder in (one, other))
    assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
    for key in ("student", "teacher", "dino_loss"):
        assert list(a[key]) == list(b[key])
        for name, value in a[key].items():
            assert value.shape == b[key][name].shape
            # Some vectors have gradients that are zero by symmetry (a key's bias, SimPool's beta, biases before
            # BatchNorm): AdamW turns their rounding into steps of either sign.
            if value.ndim > 1:
                assert (value - b[key][name]).norm() <= 1e-4 * value.norm(), name


@pytest.fixture(scope="module")
def both(request, small, tmp_path_factory) -> tuple[list, Path]:
    """Flags, and a folder with the run `ddp` and the run `fsdp` on two processes."""
    folder = tmp_path_factory.mktemp(request.param)
    flags = [*VIT, *RUN, *SETTINGS[request.param], "--data_path", small]
    processes.run([*flags, "--output_dir", folder / "ddp"], folder, world=2)
    processes.run([*flags, "--output_dir", folder / "fsdp", "--fsdp", "true"], folder, world=2)
    return flags, folder


@pytest.mark.parametrize(
    "both", ["adamw", *(pytest.param(name, marks=pytest.mark.full) for name in ("lars", "official"))], indirect=True
)
def test_a_sharded_run_is_the_run(both):
    """Two processes that share the models train as two that each have them, and write the same checkpoint."""
    flags, folder = both
    assert_near(folder / "ddp", folder / "fsdp")
    first = [row["train_loss"] for row in rows(folder / "fsdp")]
    assert len(set(first)) == 2, "nothing was learned, so nothing was compared"
    if "--report" in flags[len(VIT) :]:
        assert (folder / "fsdp" / "attention.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("both", "before", "after", "world"),
    [
        pytest.param("adamw", "true", "true", 2, marks=pytest.mark.full), ("adamw", "true", "false", 2),
        pytest.param("lars", "false", "true", 2, marks=pytest.mark.full),
        pytest.param("lars", "true", "false", 1, marks=pytest.mark.full),
    ],
    indirect=["both"],
)  # fmt: skip
def test_checkpoints_continue_whatever_the_sharding(both, tmp_path, before, after, world):
    """Interrupted in its second epoch and continued with or without shards, a run ends as if never interrupted."""
    flags, folder = both
    flags = [*flags, "--output_dir", tmp_path / "run"]
    processes.run([*flags, "--max_steps", 8, "--fsdp", before], tmp_path, world=2)
    ranks = processes.run([*flags, "--fsdp", after], tmp_path, world=world)
    assert "at step 8" in ranks.text(0)
    if before == after == "true":
        assert_equal_models(folder / "fsdp", tmp_path / "run")
    else:
        assert_near(folder / "ddp", tmp_path / "run")


def assert_equal_models(one: Path, other: Path) -> None:
    a, b = (read_checkpoint(folder / "checkpoint.pth") for folder in (one, other))
    for key in ("student", "teacher", "dino_loss"):
        for name in a[key]:
            assert torch.equal(a[key][name], b[key][name]), f"{key} {name}"
    for i, state in a["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(b["optimizer"]["state"][i][name]))


def poison_one_rank(rank: int) -> None:
    """Make the loss of rank 1 NaN from its third step on."""
    if rank != 1:
        return
    real, calls = DINOLoss.step_terms, []

    def step_terms(self, *args):
        calls.append(1)
        loss, *others = real(self, *args)
        return (loss * float("nan") if len(calls) > 2 else loss), *others

    DINOLoss.step_terms = step_terms


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_a_nan_on_one_rank_is_refused_by_all(small, tmp_path, name):
    """All processes refuse the step and stop alike; the state before it is finite, and one process can replay it."""
    flags = [*FAMILIES[name], "--data_path", small, "--eval_every", 0, "--global_batch_size", 16, "--fsdp", "true"]
    flags += ["--max_bad_steps", 2, "--output_dir", tmp_path / "run", "--checkpoint_every_steps", 1]
    ranks = processes.start(flags, tmp_path, world=2, patch=poison_one_rank)
    assert ranks.wait() == [3, 3], ranks.text()
    (file,) = (tmp_path / "run").glob("replay_step*.pth")
    content = read_checkpoint(file)
    for key in ("student", "teacher", "dino_loss"):
        assert all(value.isfinite().all() for value in content[key].values() if value.is_floating_point())
    assert content["optimizer"]["state"][0]["step" if name == "vit" else "mu"] is not None
    assert train("--replay", file) == 0  # finite without the injected NaN


def test_a_failed_last_save_is_tried_again(small, tmp_path):
    """The retry is rank 0's alone, while the other processes wait."""
    flags = [*VIT, "--data_path", small, "--eval_every", 0, "--global_batch_size", 16, "--fsdp", "true"]
    flags += ["--max_steps", 2, "--output_dir", tmp_path / "run"]
    ranks = processes.run(flags, tmp_path, world=2, patch=fail_first_save)
    assert "no space left" in ranks.text(0)
    assert read_checkpoint(tmp_path / "run" / "checkpoint.pth")["iteration"] == 2


def fail_first_save(rank: int) -> None:
    """Let the first checkpoint fail as on a full disk."""
    from runtime import saver

    real, calls = saver.save_checkpoint, []

    def save_checkpoint(*args):
        calls.append(1)
        if len(calls) == 1:
            raise OSError("no space left")
        real(*args)

    saver.save_checkpoint = save_checkpoint


def test_one_process_has_nobody_to_share_with(small, tmp_path):
    """Refused before anything is built, with the launcher to use."""
    with pytest.raises(InputError, match="torchrun"):
        train(*VIT, "--data_path", small, "--output_dir", tmp_path, "--fsdp", "true")


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--optimizer", "sgd"], "adamw or lars"), (["--compile", "true"], "--compile true is not supported")],
)
def test_what_cannot_be_sharded_is_refused(small, tmp_path, flags, message):
    """All processes end with code 2 and the reason."""
    ranks = processes.start(
        [*VIT, "--data_path", small, "--output_dir", tmp_path / "x", "--fsdp", "true", *flags], tmp_path, world=2
    )
    assert ranks.wait() == [2, 2]
    assert message in ranks.text(0)


def test_an_older_torch_on_a_cpu_is_refused(monkeypatch):
    """torch 2.6 shards on CUDA only, and would fail within the first step."""
    monkeypatch.setattr(sharding, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.cpu, "Stream", object)
    with pytest.raises(InputError, match="shards on CUDA only"):
        sharding.check_can_shard(torch.device("cpu"), "adamw", compiled=False)


@pytest.mark.parametrize(
    ("arch", "blocks"), [("vit_tiny", 12), ("resnet18", 8), ("convnext_tiny", 18), ("vit_tiny_patch16_224", 12)]
)
def test_units_are_the_blocks(arch, blocks):
    """One unit for every block of a backbone, of timm's too, and none within another."""
    found = list(sharding.units(backbones.build_backbone(arch, mode="simpool", img_size=32)))
    assert len(found) == blocks
    inner = [module for unit in found for module in unit.modules() if module is not unit]
    assert not any(unit is module for unit in found for module in inner)


def test_a_skeleton_becomes_the_model_again():
    """A skeleton has the buffers and no memory for parameters; filled with a state it computes what the model does."""
    model = backbones.build_backbone("resnet18", mode="simpool")
    model(torch.randn(4, 3, 32, 32))  # statistics of its own
    bones = sharding.skeleton(model)
    assert all(parameter.is_meta for parameter in bones.parameters())
    whole = sharding.whole_copy(model, bones, torch.device("cpu"))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(whole.eval()(x), model.eval()(x))
