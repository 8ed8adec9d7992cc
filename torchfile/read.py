"""A file of torch.save as plain data: whole, undamaged, and without running anything in it.

Both of torch's formats are read: the zip archive, and the older row of pickles (torch < 1.6). A file of ours carries
the SHA-256 of its bytes in the comment of its archive, which torch.load of any version overlooks; there a flipped bit
anywhere is found. Foreign archives are checked by the CRC of each entry. The older format has no checksum.

torch.load(weights_only=True) is not used because it bounds nothing: a kilobyte can make it allocate gigabytes, and a
flipped bit in the archive's directory gives it memory that nobody wrote.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from torchfile.archive import MAGIC, Archive, Damaged
from torchfile.plain_pickle import MOST_BYTES, Reader, UnsafeContent

COMMENT = b"simpool-dino sha256:"
COMMENT_SIZE = len(COMMENT) + 64
_SPARE = 64 << 20  # bytes that tensors may stand for beyond the file's size (small views of one number)
_OLD_MAGIC = 0x1950A86A20F9469CFC6C
_KINDS = (  # how other files begin, and what they are
    (b"version https://git-lfs", "a git-lfs pointer and not the file it stands for; fetch that with `git lfs pull`"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"BZh", "a bzip2 archive; unpack it first"),
    (b"\xfd7zXZ", "an xz archive; unpack it first"),
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"\x93NUMPY", "a numpy array"),
    (b"\x89HDF", "an HDF5 file"),
    (b"%PDF", "a PDF document"),
)


def read(path: str | Path) -> Any:
    """The file's content on the CPU: tensors, numbers, texts, None, lists, tuples and dictionaries.

    Parsed arguments (argparse.Namespace) become dictionaries, numpy numbers Python's, paths texts. Memory stays below
    three times the file's size, time is linear in it.

    Raises ValueError if the file is damaged, is no file of torch's, or holds code or objects (the message names them);
    OSError if it cannot be opened.
    """
    path = Path(path)
    with _opened(path) as (file, start):
        _check_seal(file, path)
        try:
            content = _read_archive(file) if start.startswith(MAGIC) else _read_old_format(file, path)
        except UnsafeContent as error:
            raise ValueError(
                f"{path} holds {error}, which is code or an object and not weights; refused without running any of "
                "it. If you trust its source, load it there and save only its state dict"
            ) from error
        except Damaged as error:
            raise ValueError(f"{path} is damaged or cut short: {error}") from error
        except (MemoryError, RuntimeError) as error:
            raise ValueError(f"{path} does not fit into memory ({error})") from error
        except ValueError as error:
            if str(error).startswith(str(path)):
                raise
            raise ValueError(f"{path} is not a checkpoint that can be read: {error}") from error
    return content


def verify(path: str | Path) -> None:
    """Check that a file's bytes are what was written, by its own SHA-256 or by the CRC of each entry.

    Raises ValueError naming the damage, OSError if the file cannot be opened.
    """
    path = Path(path)
    with _opened(path) as (file, start):
        if not _check_seal(file, path) and start.startswith(MAGIC):
            try:
                Archive(file).check_all()
            except Damaged as error:
                raise ValueError(f"{path} is damaged or cut short: {error}") from error


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, bytes]]:
    """The file and its first bytes. Raises what `read` does, if it is missing, a folder, a pipe, or empty."""
    if path.is_dir():
        raise ValueError(f"checkpoint {path} is a folder; name the file, usually {path / 'checkpoint.pth'}")
    try:
        status = path.stat()
    except FileNotFoundError:
        raise FileNotFoundError(f"checkpoint {path} does not exist; check the path") from None
    except ValueError as error:  # a zero byte in the name
        raise ValueError(f"checkpoint {str(path)!r} cannot be a path ({error})") from None
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its writer
        raise ValueError(f"checkpoint {path} is a pipe or a device and not a file; copy its content to one")
    with open(path, "rb") as file:
        start = file.read(512)
        if not start:
            raise ValueError(f"{path} is empty; it was cut off while being written or copied")
        yield file, start


def _check_seal(file: BinaryIO, path: Path) -> bool:
    """Whether the file carries its own digest; ValueError if its bytes are others than those digested."""
    size = file.seek(0, os.SEEK_END)
    if size <= COMMENT_SIZE:
        return False
    file.seek(-COMMENT_SIZE, os.SEEK_END)
    comment = file.read(COMMENT_SIZE)
    if not comment.startswith(COMMENT):
        return False
    left = size - COMMENT_SIZE
    file.seek(0)
    digest = hashlib.sha256()
    while left > 0 and (block := file.read(min(left, 1 << 22))):
        digest.update(block)
        left -= len(block)
    if digest.hexdigest().encode() != comment[len(COMMENT) :]:
        raise ValueError(f"{path} is damaged: its bytes do not match the checksum written with them")
    return True


# ---- the two formats


def _read_archive(file: BinaryIO) -> Any:
    archive = Archive(file)
    pickles = [name for name in archive.entries if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError("it is a zip archive that torch.save did not write")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}constants.pkl" in archive.entries:
        raise ValueError("it is a TorchScript program; load it with torch.jit.load and save its state_dict")
    order = archive.entries.get(f"{folder}byteorder")
    if order is not None and order.size == 3 and archive.read(order) == b"big":
        raise ValueError("it was written on a big-endian machine; convert it there")
    storages: dict[str, Tensor] = {}

    def storage(key: str, dtype: torch.dtype, count: int) -> Tensor:
        if key not in storages:
            entry = archive.entries.get(f"{folder}data/{key}")
            if entry is None:
                raise Damaged(f"it lacks the entry data/{key[:80]}")
            storages[key] = archive.read_tensor(entry)
        stored = storages[key]
        if count * dtype.itemsize != stored.numel():
            raise Damaged(f"entry data/{key[:80]} has {stored.numel()} bytes for {count} numbers of {dtype}")
        return stored.view(dtype)

    entry = archive.entries[pickles[0]]
    if entry.size > MOST_BYTES:
        raise ValueError(f"its structure takes {entry.size} bytes, without its tensors; more than {MOST_BYTES} is odd")
    size = file.seek(0, os.SEEK_END)
    return Reader(storage, size + _SPARE).read(io.BytesIO(archive.read(entry)))


def _read_old_format(file: BinaryIO, path: Path) -> Any:
    """Pickles of a magic number, a version, the machine, the content and the storages' keys; then the storages."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = io.BytesIO(file.read(MOST_BYTES))
    left = size
    storages: dict[str, Tensor] = {}

    def storage(key: str, dtype: torch.dtype, count: int) -> Tensor:
        nonlocal left
        if key not in storages:
            left -= count * dtype.itemsize
            if left < 0:
                raise Damaged("it ends before its tensors do")
            storages[key] = torch.empty(count * dtype.itemsize, dtype=torch.uint8)
        if count * dtype.itemsize != storages[key].numel():
            raise Damaged("its tensors disagree about the numbers stored for them")
        return storages[key].view(dtype)

    reader = Reader(storage, size + _SPARE)
    try:
        first = reader.read(head)
    except UnsafeContent:
        raise
    except ValueError as error:
        raise ValueError(_what_it_is(path, head.getvalue()[:512])) from error
    if first != _OLD_MAGIC or reader.read(head) != 1001:
        raise ValueError(f"it is a pickle of a {type(first).__name__} that torch.save did not write")
    machine = reader.read(head)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise ValueError("it was written on a big-endian machine; convert it there")
    content = reader.read(head)
    keys = reader.read(head)
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(storages):
        raise Damaged("its list of tensors is not that of its content")
    file.seek(head.tell())
    for key in keys:
        _fill(storages[str(key)], file)
    return content


def _fill(storage: Tensor, file: BinaryIO) -> None:
    count = int.from_bytes(file.read(8), "little")
    size = storage.numel()
    if count == 0 or size % count or size // count not in (1, 2, 4, 8, 16):
        if size or count:
            raise Damaged("its tensors are not where the file says")
        return
    memory = memoryview((ctypes.c_ubyte * size).from_address(storage.data_ptr())).cast("B")
    if file.readinto(memory) != size:
        raise Damaged("it ends before its tensors do")


def _what_it_is(path: Path, start: bytes) -> str:
    """A line on a file that is no checkpoint: what its first bytes say."""
    text = start.lstrip().lower()
    for begin, kind in _KINDS:
        if start.startswith(begin):
            return f"{path} is {kind}"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return f"{path} is a web page, saved in place of the file; download it again from the link of the raw file"
    if start[257:262] == b"ustar":
        return f"{path} is a tar archive; unpack it first"
    if start[8:10] == b'{"':
        return f"{path} is a safetensors file; load it with safetensors and save its state dict with torch.save"
    if not start.strip(b"\0"):
        return f"{path} begins with zeros; it was damaged or cut off while being written or copied"
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in start):
        return f"{path} is a text file and not a checkpoint; it begins with {start[:40].decode()!r}"
    return f"{path} is not a checkpoint; torch.save did not write it, or it is damaged"
