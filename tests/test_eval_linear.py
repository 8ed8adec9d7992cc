"""eval_linear.py from the command line, and under DINO's names."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import eval_linear
from evaluation.linear import Probe
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


def probe_in_two_parts(monkeypatch, epoch, *flags) -> None:
    """The program, killed at the start of an epoch and started again."""
    train_epoch = eval_linear.train_epoch

    def dies(*args):
        if args[-1] == f"epoch {epoch}":
            raise KeyboardInterrupt
        return train_epoch(*args)

    monkeypatch.setattr(eval_linear, "train_epoch", dies)
    with pytest.raises(KeyboardInterrupt):
        probe(*flags)
    monkeypatch.setattr(eval_linear, "train_epoch", train_epoch)
    probe(*flags)


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
    probe_in_two_parts(monkeypatch, 1, *flags, "--output_dir", tmp_path / "cut")
    whole, cut = (read_checkpoint(tmp_path / n / "checkpoint.pth.tar") for n in ("whole", "cut"))
    for a, b in zip(whole["optimizer"]["heads"], cut["optimizer"]["heads"], strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert results(tmp_path / "whole")["heads"] == results(tmp_path / "cut")["heads"]
    assert len((tmp_path / "cut" / "eval_linear_log.txt").read_text().splitlines()) == 3
    with pytest.raises(InputError, match="seed was 0 and is 1"):
        probe(*flags, "--seed", 1, "--output_dir", tmp_path / "cut")


def test_a_saved_head_is_evaluated_with_its_checkpoint_only(checkpoint, root, tmp_path):
    """--evaluate repeats the accuracy of the selected head; another backbone, or a head of other width, is an error."""
    flags = ("--data_path", root, "--output_dir", tmp_path)
    probe("--pretrained_weights", checkpoint, *flags, "--lr", 0.1, 1)
    probe("--pretrained_weights", checkpoint, *flags, "--evaluate")
    saved, selected = results(tmp_path, "eval_linear_saved"), results(tmp_path)["selected"]
    assert saved["val_top1"] == pytest.approx(selected["val_top1"])
    other = tiny_checkpoint(tmp_path / "other.pth", seed=1)
    with pytest.raises(InputError, match="trained on other features: checkpoint_sha256 was"):
        probe("--pretrained_weights", other, *flags, "--evaluate")
    state = {"module.linear.weight": torch.zeros(4, 7), "module.linear.bias": torch.zeros(4)}
    torch.save({"epoch": 1, "state_dict": state, "best_acc": 1.0}, tmp_path / "published.pth.tar")
    with pytest.raises(InputError, match="7 inputs"):
        probe("--pretrained_weights", checkpoint, *flags, "--evaluate", "--linear_weights",
              tmp_path / "published.pth.tar")  # fmt: skip


def test_a_head_is_tried_on_images_without_their_attended_patches(checkpoint, root, tmp_path):
    """Nothing hidden repeats the accuracy, everything hidden gives every image one class; the JSON holds both."""
    flags = ("--pretrained_weights", checkpoint, "--data_path", root, "--output_dir", tmp_path)
    probe(*flags, "--lr", 0.1, 1)
    looker = tiny_checkpoint(tmp_path / "looker.pth", seed=1)
    probe(*flags, "--evaluate", "--mask_ratios", 0, 0.5, 1, "--mask_by", looker)
    found = results(tmp_path, "eval_linear_saved")
    nothing, half, everything = (row["top1"] for row in found["masked"])
    assert nothing == found["val_top1"] == pytest.approx(results(tmp_path)["selected"]["val_top1"])
    assert everything == 25.0  # of four classes of equal size
    assert 0 <= half <= 100


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--evaluate", "--mask_ratios", 0.5], "--mask_by"),
        (["--mask_ratios", 0.5, "--mask_by", "x.pth"], "--evaluate"),
        (["--evaluate", "--mask_ratios", 1.5, "--mask_by", "x.pth"], "1.5"),
        (["--evaluate", "--mask_ratios", 0.5, "--mask_by", "x.pth"], "x.pth"),
    ],
)
def test_bad_masks_are_one_line(checkpoint, root, tmp_path, flags, words):
    """Each error names what is missing or wrong."""
    shutil.copy(_saved_head(checkpoint, tmp_path), tmp_path / "best.pth.tar")
    with pytest.raises(InputError, match=words):
        probe("--pretrained_weights", checkpoint, "--data_path", root, "--output_dir", tmp_path, *flags)


def _saved_head(checkpoint, folder):
    state = {"module.linear.weight": torch.zeros(4, 24), "module.linear.bias": torch.zeros(4)}
    torch.save({"epoch": 1, "state_dict": state}, folder / "head.pth.tar")
    return folder / "head.pth.tar"


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
        (["--n_last_blocks", "4"], "n_last_blocks 4.*SimPool.*leave --n_last_blocks"),
        (["--avgpool_patchtokens", "true"], "avgpool_patchtokens true.*SimPool"),
        (["--n_last_blocks", "0"], "n_last_blocks 0"),
        (["--lr", "nan"], "lr nan"),
        (["--num_heads", "0"], "num_heads 0"),
        (["--img_size", "1000000"], "img_size 1000000"),
        (["--val_fraction", "0.1"], "has val images already"),
        (["--num_labels", "3"], "num_labels 3.*4 classes"),
        (["--lr", "0"], "lr 0"),
        (["--epochs", "0"], "epochs 0"),
        (["--batch_size_per_gpu", "500"], "88 images.*batch_size_per_gpu to at most 88"),
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


def test_rates_follow_the_cosine_of_the_epochs(checkpoint, root, tmp_path, monkeypatch):
    """Every step of epoch e of 3 runs at (1 + cos(pi e / 3)) / 2 of its peak rate."""
    scales, step = [], Probe.step
    monkeypatch.setattr(Probe, "step", lambda self, *args: scales.append(args[-1]) or step(self, *args))
    probe("--pretrained_weights", checkpoint, "--data_path", root, "--lr", 0.1, "--epochs", 3)
    assert scales == pytest.approx([1.0] * 6 + [0.75] * 6 + [0.25] * 6)  # 96 images, batches of 16


def coloured_root(folder, swapped: bool):
    """Two classes told by brightness; with `swapped`, val's folders hold each other's images."""
    noise = np.random.default_rng(0)
    for split, count in (("train", 40), ("val", 10)):
        for c, name in enumerate("ab"):
            shown = 1 - c if swapped and split == "val" else c
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = noise.integers(0, 60, (32, 32, 3), dtype=np.uint8) + 190 * shown
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{i}{'s' * swapped}.png")
    return folder


@pytest.mark.parametrize("select_on", ["train", "val"])
def test_the_head_is_chosen_on_what_was_asked(checkpoint, tmp_path, select_on):
    """With val's labels swapped, held-out train chooses the head that learned, and val the one that did not.

    The heads start from a draw that is wrong about most training images, so right about most of the swapped ones.
    """
    root = coloured_root(tmp_path / "images", swapped=True)
    probe("--pretrained_weights", checkpoint, "--data_path", root, "--lr", 1e-9, 3, "--select_on", select_on,
          "--epochs", 3, "--output_dir", tmp_path / "out", "--seed", 3)  # fmt: skip
    selected = results(tmp_path / "out")["selected"]
    assert selected["lr"] == (3 if select_on == "train" else 1e-9)
    assert (selected["val_top1"] > 50) == (select_on == "val")


def test_a_run_is_resumed_with_its_own_images_and_model_only(checkpoint, tmp_path):
    """A finished run is not reported under another val set, another model setting, or another precision."""
    honest, swapped = (coloured_root(tmp_path / str(s), s) for s in (False, True))
    flags = ("--pretrained_weights", checkpoint, "--lr", 1, "--output_dir", tmp_path / "out")
    probe(*flags, "--data_path", honest)
    before = results(tmp_path / "out")["selected"]["val_top1"]
    with pytest.raises(InputError, match=r"val_data was .* and is "):
        probe(*flags, "--data_path", swapped)
    with pytest.raises(InputError, match="value_min was image and is batch"):
        probe(*flags, "--data_path", honest, "--value_min", "batch")
    with pytest.raises(InputError, match="amp was none and is bf16"):
        probe(*flags, "--data_path", honest, "--amp", "bf16")
    with pytest.raises(InputError, match="value_min was image and is batch"):
        probe(*flags, "--data_path", honest, "--evaluate", "--value_min", "batch")
    probe(*flags, "--data_path", swapped, "--evaluate")  # a head may be tried on other images
    assert results(tmp_path / "out", "eval_linear_saved")["val_top1"] == pytest.approx(100 - before)


def test_an_earlier_heads_order_is_recognised_and_converted(root, tmp_path, capsys):
    """A head that was saved on [CLS] followed by the mean gives the loss of the same head in the published order."""
    official = tiny_checkpoint(tmp_path / "official.pth", mode="official")
    flags = ("--pretrained_weights", official, "--data_path", root, "--n_last_blocks", 1, "--avgpool_patchtokens",
             "true", "--output_dir", tmp_path)  # fmt: skip
    probe(*flags, "--lr", 1, "--epochs", 3)
    content = read_checkpoint(tmp_path / "best.pth.tar")
    weight = content["state_dict"]["module.linear.weight"]
    content["state_dict"]["module.linear.weight"] = torch.cat([weight[:, 0::2], weight[:, 1::2]], dim=1)
    del content["head"]["order"]
    content["config"] = {k: content["config"][k] for k in ("checkpoint_sha256", "checkpoint_key", "forms", "seed")}
    torch.save(content, tmp_path / "earlier.pth.tar")
    probe(*flags, "--evaluate")
    now = results(tmp_path, "eval_linear_saved")
    probe(*flags, "--evaluate", "--linear_weights", tmp_path / "earlier.pth.tar")
    assert results(tmp_path, "eval_linear_saved")["val_loss"] == pytest.approx(now["val_loss"], rel=1e-4)
    said = capsys.readouterr().out
    assert "converted to the published order" in said
    assert "does not record" in said


def test_bad_files_are_skipped_if_asked(checkpoint, small, tmp_path, capsys):
    """With --on_bad_image skip a broken file in train and in val is left out and counted; without, it is an error."""
    root = tmp_path / "images"
    shutil.copytree(small, root)
    for split in ("train", "val"):
        next((root / split).rglob("*.*")).write_bytes(b"no image")
    flags = ("--pretrained_weights", checkpoint, "--data_path", root, "--lr", 0.1, "--output_dir", tmp_path / "out")
    with pytest.raises(InputError, match="leaves no image out"):
        probe(*flags)
    probe(*flags, "--on_bad_image", "skip")
    said = capsys.readouterr().out
    assert "1 of 96 training images left out" in said
    assert "1 of 40 validation images left out" in said
    probe(*flags, "--on_bad_image", "skip", "--logistic")
