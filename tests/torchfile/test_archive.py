"""The zip directory of a checkpoint is read strictly."""

from __future__ import annotations

import io
import random
import struct
import zipfile

import pytest
import torch

from torchfile.archive import Archive, Damaged


def saved() -> bytes:
    """What torch.save writes, without a checksum of ours."""
    stream = io.BytesIO()
    torch.save({"w": torch.arange(500.0)}, stream)
    return stream.getvalue()


def contents(data: bytes) -> dict[str, bytes]:
    archive = Archive(io.BytesIO(data))
    return {name: archive.read(entry) for name, entry in archive.entries.items()}


def directory_entry(data: bytes, name: bytes) -> int:
    """Where the record of an entry begins in the central directory."""
    at = data.rfind(name)
    return data.rfind(b"PK\x01\x02", 0, at)


def changed(data: bytes, at: int, layout: str, value: int) -> bytes:
    out = bytearray(data)
    struct.pack_into(layout, out, at, value)
    return bytes(out)


def test_entries_are_those_that_zipfile_reads():
    """Names and bytes agree with the standard library's reader."""
    data = saved()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert contents(data) == {name: archive.read(name) for name in archive.namelist()}


def test_an_archive_without_zip64_and_descriptors_is_read():
    """The plain form of the format, as the standard library writes it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/a", b"12345")
        archive.writestr("archive/b", b"")
    assert contents(stream.getvalue()) == {"archive/a": b"12345", "archive/b": b""}


@pytest.mark.parametrize(
    ("offset", "layout", "value", "message"),
    [
        (38, "<I", 0x10, "marked as a folder"), (10, "<H", 8, "compressed"), (8, "<H", 0x809, "encrypted"),
        (24, "<I", 100, "compressed"), (16, "<I", 1, "disagree"), (42, "<I", 64, r"not where|outside"),
        (42, "<I", 2**31, "outside the file"),
    ],
    ids=["folder", "method", "encrypted", "size", "crc", "offset", "far"],
)  # fmt: skip
def test_a_wrong_directory_is_refused(offset, layout, value, message):
    """Each field of an entry that contradicts the entry itself is named."""
    data = saved()
    at = directory_entry(data, b"archive/data/0")
    with pytest.raises(Damaged, match=message):
        contents(changed(data, at + offset, layout, value))


def test_sizes_must_agree_with_the_record_at_the_entry():
    """A size changed in the directory alone, both of its numbers alike."""
    data = saved()
    at = directory_entry(data, b"archive/data/0")
    smaller = changed(changed(data, at + 20, "<I", 1000), at + 24, "<I", 1000)
    with pytest.raises(Damaged, match="disagree"):
        contents(smaller)


def test_entries_that_share_bytes_are_refused():
    """Many entries over one run of bytes would make a small file a large one."""
    data = saved()
    one, two = (directory_entry(data, name) for name in (b"archive/data/0", b"archive/version"))
    first = struct.unpack_from("<I", data, one + 42)[0]
    with pytest.raises(Damaged):
        contents(changed(data, two + 42, "<I", first))


def test_compressed_archives_are_refused():
    """torch.save never compresses, and a compressed one may hold a thousand times its size."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000_000))
    with pytest.raises(Damaged, match="compressed"):
        contents(stream.getvalue())


def test_every_flipped_bit_is_found_or_harmless():
    """A flip anywhere in a foreign file is refused, or leaves the bytes of every entry under its name."""
    data, rng = saved(), random.Random(0)
    good = contents(data)
    begin = data.find(b"PK\x01\x02")
    for at in [*range(begin, len(data)), *rng.sample(range(begin), 200)]:
        flipped = changed(data, at, "<B", data[at] ^ 1 << rng.randrange(8))
        try:
            found = contents(flipped)
        except Damaged:
            continue
        assert found == good, f"byte {at}"


def test_a_directory_of_too_many_entries_is_refused_before_it_is_read():
    """The count in the end record is bounded: a list of millions of entries would cost gigabytes."""
    data = saved()
    at = data.rfind(b"PK\x06\x06")
    with pytest.raises(Damaged, match="entries"):
        contents(changed(data, at + 32, "<Q", 10**7))
