"""Checkpoints as bytes: written so that they cannot tear, read so that they cannot lie or run code.

Writing: temporary file, fsync, replace, fsync of the folder. A file we write carries the SHA-256 of its bytes in the
comment of its zip archive, where `torch.load` of any version overlooks it; reading checks it, so that a flipped bit
anywhere is found. Foreign files have no such comment: there the CRC of every zip entry is checked, which `torch.load`
itself does not do.

Reading never runs code: tensors, numbers, strings and containers only, plus the harmless types that the published
checkpoints hold (argparse.Namespace and numpy scalars). Anything else is refused by name.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pathlib
import pickletools
import re
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from runtime.distributed import is_main_process
from runtime.guards import InputError

TEMP_PREFIX = ".tmp-"
_END_OF_ARCHIVE = 22  # bytes of a zip's end record without its comment; the last two are the comment's length
_COMMENT = b"simpool-dino sha256:"
_COMMENT_SIZE = len(_COMMENT) + 64


# ------------------------------------------------------------------------------------------------ writing


def write_atomic(path: str | Path, write: Callable[[Path], None]) -> None:
    """Let `write(temporary)` fill a file beside `path`, then make it appear under `path`, complete and durable."""
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f"{TEMP_PREFIX}{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def _umask() -> int:
    """The process's umask, read where that needs no change of it (another thread may be creating files)."""
    try:
        match = re.search(r"^Umask:\s*(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return int(match.group(1), 8) if match else 0o022


def fsync_folder(folder: Path) -> None:
    """Make a rename, link or unlink inside `folder` durable (where the system lets a folder be opened)."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_bytes(path: Path, data: bytes) -> None:
    """Add `data` to the end of a file, durably, as a whole or not at all: what a failing disk took is taken back."""
    new = not path.exists()
    with open(path, "ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            if file.write(data) != len(data):
                raise OSError(f"the disk took only a part of {len(data)} bytes")
            os.fsync(file.fileno())
        except OSError:
            os.ftruncate(file.fileno(), size)
            raise
    if new:
        fsync_folder(path.parent)


def check_writable(folder: Path, flag: str) -> None:
    """Make `folder` and write a file in it. Raises InputError naming `flag` where that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=TEMP_PREFIX, dir=folder) as probe:
            probe.write(b"x")
    except OSError as error:
        raise InputError(f"{flag} {folder} cannot be written ({error}); choose another one") from error


def write_text_atomic(path: str | Path, text: str) -> None:
    """Replace a text file as a whole."""
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8") and None)


def write_json_atomic(path: str | Path, value: Any) -> None:
    """Replace a JSON file as a whole; NaN and infinities become null, so that any reader can parse it."""
    write_text_atomic(path, json.dumps(finite_json(value), indent=2) + "\n")


def finite_json(value: Any) -> Any:
    """The value with what strict JSON cannot hold replaced: non-finite numbers by None, tuples
    by lists, paths by strings.
    """
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, dict):
        return {str(key): finite_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_json(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value


def save_checkpoint(content: dict[str, Any], path: str | Path) -> None:
    """Write a checkpoint so that it is either complete under its name or not there, with its own checksum inside."""

    def write(temporary: Path) -> None:
        torch.save(content, temporary)
        with open(temporary, "r+b") as file:
            _seal(file)

    write_atomic(path, write)


def save_on_master(content: dict[str, Any], path: str | Path) -> None:
    """`save_checkpoint` on rank 0, nothing elsewhere (DINO's name)."""
    if is_main_process():
        save_checkpoint(content, path)


def _seal(file: BinaryIO) -> None:
    """Write the digest of all other bytes into the comment of a zip archive that has none yet."""
    file.seek(-_END_OF_ARCHIVE, os.SEEK_END)
    end = file.read(_END_OF_ARCHIVE)
    if not (end.startswith(b"PK\x05\x06") and end.endswith(b"\0\0")):
        raise RuntimeError("torch.save wrote a file that does not end in a plain zip record; cannot add its checksum")
    file.seek(-2, os.SEEK_END)
    file.write(struct.pack("<H", _COMMENT_SIZE))
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    file.seek(0, os.SEEK_END)
    file.write(_COMMENT + digest.encode())


def sweep_temporaries(folder: Path) -> list[str]:
    """Remove what a killed writer left in `folder`; returns the names."""
    orphans = sorted(folder.glob(f"{TEMP_PREFIX}*"))
    for orphan in orphans:
        orphan.unlink(missing_ok=True)
    return [orphan.name for orphan in orphans]


# ------------------------------------------------------------------------------------------------ reading


def verify(path: str | Path) -> None:
    """Check that a file's bytes are what was written. Raises InputError naming the damage.

    Our files are checked against their own SHA-256; other zip files against the CRC of each entry; files of the
    format before zip (torch < 1.6) carry no checksum, and only loading can tell.
    """
    path = Path(path)
    with open(path, "rb") as file:
        start = file.read(4)
        size = file.seek(0, os.SEEK_END)
        if size == 0:
            raise InputError(f"{path} is empty; it was cut off while being written or copied")
        if size > _COMMENT_SIZE:
            file.seek(-_COMMENT_SIZE, os.SEEK_END)
            comment = file.read(_COMMENT_SIZE)
            if comment.startswith(_COMMENT):
                _verify_digest(file, size - _COMMENT_SIZE, comment[len(_COMMENT) :].decode(errors="replace"), path)
                return
    if start != b"PK\x03\x04":
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} is damaged or cut short ({error})") from error
    if damaged is not None:
        raise InputError(f"{path} is damaged: the checksum of its entry {damaged!r} does not match")


def _verify_digest(file: BinaryIO, length: int, expected: str, path: Path) -> None:
    file.seek(0)
    digest = hashlib.sha256()
    while length > 0:
        block = file.read(min(length, 1 << 22))
        if not block:
            break
        digest.update(block)
        length -= len(block)
    if digest.hexdigest() != expected:
        raise InputError(f"{path} is damaged: its bytes do not match the checksum written with them")


def file_sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Verify and read a checkpoint onto the CPU, as plain data (see `plain`), running none of its content.

    Raises InputError where the file is missing, damaged, not a checkpoint, or holds anything but tensors, numbers,
    strings, containers and the harmless types of the published files.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"checkpoint {path} does not exist; check the path")
    if path.is_dir():
        raise InputError(f"checkpoint {path} is a folder; name the file, usually {path / 'checkpoint.pth'}")
    verify(path)
    try:
        with torch.serialization.safe_globals(_harmless_types()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remark on files of other pickle protocols
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file of unknown origin may fail in any way inside torch's reader
        raise InputError(_refusal(path, error)) from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a dictionary of weights")
    return plain(content)


def _refusal(path: Path, error: Exception) -> str:
    """One line that says why a file was not read, naming the code it holds if it holds any."""
    unsafe = sorted(set(globals_named_in(path)) - _harmless_names())
    if unsafe:
        return (
            f"{path} holds {', '.join(unsafe)}, which is code or an object and not weights; refused without running "
            "any of it. If you trust its source, load it there and save only its state dict"
        )
    reason = str(error).strip().splitlines()
    return f"{path} is not a checkpoint that can be read safely ({type(error).__name__}: {reason[0] if reason else ''})"


def globals_named_in(path: Path) -> list[str]:
    """The importable names that a pickle asks for, found by reading its opcodes, never by running them."""
    try:
        with zipfile.ZipFile(path) as archive:
            streams = [archive.read(name) for name in archive.namelist() if name.endswith(".pkl")]
    except zipfile.BadZipFile:
        streams = [path.read_bytes()]
    return [name for stream in streams for name in _globals_of_stream(stream)]


def _globals_of_stream(stream: bytes) -> list[str]:
    names: list[str] = []
    strings: list[str] = []  # a STACK_GLOBAL takes the last two, pushed or fetched from the memo
    memo: dict[int, str] = {}
    position = 0
    try:
        while position < len(stream):  # torch's old format writes several pickles, one after the other
            for opcode, argument, offset in pickletools.genops(stream[position:]):  # noqa: B007
                if opcode.name in ("GLOBAL", "INST"):
                    names.append(str(argument).replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL":
                    names.append(".".join(strings[-2:]))
                elif (isinstance(argument, str) and "UNICODE" in opcode.name) or "STRING" in opcode.name:
                    strings.append(str(argument))
                elif opcode.name == "MEMOIZE":
                    memo[len(memo)] = strings[-1] if strings else ""
                elif opcode.name in ("BINPUT", "LONG_BINPUT", "PUT"):
                    memo[int(argument)] = strings[-1] if strings else ""
                elif opcode.name in ("BINGET", "LONG_BINGET", "GET") and int(argument) in memo:
                    strings.append(memo[int(argument)])
            position += offset + 1
    except Exception:  # the rest is no pickle (tensor bytes, or damage): what was found so far is what there is to name
        pass
    return names


def _harmless_names() -> set[str]:
    harmless = {
        "argparse.Namespace", "pathlib.PosixPath", "_codecs.encode", "collections.OrderedDict", "numpy.dtype",
        "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
    }  # fmt: skip
    return harmless | {f"torch.{name}" for name in dir(torch)} | {f"torch._utils.{name}" for name in dir(torch._utils)}


def _harmless_types() -> list[Any]:
    """What the published checkpoints hold beside tensors: the parsed arguments, and numpy numbers."""
    import _codecs

    scalar = np.core.multiarray.scalar if np.__version__ < "2" else np._core.multiarray.scalar
    dtypes = [getattr(np.dtypes, name) for name in dir(np.dtypes) if name.endswith("DType") and _numeric(name)]
    return [
        argparse.Namespace,
        pathlib.PosixPath,
        _codecs.encode,
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
        *dtypes,
    ]


def _numeric(name: str) -> bool:
    return name.startswith(("Float", "Int", "UInt", "Bool", "LongDouble", "Long", "Short", "Byte"))


def plain(value: Any) -> Any:
    """The value with Namespaces as dictionaries, numpy scalars as Python numbers and paths as strings."""
    if isinstance(value, argparse.Namespace):
        return {key: plain(item) for key, item in vars(value).items()}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, tuple):
        return tuple(plain(item) for item in value)
    return value
