"""The zip archive that torch.save writes: its directory, read strictly, and its entries, checked against their CRC.

torch.load trusts the directory: an entry marked as a folder, or one whose size was changed by a flipped bit, leaves it
with memory that nobody wrote, which it takes for weights. Here everything that the format states twice must agree, no
two entries may share a byte, and nothing may be compressed (torch.save never compresses), so that what is read is
never more than the file holds.

Format: PKWARE's APPNOTE.TXT, sections 4.3 to 4.5.
"""

from __future__ import annotations

import ctypes
import os
import struct
import zlib
from dataclasses import dataclass
from typing import BinaryIO

import torch
from torch import Tensor

MAGIC = b"PK\x03\x04"
END_SIZE = 22  # bytes of the end record without its comment; the last two are the comment's length
_END, _END64, _LOCATOR64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_DIRECTORY_ENTRY, _DESCRIPTOR = b"PK\x01\x02", b"PK\x07\x08"
_ENCRYPTED, _SIZES_FOLLOW = 1, 8  # bits of an entry's flags
_MOST_ENTRIES = 100_000
_BLOCK = 1 << 22


class Damaged(ValueError):
    """The archive contradicts itself. The message says where."""


@dataclass(frozen=True)
class Entry:
    """One file of the archive: where its bytes lie, and their checksum."""

    name: str
    offset: int
    size: int
    crc: int


class Archive:
    """The entries of a zip file by name. Raises Damaged if any of its records contradicts another."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._file_size = file.seek(0, os.SEEK_END)
        start, size, count, end = self._find_directory()
        self.entries: dict[str, Entry] = {}
        spans = []
        for entry, first in self._read_directory(start, size, count):
            entry, after = self._check_local_header(entry, first)
            if entry.name in self.entries:
                raise Damaged(f"two entries are named {entry.name!r}")
            self.entries[entry.name] = entry
            spans.append((first, after, entry.name))
        spans.sort()
        for (_, after, name), (following, _, _) in zip(spans, [*spans[1:], (start, end, "")], strict=True):
            if after > following:
                raise Damaged(f"entry {name!r} reaches into what follows it")

    def read(self, entry: Entry) -> bytes:
        """The entry's bytes, checked."""
        self._file.seek(entry.offset)
        data = self._file.read(entry.size)
        self._check(entry, zlib.crc32(data))
        return data

    def read_tensor(self, entry: Entry) -> Tensor:
        """The entry's bytes as a tensor of uint8 that owns them, checked."""
        tensor = torch.empty(entry.size, dtype=torch.uint8)
        if entry.size:
            self._file.seek(entry.offset)
            memory = memoryview((ctypes.c_ubyte * entry.size).from_address(tensor.data_ptr())).cast("B")
            crc = 0
            for begin in range(0, entry.size, _BLOCK):
                block = memory[begin : begin + _BLOCK]
                if self._file.readinto(block) != len(block):
                    raise Damaged("the file ends too early")
                crc = zlib.crc32(block, crc)
            self._check(entry, crc)
        return tensor

    def check_all(self) -> None:
        """Read every entry once and compare it with its checksum."""
        for entry in self.entries.values():
            self._file.seek(entry.offset)
            crc = 0
            for begin in range(0, entry.size, _BLOCK):
                crc = zlib.crc32(self._file.read(min(_BLOCK, entry.size - begin)), crc)
            self._check(entry, crc)

    def _check(self, entry: Entry, crc: int) -> None:
        if crc != entry.crc:
            raise Damaged(f"the checksum of its entry {entry.name!r} does not match")

    # ---- the directory

    def _bytes(self, offset: int, size: int) -> bytes:
        if not 0 <= offset <= offset + size <= self._file_size:
            raise Damaged("its zip directory points outside the file")
        self._file.seek(offset)
        return self._file.read(size)

    def _find_directory(self) -> tuple[int, int, int, int]:
        """(start, bytes, number of entries, begin of the records behind it) of the central directory."""
        tail_size = min(self._file_size, END_SIZE + 0xFFFF)
        tail = self._bytes(self._file_size - tail_size, tail_size)
        at = len(tail) - END_SIZE
        while at >= 0 and not (
            tail.startswith(_END, at) and int.from_bytes(tail[at + 20 : at + 22], "little") == len(tail) - at - END_SIZE
        ):
            at = tail.rfind(_END, 0, at + 3) if at > 0 else -1
        if at < 0:
            raise Damaged("it has no zip directory at its end")
        end = self._file_size - tail_size + at
        _, disk, _, count, total, size, start, _ = struct.unpack_from("<4s4H2IH", tail, at)
        if disk or count != total:
            raise Damaged("it is a part of a divided zip archive")
        locator = self._bytes(end - 20, 20) if end >= 20 else b""
        if locator.startswith(_LOCATOR64):
            end = struct.unpack("<4sIQI", locator)[2]
            record = self._bytes(end, 56)
            if not record.startswith(_END64):
                raise Damaged("its zip directory is not where the file says")
            count, size, start = struct.unpack_from("<QQQ", record, 32)
        if count > _MOST_ENTRIES or start + size > end or size < 46 * count:
            raise Damaged(f"its zip directory of {count} entries in {size} bytes cannot be right")
        return start, size, count, end

    def _read_directory(self, start: int, size: int, count: int) -> list[tuple[Entry, int]]:
        """Every entry with the offset of its local header; the entry's own offset is filled in later."""
        records, at, found = self._bytes(start, size), 0, []
        for _ in range(count):
            if records[at : at + 4] != _DIRECTORY_ENTRY or at + 46 > size:
                raise Damaged("its zip directory is not one")
            _, _, _, flags, method, _, _, crc, packed, plain, *lengths, disk, _, attributes, first = struct.unpack_from(
                "<4s6H3I5H2I", records, at
            )
            name_size, extra_size, comment_size = lengths
            name = records[at + 46 : at + 46 + name_size]
            extra = records[at + 46 + name_size : at + 46 + name_size + extra_size]
            at += 46 + name_size + extra_size + comment_size
            plain, packed, first = _wide_sizes(extra, plain, packed, first)
            shown = name.decode("utf-8", errors="backslashreplace")
            if flags & _ENCRYPTED or method or packed != plain:
                raise Damaged(f"entry {shown!r} is compressed or encrypted, which torch.save never does")
            if attributes & 0x10 or name.endswith(b"/") or disk:
                raise Damaged(f"entry {shown!r} is marked as a folder, which torch.save never writes")
            found.append((Entry(shown, -1, plain, crc), first))
        if at != size:
            raise Damaged("its zip directory is longer than its entries")
        return found

    def _check_local_header(self, entry: Entry, first: int) -> tuple[Entry, int]:
        """The entry with the place of its bytes, and the offset behind all that belongs to it."""
        header = self._bytes(first, 30)
        magic, _, flags, method, _, _, crc, packed, plain, name_size, extra_size = struct.unpack("<4s5H3I2H", header)
        rest = self._bytes(first + 30, name_size + extra_size)
        name = rest[:name_size].decode("utf-8", errors="backslashreplace")
        if magic != MAGIC or name != entry.name or method or flags & _ENCRYPTED:
            raise Damaged(f"entry {entry.name!r} is not where the zip directory says")
        offset = first + 30 + name_size + extra_size
        after = offset + entry.size
        if after > self._file_size:
            raise Damaged(f"entry {entry.name!r} is larger than the file")
        if flags & _SIZES_FOLLOW:
            record = self._bytes(after, min(24, self._file_size - after))
            plain, packed, crc, length = _descriptor(record, entry)
            after += length
        else:
            plain, packed, _ = _wide_sizes(rest[name_size:], plain, packed, 0)
        if (plain, packed, crc) != (entry.size, entry.size, entry.crc):
            raise Damaged(f"the two records of entry {entry.name!r} disagree about its size or checksum")
        return Entry(entry.name, offset, entry.size, entry.crc), after


def _wide_sizes(extra: bytes, plain: int, packed: int, first: int) -> tuple[int, int, int]:
    """The three numbers, those that read 0xFFFFFFFF taken from the zip64 record among the extra fields."""
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            wide = iter(struct.iter_unpack("<Q", extra[at + 4 : at + 4 + size // 8 * 8]))
            numbers = (plain, packed, first)
            plain, packed, first = (next(wide, (n,))[0] if n == 0xFFFFFFFF else n for n in numbers)
        at += 4 + size
    return plain, packed, first


def _descriptor(record: bytes, entry: Entry) -> tuple[int, int, int, int]:
    """(size, stored size, CRC, bytes) of the record behind an entry whose sizes were not known before it."""
    for layout in ("<4sIII", "<4sIQQ"):  # the wide form belongs to zip64
        if len(record) >= struct.calcsize(layout):
            magic, crc, packed, plain = struct.unpack_from(layout, record)
            if magic == _DESCRIPTOR and (plain, packed) == (entry.size, entry.size):
                return plain, packed, crc, struct.calcsize(layout)
    raise Damaged(f"the two records of entry {entry.name!r} disagree about its size or checksum")
