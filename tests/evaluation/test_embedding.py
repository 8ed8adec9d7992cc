"""Features of every image as files: rows, names and labels belong together, in one file and in parts."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from data.datasets import open_images
from evaluation import embedding, features
from runtime.guards import InputError
from tests.evaluation.test_features import SETTINGS, Pixels
from tests.small_images import small_root

PARTS = {"dtype": torch.float32, "on_bad_image": "raise", **SETTINGS}


@pytest.fixture(scope="module")
def root(cifar10, tmp_path_factory):
    return small_root(cifar10, tmp_path_factory.mktemp("root"))


@pytest.fixture(scope="module")
def source(root):
    return open_images(root, "val")


def write(folder, source, part_images=10, **description):
    model = Pixels()
    shape = embedding.shape_of(model, model, 3, {**PARTS, "device": torch.device("cpu")})
    return embedding.write_parts(folder, model, model, source, shape, description, PARTS, part_images)


def test_embeddings_carry_names_with_and_without_labels(root, tmp_path):
    """npz and npy + csv hold the same rows, with the file of each, for labelled and unlabelled images."""
    source = open_images(root, "val")
    array, _ = features.extract(Pixels(), source, **SETTINGS)
    embedding.write_file(tmp_path / "a.npz", array, source, {"checkpoint": "x"})
    files = embedding.write_file(tmp_path / "b.npy", array, source, {"checkpoint": "x"})
    with np.load(tmp_path / "a.npz") as loaded:
        assert np.array_equal(loaded["features"], np.load(tmp_path / "b.npy"))
        assert loaded["names"].tolist() == [source.name(i) for i in range(len(source))]
        assert np.array_equal(loaded["labels"], source.labels)
        assert json.loads(str(loaded["description"])) == {"checkpoint": "x"}
    rows = (tmp_path / "b.csv").read_text().splitlines()
    assert rows[0] == "index,name,label,class"
    assert len(rows) == len(source) + 1
    assert [f.suffix for f in files] == [".npy", ".csv", ".json"]
    with pytest.raises(InputError, match=r"\.npz"):
        embedding.write_file(tmp_path / "c.txt", array, source, {})


def test_parts_hold_together_what_one_file_holds(source, tmp_path):
    """Parts, one after the other, have the features, names and labels of all images in order; the index lists them."""
    array, _ = features.extract(Pixels(), source, **SETTINGS)
    index = json.loads(write(tmp_path / "parts", source).read_text())
    parts = list(embedding.read_parts(tmp_path / "parts"))
    assert [len(part["names"]) for part in parts] == [10, 10, 10, 2]
    assert np.array_equal(np.concatenate([part["features"] for part in parts]), array.numpy())
    assert np.concatenate([part["names"] for part in parts]).tolist() == [source.name(i) for i in range(len(source))]
    assert np.array_equal(np.concatenate([part["labels"] for part in parts]), source.labels)
    assert (index["images"], index["shape"], index["dtype"]) == (len(source), list(array.shape[1:]), "float32")


def test_an_interrupted_folder_is_continued(source, tmp_path, monkeypatch):
    """Parts that are there are not made again, the others are; until all are there, the folder is not complete."""
    write(tmp_path, source)
    (tmp_path / "index.json").unlink()
    (tmp_path / "part-00001.npz").unlink()
    with pytest.raises(InputError, match=r"no index\.json"):
        list(embedding.read_parts(tmp_path))
    made, extract = [], features.extract_shard

    def counted(*args, **settings):
        made.append(settings["indices"].tolist())
        return extract(*args, **settings)

    monkeypatch.setattr(features, "extract_shard", counted)
    write(tmp_path, source)
    assert made == [list(range(10, 20))]
    assert sum(len(part["names"]) for part in embedding.read_parts(tmp_path)) == len(source)


def test_parts_made_otherwise_are_not_mixed(source, tmp_path):
    """A folder whose features another model, or other settings, made is refused by what differs."""
    write(tmp_path, source, checkpoint="a")
    with pytest.raises(InputError, match="checkpoint was a and is b here"):
        write(tmp_path, source, checkpoint="b")
    with pytest.raises(InputError, match="images_per_part was 10 and is 16 here"):
        write(tmp_path, source, part_images=16, checkpoint="a")
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(InputError, match="can't be read"):
        write(tmp_path, source, checkpoint="a")


def test_the_size_of_a_part_follows_from_its_bytes(source, tmp_path, monkeypatch):
    """Without a number of images, a part holds as many as fit in PART_BYTES, and at least one."""
    one = int(np.prod(features.extract(Pixels(), source, **SETTINGS)[0].shape[1:])) * 4
    monkeypatch.setattr(embedding, "PART_BYTES", 7 * one + 1)
    write(tmp_path / "seven", source, part_images=None)
    assert [len(part["names"]) for part in embedding.read_parts(tmp_path / "seven")] == [7, 7, 7, 7, 4]
    monkeypatch.setattr(embedding, "PART_BYTES", one // 2)
    assert json.loads(write(tmp_path / "one", source, part_images=None).read_text())["images_per_part"] == 1


def test_a_folder_with_other_files_is_not_written_to(tmp_path):
    """--embed never mixes its parts with somebody's files."""
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(InputError, match="folder with other files"):
        embedding.check_path(tmp_path)
    embedding.check_path(tmp_path / "new")
