"""What is kept between starts comes back as it was, or not at all."""

import io
import os
import time
import zipfile

import numpy as np
import pytest

from data.cache import cache_folder, entry_name, recall, remember, stamps_of

ARRAYS = {"names": np.arange(5), "stamps": np.zeros((1, 2), np.int64)}


def keep(folder, stamps=None, taken_ns=None):
    stamps = np.array([[10**18, 5]]) if stamps is None else stamps
    remember([folder], "x.npz", ARRAYS, stamps, time.time_ns() if taken_ns is None else taken_ns)
    return folder / "x.npz"


def test_an_entry_comes_back_as_it_was(tmp_path):
    """The arrays are equal, others may read the file, and nothing else is left in the folder."""
    entry = keep(tmp_path / "new" / "folder")
    arrays = recall(entry)
    assert arrays.keys() == ARRAYS.keys()
    assert all(np.array_equal(arrays[key], ARRAYS[key]) for key in ARRAYS)
    assert os.listdir(entry.parent) == ["x.npz"]
    assert entry.stat().st_mode & 0o044 == 0o044


def test_a_source_that_may_still_change_unseen_is_not_remembered(tmp_path):
    """A folder changed less than 2 s before the scan began may change again under one time stamp: no entry is kept."""
    changed = np.array([[10**18, 5]])
    assert not keep(tmp_path, changed, 10**18 + 1_900_000_000).exists()
    assert keep(tmp_path, changed, 10**18 + 2_100_000_000).exists()


def test_the_next_folder_is_taken_if_the_first_cannot_be_written(tmp_path, capsys):
    """A folder that is a file is passed over; without any the run is told, and goes on."""
    (tmp_path / "file").write_text("")
    remember([tmp_path / "file", tmp_path / "good"], "x.npz", ARRAYS, np.zeros((0, 2)), 0)
    assert recall(tmp_path / "good" / "x.npz") is not None
    remember([tmp_path / "file"], "x.npz", ARRAYS, np.zeros((0, 2)), 0)
    assert "set SIMPOOL_CACHE" in capsys.readouterr().out


def test_an_entry_is_not_written_through_a_link(tmp_path):
    """Somebody's link under the entry's name is replaced; its target stays."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "x.npz").symlink_to(victim)
    assert recall(keep(tmp_path / "cache")) is not None
    assert victim.read_text() == "precious"


def test_stamps_tell_of_a_change_and_of_a_loss(tmp_path):
    """Another modification time or size is another stamp; a missing file has none; no file has no rows."""
    file = tmp_path / "f"
    file.write_text("a")
    before = stamps_of([file])
    os.utime(file, ns=(1, before[0, 0] + 1))
    assert not np.array_equal(stamps_of([file]), before)
    assert stamps_of([file, tmp_path / "gone"]) is None
    assert stamps_of(["a\0b"]) is None
    assert stamps_of([]).shape == (0, 2)


def bomb():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        array = io.BytesIO()
        np.save(array, np.zeros(10**6))
        archive.writestr("names.npy", array.getvalue())
    return buffer.getvalue()


def pickled():
    buffer = io.BytesIO()
    np.savez(buffer, names=np.array([{"a": 1}], dtype=object))
    return buffer.getvalue()


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04" + bytes(100), bomb(), pickled()])
def test_what_is_no_entry_of_ours_counts_as_none(tmp_path, content):
    """Damage, compressed arrays (which may be bombs) and pickles are not read."""
    (tmp_path / "x.npz").write_bytes(content)
    assert recall(tmp_path / "x.npz") is None
    assert recall(tmp_path / "nowhere.npz") is None
    assert recall(tmp_path) is None


def test_the_folder_is_the_users_choice(monkeypatch, tmp_path):
    """$SIMPOOL_CACHE, then $XDG_CACHE_HOME, then the home folder; no home is no error."""
    monkeypatch.setenv("SIMPOOL_CACHE", str(tmp_path / "a"))
    assert cache_folder() == tmp_path / "a"
    monkeypatch.delenv("SIMPOOL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache_folder() == tmp_path / "b" / "simpool-dino"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "simpool-dino"


def test_names_of_entries_differ_by_every_part():
    """("a", "bc") and ("ab", "c") are not confused, and any file name can be described."""
    assert entry_name("a", "bc") != entry_name("ab", "c")
    assert entry_name(os.fsdecode(b"\xff")).endswith(".npz")
