"""eval_linear.py --probes: several probes in one pass, from the command line."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import eval_linear
from evaluation.heads import read_head
from evaluation.probe_names import read_probes
from runtime.checkpoint import read_checkpoint
from runtime.guards import InputError
from tests.small_images import small_root, tiny_checkpoint
from tests.test_eval_knn import run_ranks
from tests.test_eval_linear import probe, probe_in_two_parts, results
from vision_transformer import VisionTransformer

PROBES = ("linear", "ep:queries=8", "ep_all:queries=8", "aim:heads=8")
LRS = ("0.1", "1")


@pytest.fixture(scope="module")
def root(cifar10, tmp_path_factory):
    return small_root(cifar10, tmp_path_factory.mktemp("root"))


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("official") / "checkpoint.pth", mode="official")


@pytest.fixture(scope="module")
def ran(official, root, tmp_path_factory):
    """A run of four probes with their maps; its folder."""
    folder = tmp_path_factory.mktemp("ran")
    probe("--pretrained_weights", official, "--data_path", root, "--probes", *PROBES, "--lr", *LRS, "--wd", 0, 0.01,
          "--probe_maps", 2, "--output_dir", folder, "--token_cache", 0)  # fmt: skip
    return folder


def states(folder):
    """Everything that the heads of a finished run consist of."""
    return read_checkpoint(folder / "checkpoint.pth.tar")["optimizer"]["heads"]


def equal(one, other) -> bool:
    """Whether two nested states are equal, bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def test_every_probe_has_a_best_head_in_table_json_and_file(ran):
    """The JSON holds every head and the best of each probe by the held-out score; each best one has a file."""
    found = results(ran)
    assert list(found["probes"]) == list(PROBES)
    assert len(found["heads"]) == len(PROBES) * 4
    for label, best in found["probes"].items():
        mine = [row for row in found["heads"] if row["probe"] == label]
        assert {(row["lr"], row["weight_decay"]) for row in mine} == {(0.1, 0), (0.1, 0.01), (1, 0), (1, 0.01)}
        assert best["probe"] == label
        assert best["selection_top1"] >= max(row["selection_top1"] for row in mine)
        (name,) = read_probes([label])
        assert (ran / f"best_{name.file_name}.pth.tar").is_file()
    assert found["selected"]["selection_top1"] == max(best["selection_top1"] for best in found["probes"].values())
    settings = json.loads((ran / "eval_linear.json").read_text())["settings"]
    assert (settings["probes"], settings["probe_recipe"], settings["wds"]) == (list(PROBES), "dino", [0, 0.01])
    assert {path.name for path in (ran / "probe_maps").iterdir()} == {
        "probes.png", "ep_queries=8.png", "ep_all_queries=8.png", "aim_heads=8.png"
    }  # fmt: skip
    assert (ran / "eval_linear.png").is_file()
    assert len((ran / "eval_linear_log.txt").read_text().splitlines()) == 2


def test_a_probe_alone_is_the_probe_among_others(ran, official, root, tmp_path):
    """One rate of ep and one decay, trained without the other heads on the same images, are the same bit for bit."""
    flags = ("--pretrained_weights", official, "--data_path", root, "--select_on", "val")
    probe(*flags, "--probes", "ep:queries=8", "--lr", 1, "--wd", 0.01, "--output_dir", tmp_path / "alone")
    probe(*flags, "--probes", *PROBES, "--lr", 0.1, 1, "--wd", 0, 0.01, "--output_dir", tmp_path / "many")
    (alone,), many = states(tmp_path / "alone"), states(tmp_path / "many")[1]
    assert equal(alone["heads"][0], many["heads"][3])
    (row,) = results(tmp_path / "alone")["heads"]
    same = next(r for r in results(tmp_path / "many")["heads"] if r["head"] == "ep:queries=8, lr 1, wd 0.01")
    assert {**row, "head": None} == {**same, "head": None}


def test_the_linear_probe_is_that_of_a_run_without_probes(official, root, tmp_path):
    """Its features, heads and accuracies are equal bit for bit, and the other probes change nothing."""
    flags = ("--pretrained_weights", official, "--data_path", root, "--lr", *LRS)
    probe(*flags, "--output_dir", tmp_path / "plain")
    probe(*flags, "--probes", "linear", "ep:queries=8", "--output_dir", tmp_path / "probes")
    assert equal(states(tmp_path / "plain")[0], states(tmp_path / "probes")[0][0])
    plain, with_probes = (results(tmp_path / name)["heads"] for name in ("plain", "probes"))
    for mine, theirs in zip(plain, with_probes[:2], strict=True):
        assert mine["val_top1"] == theirs["val_top1"]
        assert set(mine) == {
            "head", "n_last_blocks", "avgpool_patchtokens", "lr", "train_loss", "val_loss", "selection_top1",
            "val_top1", "val_top5",
        }  # fmt: skip


@pytest.mark.parametrize("recipe", ["ep", "capi"])
def test_interrupted_probes_end_as_if_they_had_not_been(official, root, tmp_path, monkeypatch, recipe):
    """Killed after the first epoch and started again, a run ends with the uninterrupted one's heads, bit for bit."""
    flags = ("--pretrained_weights", official, "--data_path", root, "--probes", "linear", "ep:queries=8", "aim:heads=8",
             "--probe_recipe", recipe, "--lr", 0.01, 0.1, "--epochs", 3)  # fmt: skip
    probe(*flags, "--output_dir", tmp_path / "whole")
    probe_in_two_parts(monkeypatch, 1, *flags, "--output_dir", tmp_path / "cut")
    assert equal(states(tmp_path / "whole"), states(tmp_path / "cut"))
    whole, cut = (results(tmp_path / name) for name in ("whole", "cut"))
    assert (whole["heads"], whole["probes"]) == (cut["heads"], cut["probes"])


def test_without_augmentation_the_model_runs_once_on_every_image(official, root, tmp_path, monkeypatch):
    """Six epochs take one pass over train and one over val; heads learn, and a resumed run goes on bit for bit."""
    flags = ("--pretrained_weights", official, "--data_path", root, "--probes", "linear", "ep:queries=8", "--lr", 1,
             "--augment", "false", "--select_on", "val")  # fmt: skip
    forward, seen = VisionTransformer.prepare_tokens, []
    monkeypatch.setattr(VisionTransformer, "prepare_tokens", lambda self, x: seen.append(len(x)) or forward(self, x))
    probe(*flags, "--epochs", 6, "--val_freq", 3, "--output_dir", tmp_path / "whole")
    assert sum(seen) - 96 - 32 <= 2 * 2  # besides train and val only blank images, which tell the widths
    losses = [row["train_loss"] for row in results(tmp_path / "whole")["heads"]]
    assert max(losses) < np.log(4)
    probe_in_two_parts(monkeypatch, 4, *flags, "--epochs", 6, "--val_freq", 3, "--output_dir", tmp_path / "cut")
    assert equal(states(tmp_path / "whole"), states(tmp_path / "cut"))
    with pytest.raises(InputError, match="crops was central and is bilinear"):
        probe(*flags, "--epochs", 6, "--val_freq", 3, "--augment", "true", "--output_dir", tmp_path / "cut")


def test_a_run_is_resumed_with_its_own_probes_only(official, root, tmp_path):
    """Other probes, another recipe or other decays are refused, and so is a run without probes; each is named."""
    flags = (
        "--pretrained_weights",
        official,
        "--data_path",
        root,
        "--lr",
        0.1,
        "--epochs",
        1,
        "--output_dir",
        tmp_path,
    )
    probe(*flags, "--probes", "linear", "ep:queries=8")
    for changed, message in (
        (("--probes", "linear"), "probes was"),
        (("--probes", "linear", "ep:queries=8", "--probe_recipe", "ep"), "probe_recipe was dino and is ep"),
        (("--probes", "linear", "ep:queries=8", "--wd", 0.1), "wds was"),
        ((), "probes was"),
    ):
        with pytest.raises(InputError, match=message):
            probe(*flags, *changed)


def test_two_ranks_train_the_probes_of_one(official, root, tmp_path):
    """Two processes with half the batch each end with the heads of one process with the whole batch.

    The pooling's gradients are sums of two parts in place of one sum over the batch, and aim's statistics likewise:
    rounding of float32, which ten steps at these rates leave at 1e-5 of the values.
    """
    flags = ("--pretrained_weights", official, "--data_path", root, "--probes", *PROBES, "simpool", "abmilp",
             "--lr", "0.1", "1")  # fmt: skip
    run_ranks("eval_linear.py", *flags, "--epochs", "2", "--batch_size_per_gpu", 8, "--output_dir", tmp_path / "two")
    probe(*flags, "--batch_size_per_gpu", 16, "--output_dir", tmp_path / "one")
    for one, two in zip(states(tmp_path / "one"), states(tmp_path / "two"), strict=True):
        if isinstance(one, list):
            torch.testing.assert_close(one[0]["weight"], two[0]["weight"], rtol=1e-4, atol=1e-5)
            continue
        for a, b in zip(one["heads"], two["heads"], strict=True):
            for name in a:
                torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    tops = [[row["val_top1"] for row in results(tmp_path / name)["heads"]] for name in ("one", "two")]
    assert np.abs(np.subtract(*tops)).max() <= 3.2  # one image of 32


@pytest.mark.parametrize("label", ["ep_all:queries=8", "aim:heads=8"])
def test_a_saved_probe_is_evaluated_with_its_checkpoint_only(ran, official, root, tmp_path, label):
    """--evaluate repeats the accuracy of a probe's best head, also with patches hidden, and draws its maps."""
    (name,) = read_probes([label])
    path = ran / f"best_{name.file_name}.pth.tar"
    flags = ("--data_path", root, "--evaluate", "--linear_weights", path, "--output_dir", tmp_path)
    probe("--pretrained_weights", official, *flags, "--mask_ratios", 0, 1, "--mask_by", official, "--probe_maps", 1)
    found, best = (
        results(tmp_path, "eval_linear_saved"),
        results(ran)["probes"][label.replace("_q", ":q").replace("_h", ":h")],
    )
    nothing, everything = (row["top1"] for row in found["masked"])
    assert nothing == found["val_top1"] == pytest.approx(best["val_top1"])
    assert everything == 25.0  # of four classes of equal size
    assert (tmp_path / "probe_maps" / f"{name.file_name}.png").is_file()
    with pytest.raises(InputError, match="trained on other features: checkpoint_sha256 was"):
        probe("--pretrained_weights", tiny_checkpoint(tmp_path / "other.pth", "official", seed=1), *flags)
    with pytest.raises(InputError, match=r"attentive probe.*best_linear\.pth\.tar"):
        read_head(path)


def test_linear_heads_with_batchnorm_are_read_by_every_evaluator(official, root, tmp_path):
    """Recipe ep's linear head is saved as one layer, whose accuracy is the head's."""
    flags = ("--pretrained_weights", official, "--data_path", root, "--output_dir", tmp_path)
    probe(*flags, "--probe_recipe", "ep", "--lr", 3, 30)
    assert set(read_checkpoint(tmp_path / "best.pth.tar")["state_dict"]) == {
        "module.linear.weight",
        "module.linear.bias",
    }
    probe(*flags, "--evaluate")
    selected = results(tmp_path)["selected"]
    assert selected["probe"] == "linear"
    assert results(tmp_path, "eval_linear_saved")["val_loss"] == pytest.approx(selected["val_loss"], rel=1e-4)


def test_recipes_set_what_the_command_line_does_not(official, root, tmp_path, capsys):
    """Recipe capi trains thirty heads per probe, ep ninety epochs; choosing on val is said to be what it is."""
    flags = ("--pretrained_weights", official, "--data_path", root, "--output_dir")
    probe(*flags, tmp_path / "capi", "--probes", "ep:queries=8", "--probe_recipe", "capi", "--epochs", 1)
    assert len(results(tmp_path / "capi")["heads"]) == 30
    probe(*flags, tmp_path / "val", "--probes", "ep:queries=8", "--probe_recipe", "ep", "--select_on", "val",
          "--epochs", 1, "--lr", 0.1)  # fmt: skip
    assert "chosen on val itself, as published protocols do" in capsys.readouterr().out
    args = eval_linear.get_args_parser().parse_args(["--probe_recipe", "ep"])
    assert eval_linear.read_plan(args).recipe.epochs == args.epochs == 90


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--probes", "epp"], "no probe 'epp'.*did you mean ep"),
        (["--probes", "ep"], "--probes ep: width 24 .*32 queries.*ep:queries=24"),
        (["--probes", "ep_all:queries=8"], r"ep_all:queries=8 pools \[CLS\].*no \[CLS\] token: use ep"),
        (["--probes", "capi"], "capi: width 24 .*heads of 64"),
        (["--probes", "ep:queries=8", "--wd", "nan"], "--wd nan"),
        (["--probes", "ep:queries=8", "--wd", "-1"], "--wd -1"),
        (["--probes", "ep:queries=8", "--token_cache", "-1"], "--token_cache -1"),
        (["--probes", "ep:queries=8", "--batch_size_per_gpu", "1"], "at least 2 images"),
        (["--probes", "ep:queries=8", "--logistic"], "--logistic .* leave --probes out"),
        (["--probes", "ep:queries=8", "--evaluate"], "--evaluate .* leave --probes out"),
        (["--wd", "0.1", "--logistic"], "leave --wd out"),
        (["--augment", "false", "--logistic"], "leave --augment out"),
        (
            ["--probes", "ep:queries=8", "--augment", "false", "--token_cache", "0"],
            "88 training images, .*--token_cache",
        ),
        (["--probe_maps"], "a linear probe has none: give --probes ep"),
        (["--probes", "ep:queries=8", "--probe_maps", "0"], "--probe_maps 0"),
        (["--probes", "ep:queries=8", "--n_last_blocks", "2"], "add linear, or leave"),
        (["--probes", "linear", "ep:queries=8", "--n_last_blocks", "2"], "n_last_blocks 2.*SimPool"),
    ],
)
def test_bad_input_is_an_error_that_shows_the_value(root, tmp_path, flags, message):
    """Probes that there are not, or that the backbone can't serve, are named before any work."""
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint.pth")
    with pytest.raises(InputError, match=message):
        probe("--pretrained_weights", checkpoint, "--data_path", root, *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pth"]
