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


@pytest.fixture
def shard(tmp_path, cifar10, monkeypatch):
    """Write a shard of (name, bytes) members, the picture where None is given; returns its path."""
    monkeypatch.setenv("SIMPOOL_CACHE", str(tmp_path / "cache"))
    picture = open_images(cifar10, subset=1).read(0)

    def write(*members, name="x.tar"):
        with tarfile.open(tmp_path / name, "w") as tar:
            for member, data in members:
                add(tar, member, picture if data is None else data)
        return tmp_path / name

    return write


def test_a_damaged_header_in_the_middle_is_an_error_not_the_end(packed):
    """Python's reader stops at a bad header as if the file ended there: the images behind it must not vanish."""
    path = packed / "train-000001.tar"
    (packed / "train.json").unlink()
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        at = tar.getmembers()[40].offset
    data[at : at + 512] = bytes([7]) * 512
    path.write_bytes(data)
    with pytest.raises(InputError, match=rf"damaged at byte {at:,}"):
        open_images(packed)
    source = open_images(packed, check=False)
    assert len(source) == 120 - 50 + 20
    assert "damaged at byte" in source.problems[0]


@pytest.mark.parametrize("cut", [1, 512, 2000, 9000])
def test_a_shard_without_its_closing_zeros_is_cut_off(shard, cut):
    """Even if it ends between two members, so that nothing else shows that something is missing."""
    path = shard(*[(f"{i}.png", None) for i in range(5)])
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1].offset if cut == 9000 else tar.offset + 1024
    path.write_bytes(path.read_bytes()[: end if cut == 9000 else end - cut])
    with pytest.raises(InputError, match=r"cut off|unexpected end|can't be read"):
        open_images(path)


def test_the_number_of_packed_images_is_checked(packed):
    """A shard that holds fewer images than were packed, though it is a whole tar, and a folder that lacks a shard."""
    path = packed / "train-000002.tar"
    with tarfile.open(path) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar.getmembers()[:-2]]
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            add(tar, name, data)
    with pytest.raises(InputError, match=r"train-000002\.tar holds 19 images, but 20 were packed"):
        open_images(packed)
    path.unlink()
    with pytest.raises(InputError, match=r"holds 2 of the 3 shards of train: run tools\.pack_shards again"):
        open_images(packed)
    assert len(open_images(f"{packed}/train-{{000000..000001}}.tar")) == 100  # asked for by name


@pytest.mark.parametrize("content", ["", "[]", "null", '{"images": "5", "images_per_shard": 2}', '{"images": 5}', "\0"])
def test_somebody_elses_json_beside_a_shard_is_not_a_record(shard, tmp_path, content):
    """Only what pack_shards writes counts."""
    path = shard(("1.png", None), name="x-000000.tar")
    (tmp_path / "x.json").write_text(content)
    assert len(open_images(path)) == 1


def test_two_images_under_one_key_are_an_error(shard):
    """Dots in names: a key ends at the first, so these would be one sample."""
    with pytest.raises(InputError, match=r"img\.0001\.png and img\.0002\.png have one key \(img\)"):
        open_images(shard(("img.0001.png", None), ("img.0002.png", None)))


def test_hidden_members_are_no_images(shard):
    """macOS adds a ._name for every file."""
    source = open_images(shard(("a/._1.png", b"mac"), ("a/1.png", None), ("._a/2.png", b"mac"), ("./a/2.png", None)))
    assert [source.name(i).rpartition(":")[2] for i in range(len(source))] == ["a/1.png", "a/2.png"]


def sparse(name, size):
    """A GNU sparse member of `size` bytes, all of them a hole."""
    member = tarfile.TarInfo(name)
    member.type = tarfile.GNUTYPE_SPARSE
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    block[386 : 386 + 24] = b"%011o\0" % 0 + b"%011o\0" % 0
    block[483:495] = b"\x80" + size.to_bytes(11, "big")
    block[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(block))[0]
    return bytes(block)


@pytest.mark.parametrize("name", ["1.png", "1.cls"])
def test_sparse_members_are_refused_before_they_are_expanded(shard, name):
    """A few bytes that stand for a terabyte, as a label or an image."""
    path = shard(("1.jpg", None))
    end = len(path.read_bytes()) // 512 * 512
    with tarfile.open(path) as tar:
        list(tar)
        end = tar.offset
    path.write_bytes(path.read_bytes()[:end].replace(b"1.jpg", b"0.jpg") + sparse(name, 2**40) + bytes(1024))
    with pytest.raises(InputError, match=r"stored sparsely|can't be read as a tar"):
        open_images(path)


def test_a_label_of_a_megabyte_is_refused(shard):
    """A .cls holds one word."""
    with pytest.raises(InputError, match=r"1\.cls has 1,000,000 bytes"):
        open_images(shard(("1.png", None), ("1.cls", b"7" * 10**6)))


def test_an_index_of_another_form_is_made_again(packed):
    """An index that came with the data may hold anything: places outside the shards are not read."""
    import os

    from data.cache import recall, remember

    for path in packed.glob("*.tar"):
        os.utime(path, (1e9, 1e9))
    first = open_images(packed).fingerprint()
    (entry,) = packed.glob(".shards-*")
    good = recall(entry)
    places = good["places"]
    changes = [{"places": value} for value in (places[:5], places.astype(float), places * 0 - 1, places + 2**40)]
    for change in [*changes, {"labels": good["labels"] + 99}, {"ends": good["ends"][::-1]}]:
        remember([packed], entry.name, {**good, **change}, np.zeros((0, 2)), 0)
        assert open_images(packed).fingerprint() == first


def test_packing_never_writes_through_a_link(packed, cifar10, tmp_path):
    """A link under the name of an unfinished shard is removed, and its target stays."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (packed / "train-000001.tar").unlink()
    (packed / "train-000001.tar.partial").symlink_to(victim)
    pack(open_images(cifar10, subset=12), packed, "train", 50)
    assert victim.read_text() == "precious"
    assert len(open_images(packed)) == 120


@pytest.mark.parametrize("label", ["../../evil", "/etc", ".hidden", "a\\b", "a\tb"])
def test_labels_that_are_no_folder_names_are_not_packed(cifar10, tmp_path, label):
    """A list's labels become folders of a tar: they must not lead anywhere else when somebody unpacks it."""
    source = open_images(cifar10, subset=1)
    source.classes[3] = label
    with pytest.raises(InputError, match="can't be a folder in a shard"):
        pack(source, tmp_path / "out", "train", 50)
    assert not (tmp_path / "out").exists()


def test_arrays_of_other_channels_can_be_packed(tmp_path):
    """--in_chans reaches the reader, and the shards hold the same arrays."""
    (tmp_path / "set").mkdir()
    array = np.random.RandomState(0).randint(0, 255, (9, 8, 5)).astype(np.uint8)
    np.save(tmp_path / "set" / "x.npy", array)
    flags = ["--data_path", str(tmp_path / "set"), "--output_dir", str(tmp_path / "out"), "--in_chans", "5"]
    assert pack_main(flags) == 0
    assert np.array_equal(open_images(tmp_path / "out", in_chans=5).load(0), array)
