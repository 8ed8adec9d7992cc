"""eval_linear.py from the command line, and under DINO's names."""

from __future__ import annotations

import json

import pytest
import torch

import eval_linear
from runtime.checkpoint import read_checkpoint
from runtime.guards import InputError
from tests.small_images import small_root, tiny_checkpoint
from tests.test_eval_knn import run_ranks


@pytest.fixture(scope="module")
def root(cifar10, tmp_path_factory):
    return small_root(cifar10, tmp_path_factory.mktemp("root"))


@pytest.fixture
def checkpoint(tmp_path):
    return tiny_checkpoint(tmp_path / "run" / "checkpoint.pth")


def probe(*flags) -> None:
    """The program with fast settings; later flags win."""
    assert (
        eval_linear.main(["--batch_size_per_gpu", "16", "--epochs", "2", "--num_workers", "0", *map(str, flags)]) == 0
    )


def results(folder, name="eval_linear") -> dict:
    return json.loads((folder / f"{name}.json").read_text())["results"]


def test_a_sweep_reports_every_head_and_selects_on_held_out_images(checkpoint, root):
    """All heads stand in the JSON and the table, the selected one has the best held-out score, and files are there."""
    probe("--pretrained_weights", checkpoint, "--data_path", root, "--lr", 0.01, 0.1, 1)
    found = results(checkpoint.parent)
    assert [row["lr"] for row in found["heads"]] == [0.01, 0.1, 1]
    assert found["selected"]["selection_top1"] >= max(row["selection_top1"] for row in found["heads"])
    assert {p.name for p in checkpoint.parent.iterdir()} >= {
        "eval_linear.png", "eval_linear_log.txt", "checkpoint.pth.tar", "best.pth.tar"
    }  # fmt: skip
    assert len((checkpoint.parent / "eval_linear_log.txt").read_text().splitlines()) == 2
    settings = json.loads((checkpoint.parent / "eval_linear.json").read_text())["settings"]
    assert settings["training_images"] == 88  # 96 less 2 of the 24 of each class


def test_a_head_does_not_depend_on_its_neighbours(checkpoint, root, tmp_path):
    """A head in a sweep of three gives the accuracies and loss that it gives in a run of its own."""
    flags = ("--pretrained_weights", checkpoint, "--data_path", root, "--select_on", "val")
    probe(*flags, "--lr", 0.01, 0.1, 1, "--output_dir", tmp_path / "three")
    probe(*flags, "--lr", 0.1, "--output_dir", tmp_path / "one")
    three, (alone,) = results(tmp_path / "three")["heads"], results(tmp_path / "one")["heads"]
    assert three[1]["val_top1"] == alone["val_top1"]
    assert three[1]["train_loss"] == pytest.approx(alone["train_loss"], rel=1e-4)


def test_an_interrupted_probe_ends_as_if_it_had_not_been(checkpoint, root, tmp_path, monkeypatch):
    """Killed after its first epoch and started again, a run ends with the uninterrupted one's heads, bit for bit."""
    flags = ("--pretrained_weights", checkpoint, "--data_path", root, "--lr", 0.1, 1, "--epochs", 3)
    probe(*flags, "--output_dir", tmp_path / "whole")
    train_epoch = eval_linear.train_epoch

    def dies_in_epoch_one(*args):
        if args[-1] == "epoch 1":
            raise KeyboardInterrupt
        return train_epoch(*args)

    monkeypatch.setattr(eval_linear, "train_epoch", dies_in_epoch_one)
    with pytest.raises(KeyboardInterrupt):
        probe(*flags, "--output_dir", tmp_path / "cut")
    monkeypatch.setattr(eval_linear, "train_epoch", train_epoch)
    probe(*flags, "--output_dir", tmp_path / "cut")
    whole, cut = (read_checkpoint(tmp_path / n / "checkpoint.pth.tar") for n in ("whole", "cut"))
    for a, b in zip(whole["optimizer"]["heads"], cut["optimizer"]["heads"], strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert results(tmp_path / "whole")["heads"] == results(tmp_path / "cut")["heads"]
    assert len((tmp_path / "cut" / "eval_linear_log.txt").read_text().splitlines()) == 3
    with pytest.raises(InputError, match=r"seed 0.*1"):
        probe(*flags, "--seed", 1, "--output_dir", tmp_path / "cut")


def test_a_saved_head_is_evaluated_with_its_checkpoint_only(checkpoint, root, tmp_path):
    """--evaluate repeats the accuracy of the selected head; another backbone, or a head of other width, is an error."""
    flags = ("--data_path", root, "--output_dir", tmp_path)
    probe("--pretrained_weights", checkpoint, *flags, "--lr", 0.1, 1)
    probe("--pretrained_weights", checkpoint, *flags, "--evaluate")
    saved, selected = results(tmp_path, "eval_linear_saved"), results(tmp_path)["selected"]
    assert saved["val_top1"] == pytest.approx(selected["val_top1"])
    other = tiny_checkpoint(tmp_path / "other.pth", seed=1)
    with pytest.raises(InputError, match="was trained on the checkpoint"):
        probe("--pretrained_weights", other, *flags, "--evaluate")
    state = {"module.linear.weight": torch.zeros(4, 7), "module.linear.bias": torch.zeros(4)}
    torch.save({"epoch": 1, "state_dict": state, "best_acc": 1.0}, tmp_path / "published.pth.tar")
    with pytest.raises(InputError, match="7 inputs"):
        probe("--pretrained_weights", checkpoint, *flags, "--evaluate", "--linear_weights",
              tmp_path / "published.pth.tar")  # fmt: skip


def test_a_published_head_is_read(checkpoint, root, tmp_path):
    """A head under the published names is validated, and may have more outputs than there are classes."""
    state = {"module.linear.weight": torch.zeros(10, 24), "module.linear.bias": torch.arange(10.0).flip(0)}
    torch.save({"epoch": 1, "state_dict": state, "best_acc": 1.0}, tmp_path / "published.pth.tar")
    probe("--pretrained_weights", checkpoint, "--data_path", root, "--output_dir", tmp_path, "--evaluate",
          "--linear_weights", tmp_path / "published.pth.tar")  # fmt: skip
    assert results(tmp_path, "eval_linear_saved")["val_top1"] == 25.0  # always class 0 of four


def test_official_vits_combine_blocks_and_pooling(root, tmp_path):
    """An official ViT's forms and rates make a grid; its default is [CLS] of the last blocks."""
    official = tiny_checkpoint(tmp_path / "official.pth", mode="official")
    flags = ("--pretrained_weights", official, "--data_path", root, "--epochs", 1)
    probe(*flags, "--lr", 0.1, 1, "--n_last_blocks", 1, 2, "--avgpool_patchtokens", "false", "true", "--output_dir",
          tmp_path / "grid")  # fmt: skip
    heads = results(tmp_path / "grid")["heads"]
    assert len({(h["n_last_blocks"], h["avgpool_patchtokens"], h["lr"]) for h in heads}) == 8
    probe(*flags, "--lr", 0.1, "--output_dir", tmp_path / "default")
    assert results(tmp_path / "default")["heads"][0]["n_last_blocks"] == 3  # of its three blocks


def test_logistic_regression_answers_without_training_crops(checkpoint, root):
    """--logistic fits cached features and writes its penalty, chosen on held-out images."""
    probe("--pretrained_weights", checkpoint, "--data_path", root, "--logistic")
    found = results(checkpoint.parent, "eval_logistic")
    assert found["top1"] > 25
    assert str(found["penalty"]) in found["held_out"]


def test_two_ranks_train_the_heads_of_one(checkpoint, root, tmp_path):
    """Two processes with half the batch each end with the heads of one process with the whole batch."""
    flags = ("--pretrained_weights", checkpoint, "--data_path", root, "--lr", "0.1", "1", "--epochs", "2")
    run_ranks("eval_linear.py", *flags, "--batch_size_per_gpu", 8, "--output_dir", tmp_path / "two")
    probe(*flags, "--batch_size_per_gpu", 16, "--output_dir", tmp_path / "one")
    one, two = (read_checkpoint(tmp_path / n / "checkpoint.pth.tar") for n in ("one", "two"))
    for a, b in zip(one["optimizer"]["heads"], two["optimizer"]["heads"], strict=True):
        assert torch.allclose(a["weight"], b["weight"], atol=1e-5)
    tops = [[row["val_top1"] for row in results(tmp_path / n)["heads"]] for n in ("one", "two")]
    assert tops[0] == pytest.approx(tops[1], abs=3.2)  # one image of 32


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--n_last_blocks", "4"], "n_last_blocks 1"),
        (["--num_labels", "3"], "num_labels 3.*4 classes"),
        (["--lr", "0"], "lr 0"),
        (["--epochs", "0"], "epochs 0"),
        (["--batch_size_per_gpu", "500"], "88 images"),
        (["--evaluate"], "saved head"),
        (["--gamma", "2.0"], "2.0.*1.25"),
    ],
)
def test_bad_input_is_an_error_that_shows_the_value(checkpoint, root, flags, message):
    """Forms that the model lacks, too few outputs, and values out of range are named."""
    with pytest.raises(InputError, match=message):
        probe("--pretrained_weights", checkpoint, "--data_path", root, *flags)


def test_dino_scripts_train_and_validate_one_head(checkpoint):
    """train and validate_network, called as DINO's scripts call them, learn a head with a torch optimiser."""
    model = eval_linear.load_checkpoint_model(checkpoint).model
    head = eval_linear.LinearClassifier(24, num_labels=2)
    optimizer = torch.optim.SGD(head.parameters(), 0.5, momentum=0.9)
    images = torch.cat([torch.randn(16, 3, 32, 32) + shift for shift in (0.0, 2.0)])
    loader = [(images, torch.arange(32) // 16)] * 10
    before = head.linear.weight.clone()
    stats = eval_linear.train(model, head, optimizer, loader, 0, 1, False)
    assert stats["lr"] == 0.5
    assert not torch.equal(before, head.linear.weight)
    validation = eval_linear.validate_network(loader, model, head, 1, False)
    assert set(validation) >= {"loss", "acc1", "acc5"}
    assert validation["acc1"] > 90
