"""Tar shards: the same images as the files they were packed from, at random access."""

import io
import pickle
import tarfile

import numpy as np
import pytest

from data.datasets import check_same_classes, open_images
from data.shards import open_shards
from runtime.guards import InputError
from tools.pack_shards import main as pack_main
from tools.pack_shards import pack


@pytest.fixture
def packed(cifar10, tmp_path, monkeypatch):
    """A folder with train and val shards of the first images of each class."""
    monkeypatch.setenv("SIMPOOL_CACHE", str(tmp_path / "cache"))
    for split, count in (("train", "12"), ("val", "3")):
        flags = ["--data_path", str(cifar10), "--split", split, "--subset", count, "--images_per_shard", "50"]
        assert pack_main([*flags, "--output_dir", str(tmp_path / "shards")]) == 0
    return tmp_path / "shards"


def add(tar, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def test_shards_stand_for_the_same_images_under_the_same_indices(packed, cifar10):
    """Pixels, labels, classes and order of packed shards equal the folder's, train and val."""
    for split, count in (("train", 12), ("val", 3)):
        shards, folder = open_images(packed, split), open_images(cifar10, split, subset=count)
        assert len(shards) == len(folder)
        assert shards.classes == folder.classes
        assert np.array_equal(shards.labels, folder.labels)
        for i in range(0, len(shards), 17):
            assert np.array_equal(shards.load(i), folder.load(i))
    check_same_classes(open_images(packed), open_images(packed, "val"))


def test_index_is_kept_and_made_again_when_a_shard_changes(packed):
    """The second opening reads no tar; a rewritten shard makes a new index."""
    import os

    for shard in packed.glob("*.tar"):
        os.utime(shard, (1e9, 1e9))
    first = open_images(packed)
    (index,) = [f for f in packed.iterdir() if f.name.startswith(".shards-")]
    stamp = index.stat().st_mtime_ns
    assert open_images(packed).fingerprint() == first.fingerprint()
    assert index.stat().st_mtime_ns == stamp
    shard = packed / "train-000000.tar"
    (packed / "train.json").unlink()  # which says how many images the shard holds
    with tarfile.open(shard, "a") as tar:
        add(tar, "airplane/extra.png", first.read(0))
        add(tar, "airplane/extra.cls", b"0")
    os.utime(shard, (1.1e9, 1.1e9))
    assert len(open_images(packed)) == len(first) + 1


def test_range_pattern_and_single_shard(packed):
    """x-{000000..000002}.tar names several shards, x-000001.tar one."""
    assert len(open_images(f"{packed}/train-{{000000..000002}}.tar")) == 120
    assert len(open_images(packed / "train-000001.tar")) == 50


def test_labels_from_the_folder_part_from_cls_or_none(tmp_path, cifar10):
    """Without .cls the folders are the classes; without either there are no labels; half-labelled is refused."""
    source = open_images(cifar10, subset=1)

    def shard(name, members):
        with tarfile.open(tmp_path / name, "w") as tar:
            for member, data in members:
                add(tar, member, data)
        return open_shards([tmp_path / name])

    image = source.read(0)
    folders = shard("a.tar", [("./cow/1.jpg", image), ("./ant/2.seg.jpg", image)])
    assert folders.classes == ["ant", "cow"]
    assert folders.labels.tolist() == [1, 0]
    numbers = shard(
        "b.tar", [("1.jpg", image), ("1.cls", b"7\n"), ("2.cls", b"2"), ("2.jpg", image), ("2.json", b"{}")]
    )
    assert numbers.labels.tolist() == [7, 2]
    assert shard("c.tar", [("1.jpg", image), ("2.jpg", image)]).labels is None
    with pytest.raises(InputError, match="label all or none"):
        shard("d.tar", [("1.jpg", image), ("1.cls", b"7"), ("2.jpg", image)])
    with pytest.raises(InputError, match="hold no image"):
        shard("e.tar", [("1.txt", b"words")])


def test_packing_goes_on_where_it_stopped(packed, cifar10):
    """A second run writes only the missing shard, and it is the same as before, byte for byte."""
    kept, lost = packed / "train-000000.tar", packed / "train-000001.tar"
    before, stamp = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    (packed / "train-000001.tar.partial").write_bytes(b"half a shard")
    pack(open_images(cifar10, subset=12), packed, "train", 50)
    assert lost.read_bytes() == before
    assert kept.stat().st_mtime_ns == stamp


def test_packing_another_set_into_the_same_shards_is_refused(packed, cifar10):
    """Shards of two data sets never mix."""
    with pytest.raises(InputError, match="another job"):
        pack(open_images(cifar10, subset=11), packed, "train", 50)


def test_a_source_survives_pickling_and_many_shards(packed, monkeypatch):
    """A spawned worker's copy reads the same bytes; few file handles suffice for many shards."""
    from data import shards as module

    monkeypatch.setattr(module, "_OPEN_SHARDS", 1)
    source = open_images(packed)
    data = [source.read(i) for i in (0, 60, 119, 0)]
    copy = pickle.loads(pickle.dumps(source))
    assert [copy.read(i) for i in (0, 60, 119, 0)] == data
    assert len(source._handles) == 1


def test_compressed_and_damaged_shards_are_input_errors(tmp_path):
    """A compressed tar can't be read at random, a damaged one not at all; both say what to do."""
    (tmp_path / "x.tar.gz").write_bytes(b"")
    with pytest.raises(InputError, match=r"unpack it to a plain \.tar"):
        open_images(tmp_path / "x.tar.gz")
    (tmp_path / "x.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(InputError, match="can't be read as a tar"):
        open_images(tmp_path / "x.tar")
