"""eval_knn.py from the command line, and under DINO's names."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import eval_knn
from evaluation.embedding import read_parts
from evaluation.models import load_checkpoint_model
from runtime.guards import InputError
from tests.patience import PATIENCE_S
from tests.pretraining import VIT, rows, train
from tests.reference import reference_checkpoint_path
from tests.small_images import small_root, tiny_checkpoint

ROOT = Path(eval_knn.__file__).parent


@pytest.fixture(scope="module")
def root(cifar10, tmp_path_factory):
    return small_root(cifar10, tmp_path_factory.mktemp("root"))


@pytest.fixture
def checkpoint(tmp_path):
    return tiny_checkpoint(tmp_path / "run" / "checkpoint.pth")


def evaluate(*flags) -> dict:
    assert eval_knn.main([*map(str, flags), "--num_workers", "0"]) == 0


def run_ranks(program: str, *flags, world: int = 2) -> None:
    """The program in `world` processes that talk over gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, program, *map(str, flags), "--num_workers", "0", "--device", "cpu"],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    for rank in ranks:
        output, _ = rank.communicate(timeout=PATIENCE_S)
        assert rank.returncode == 0, output


def test_a_checkpoint_is_evaluated_from_its_path_and_the_data_alone(checkpoint, root, capsys):
    """Model and sizes come from the checkpoint; the table is printed, and the JSON lies beside the checkpoint."""
    evaluate("--pretrained_weights", checkpoint, "--data_path", root, "--nb_knn", 5, 20, "--low_shot", 1, 5,
             "--low_shot_draw", "random")  # fmt: skip
    result = json.loads((checkpoint.parent / "eval_knn.json").read_text())
    assert [row["k"] for row in result["results"]["knn"]] == [5, 20]
    assert 25 < result["results"]["knn"][0]["top1"] <= 100  # four classes
    assert len(result["model"]["checkpoint_sha256"]) == 64
    assert result["model"]["config"]["mode"] == "simpool"
    assert (result["data"]["train_images"], result["data"]["classes"]) == (96, 4)
    assert result["settings"]["img_size"] == 32
    assert set(result["results"]["low_shot"]) == {"1", "5"}
    said = capsys.readouterr().out
    assert f"{result['results']['knn'][0]['top1']:.2f}" in said


def test_dumped_features_give_the_same_accuracies_and_only_for_their_maker(checkpoint, root, tmp_path):
    """--load_features repeats the numbers without the model, and refuses another checkpoint or other images."""
    flags = ("--data_path", root, "--nb_knn", 10)
    evaluate("--pretrained_weights", checkpoint, *flags, "--dump_features", tmp_path / "f")
    first = json.loads((checkpoint.parent / "eval_knn.json").read_text())["results"]
    evaluate(*flags, "--load_features", tmp_path / "f", "--output_dir", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "eval_knn.json").read_text())["results"] == first
    other = tiny_checkpoint(tmp_path / "other.pth", seed=1)
    with pytest.raises(InputError, match="checkpoint_sha256"):
        evaluate("--pretrained_weights", other, *flags, "--load_features", tmp_path / "f")
    with pytest.raises(InputError, match="train_data"):
        evaluate("--data_path", root, "--subset", 9, "--load_features", tmp_path / "f", "--output_dir", tmp_path)


def test_the_published_checkpoint_is_evaluated(root, tmp_path):
    """A checkpoint of the published code is read, and all of its architecture found that its weights tell."""
    evaluate("--pretrained_weights", reference_checkpoint_path(), "--data_path", root, "--output_dir", tmp_path,
             "--nb_knn", 10, "--num_heads", 3)  # fmt: skip
    model = json.loads((tmp_path / "eval_knn.json").read_text())["model"]["config"]
    assert (model["mode"], model["patch_size"], model["embed_dim"], model["img_size"]) == ("official", 8, 48, 64)


def test_two_ranks_give_the_result_of_one(checkpoint, root, tmp_path):
    """Sharded over two gloo processes, k-NN and low-shot k-NN give the accuracies of one process."""
    flags = ("--pretrained_weights", checkpoint, "--data_path", root, "--nb_knn", 5, 90, "--low_shot", 1, 5,
             "--low_shot_draw", "random")  # fmt: skip
    run_ranks("eval_knn.py", *flags, "--output_dir", tmp_path / "two", "--features_dtype", "fp16")
    evaluate(*flags, "--output_dir", tmp_path / "one", "--features_dtype", "fp16")
    one, two = (json.loads((tmp_path / n / "eval_knn.json").read_text())["results"] for n in ("one", "two"))
    assert one == two


def test_embed_writes_features_of_unlabelled_images(checkpoint, imagenet_sample, tmp_path):
    """--embed needs no labels and gives one named row per image."""
    import numpy as np

    folder = tmp_path / "photos"
    folder.mkdir()
    for image in sorted(imagenet_sample.iterdir())[:5]:
        shutil.copy(image, folder)
    evaluate("--pretrained_weights", checkpoint, "--data_path", folder, "--embed", tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as saved:
        assert saved["features"].shape == (5, 24)
        assert [Path(name).name for name in saved["names"]] == sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mode", "official"], "official.*simpool"),
        (["--patch_size", "16"], "16.*8"),
        (["--nb_knn", "0"], "nb_knn 0"),
        (["--temperature", "0"], "temperature 0"),
        (["--checkpoint_key", "student"], "teacher"),
        (["--low_shot", "30", "--low_shot_draw", "random"], "has 24 training images"),
        (["--load_features", "/nowhere"], "/nowhere"),
        (["--device", "cuda:77"], "cuda"),
    ],
)
def test_bad_input_is_an_error_that_shows_the_value(checkpoint, root, flags, message):
    """Flags that contradict the checkpoint, are out of range, or ask for what is not there, are named."""
    with pytest.raises(InputError, match=message):
        evaluate("--pretrained_weights", checkpoint, "--data_path", root, *flags)


def test_missing_checkpoint_labels_and_folders_are_errors(checkpoint, root, tmp_path, imagenet_sample):
    """A wrong path, images without labels, and an output folder that cannot be made are errors before any work."""
    with pytest.raises(InputError, match="does not exist"):
        evaluate("--pretrained_weights", tmp_path / "no.pth", "--data_path", root, "--output_dir", tmp_path)
    with pytest.raises(InputError, match="val"):
        evaluate("--pretrained_weights", checkpoint, "--data_path", imagenet_sample)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="output_dir"):
        evaluate("--pretrained_weights", checkpoint, "--data_path", root, "--output_dir", tmp_path / "file" / "x")


def test_dino_scripts_find_their_functions(checkpoint, root, tmp_path):
    """A script with DINO's namespace gets normalised features and labels; a loader of indices gives the same rows."""
    args = argparse.Namespace(
        data_path=str(root), pretrained_weights=str(checkpoint), checkpoint_key="teacher", batch_size_per_gpu=16,
        num_workers=0, use_cuda=False, dump_features=None, arch="vit_small", patch_size=8,
    )  # fmt: skip
    train, test, train_labels, test_labels = eval_knn.extract_feature_pipeline(args)
    assert train.shape == (96, 24)
    assert torch.allclose(test.norm(dim=1), torch.ones(32), atol=1e-5)
    assert eval_knn.knn_classifier(train, train_labels, test, test_labels, 10, 0.07)[0] > 25

    def transform(image):
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(*image.size[::-1], 3)
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        return ((pixels / 255 - mean) / std).permute(2, 0, 1)

    data = eval_knn.ReturnIndexDataset(root / "val", transform=transform)
    assert torch.tensor([label for _, label in data.samples]).equal(test_labels)
    model = load_checkpoint_model(checkpoint).model
    loader = torch.utils.data.DataLoader(data, batch_size=8, sampler=[3, 1, 2, 0, *range(4, 32), 0])
    again = torch.nn.functional.normalize(eval_knn.extract_features(model, loader, use_cuda=False), dim=1)
    assert torch.allclose(again, test, atol=1e-5)


def test_stored_features_are_used_only_as_they_were_made(checkpoint, root, tmp_path):
    """Flags of the model, precision or storage that contradict the dump are named, with and without its checkpoint."""
    flags = ("--data_path", root, "--output_dir", tmp_path)
    evaluate("--pretrained_weights", checkpoint, *flags, "--dump_features", tmp_path / "f", "--features_dtype", "fp16")
    load = (*flags, "--load_features", tmp_path / "f")
    for extra, message in (
        (["--value_min", "batch"], "value_min was image and is batch"),
        (["--pretrained_weights", checkpoint, "--value_min", "batch"], "value_min was image and is batch"),
        (["--amp", "bf16"], "amp was none and is bf16"),
        (["--features_dtype", "fp32"], "features_dtype was fp16 and is fp32"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate(*load, *extra)
    evaluate(*load)
    assert json.loads((tmp_path / "eval_knn.json").read_text())["settings"]["features_dtype"] == "fp16"


def test_low_shot_votes_at_every_temperature(checkpoint, root, tmp_path):
    """Each temperature has its row; k = 1 has the same accuracy under all of them."""
    evaluate("--pretrained_weights", checkpoint, "--data_path", root, "--low_shot", 1, 2, "--low_shot_draw", "random",
             "--temperature", 0.07, 1, "--output_dir", tmp_path)  # fmt: skip
    low = json.loads((tmp_path / "eval_knn.json").read_text())["results"]["low_shot"]
    assert low["1"]["temperature"] == 0.07
    assert low["1"]["by_temperature"]["1"]["runs"] == low["1"]["runs"]
    assert set(low["2"]["by_temperature"]) == {"1"}


def test_embed_takes_all_images_of_a_divided_set(checkpoint, root, tmp_path):
    """Train and val images stand in the file, with their names and labels."""
    evaluate("--pretrained_weights", checkpoint, "--data_path", root, "--embed", tmp_path / "all.npz")
    with np.load(tmp_path / "all.npz") as loaded:
        assert len(loaded["features"]) == len(loaded["names"]) == len(loaded["labels"]) == 96 + 32
        assert sum("/val/" in name for name in loaded["names"]) == 32


def test_patches_are_embedded_in_parts_by_any_number_of_ranks(checkpoint, root, tmp_path):
    """A folder of two ranks' parts holds what one file holds: an early block's patches, in half precision."""
    flags = ("--pretrained_weights", checkpoint, "--data_path", root, "--tokens", "patches", "--layer", -2,
             "--features_dtype", "fp16")  # fmt: skip
    evaluate(*flags, "--embed", tmp_path / "all.npz")
    run_ranks("eval_knn.py", *flags, "--embed", tmp_path / "parts", "--part_images", 50)
    parts = list(read_parts(tmp_path / "parts"))
    with np.load(tmp_path / "all.npz") as one:
        assert one["features"].shape == (128, 16, 24)
        assert one["features"].dtype == np.float16
        for column in ("features", "names", "labels"):
            joined = np.concatenate([part[column] for part in parts])
            assert np.array_equal(joined, one[column])
        assert json.loads(str(one["description"]))["layer"] == -2
    assert [len(part["names"]) for part in parts] == [50, 50, 28]


def test_embedded_features_are_drawn(checkpoint, root, tmp_path):
    """--plot writes a picture beside the features."""
    evaluate("--pretrained_weights", checkpoint, "--data_path", root, "--embed", tmp_path / "all.npz", "--plot", "pca")
    assert (tmp_path / "all.pca.png").read_bytes().startswith(b"\x89PNG")


def test_the_grid_is_searched_in_one_pass(checkpoint, root, tmp_path, capsys):
    """--grid gives every k and temperature, each with the figure that it has alone, and the best as chosen on val."""
    flags = ("--pretrained_weights", checkpoint, "--data_path", root, "--output_dir", tmp_path)
    evaluate(*flags, "--nb_knn", 15, "--temperature", 0.2)
    (alone,) = json.loads((tmp_path / "eval_knn.json").read_text())["results"]["knn"]
    evaluate(*flags, "--grid")
    found = json.loads((tmp_path / "eval_knn.json").read_text())["results"]
    assert alone in found["knn"]
    assert {row["k"] for row in found["knn"]} == {5, 10, 15, 20, 50, 96}  # 100 and 200 exceed the 96 training images
    assert found["best_on_val"]["top1"] == max(row["top1"] for row in found["knn"])
    assert "chosen on val itself" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--embed", "{tmp}/file/out.npz"], "--embed"),
        (["--embed", "{tmp}/out.txt"], "must end in .npz"),
        (["--dump_features", "{tmp}/file/features"], "--dump_features"),
        (["--temperature", "nan"], "temperature nan"),
        (["--grid", "--nb_knn", "3"], "leave out --nb_knn"),
        (["--tokens", "patches"], "is a setting of --embed"),
        (["--embed", "{tmp}/a.npz", "--tokens", "patches", "--plot", "pca"], "one point per image"),
        (["--embed", "{tmp}/parts", "--plot", "pca"], "not a folder"),
        (["--embed", "{tmp}/a.npz", "--part_images", "5"], "is one file"),
        (["--embed", "{tmp}/parts", "--part_images", "0"], "at least 1"),
    ],
)
def test_places_and_values_are_tried_before_anything_is_computed(
    checkpoint, root, tmp_path, monkeypatch, flags, message
):
    """What could not be written at the end is an error at the start: not one feature is extracted."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(eval_knn.collected, "load", lambda args: pytest.fail("the model was loaded first"))
    with pytest.raises(InputError, match=message):
        evaluate("--pretrained_weights", checkpoint, "--data_path", root, *(f.format(tmp=tmp_path) for f in flags))


def test_a_set_without_a_split_is_evaluated_on_a_part_of_it(checkpoint, root, tmp_path):
    """--val_fraction holds out a part of each class of plain class folders."""
    evaluate("--pretrained_weights", checkpoint, "--data_path", root / "train", "--val_fraction", 0.25, "--output_dir",
             tmp_path)  # fmt: skip
    data = json.loads((tmp_path / "eval_knn.json").read_text())["data"]
    assert (data["train_images"], data["val_images"]) == (72, 24)


def test_a_model_of_gray_images_is_watched_and_evaluated(small, tmp_path):
    """One channel: k-NN while training, and of the checkpoint, on images normalised as in training."""
    flags = [*VIT, "--data_path", small, "--in_chans", 1, "--epochs", 1, "--nb_knn", 5, "--eval_every", 1]
    assert train(*flags, "--output_dir", tmp_path) == 0
    (row,) = rows(tmp_path)
    evaluate("--pretrained_weights", tmp_path / "checkpoint.pth", "--data_path", small, "--nb_knn", 5)
    found = json.loads((tmp_path / "eval_knn.json").read_text())["results"]["knn"][0]
    assert found["top1"] == row["k-NN"]["5"]["top1"]
