"""Checkpoints as bytes: written so that they cannot tear, sealed so that damage is found.

Writing: temporary file, fsync, replace, fsync of the folder. A file of ours carries the SHA-256 of its bytes in the
comment of its zip archive, where torch.load of any version overlooks it. Reading is `pretrained`'s and `torchfile`'s;
here their errors become InputError.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import nn

import pretrained
from runtime.distributed import is_main_process
from runtime.guards import InputError, input_errors
from runtime.terminal import say
from torchfile import read as torchfile
from torchfile.archive import END_SIZE
from torchfile.read import COMMENT, COMMENT_SIZE

TEMP_PREFIX = ".tmp-"
# Temporary names of what a run writes: the file's own name, and what tempfile puts behind it.
_TEMPORARY = re.compile(
    r"\.tmp-(checkpoint(_step)?\d*\.pth|best\.pth|replay_step\d+\.pth|log\.txt|config\.json|DONE|PREEMPTED|probe)\.[a-z0-9_]{8}"
)


# ------------------------------------------------------------------------------------------------ writing


def write_atomic(path: str | Path, write: Callable[[Path], None]) -> None:
    """Let `write(temporary)` fill a file next to `path`, then rename it to `path`, complete and durable."""
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
    """The process's umask, read without changing it (another thread may be creating files)."""
    try:
        match = re.search(r"^Umask:\s*(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return int(match.group(1), 8) if match else 0o022


def fsync_folder(folder: Path) -> None:
    """Make a rename, link or unlink inside `folder` durable, if the system lets a folder be opened."""
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
    """Make `folder` and write a file in it. Raises InputError naming `flag` if that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=f"{TEMP_PREFIX}probe.", dir=folder) as probe:
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
    file.seek(-END_SIZE, os.SEEK_END)
    end = file.read(END_SIZE)
    if not (end.startswith(b"PK\x05\x06") and end.endswith(b"\0\0")):
        raise RuntimeError("torch.save wrote a file that does not end in a plain zip record; cannot add its checksum")
    file.seek(-2, os.SEEK_END)
    file.write(struct.pack("<H", COMMENT_SIZE))
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    file.seek(0, os.SEEK_END)
    file.write(COMMENT + digest.encode())


def sweep_temporaries(folder: Path) -> list[str]:
    """Remove what a killed writer of this run left in `folder`; returns the names.

    The caller holds the folder's lock, so nobody is writing the files that only a run writes. Those that other
    programs may be writing right now, and everything that a user put there, stay.
    """
    orphans = [path for path in sorted(folder.iterdir()) if _TEMPORARY.fullmatch(path.name) and _is_file(path)]
    for orphan in orphans:
        orphan.unlink(missing_ok=True)
    return [orphan.name for orphan in orphans]


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


# ------------------------------------------------------------------------------------------------ reading


def verify(path: str | Path) -> None:
    """Check that a file's bytes are what was written. Raises InputError naming the damage.

    Our files are checked against their own SHA-256, other zip files against the CRC of each entry; files of torch < 1.6
    carry no checksum, and only loading can tell.
    """
    with input_errors():
        torchfile.verify(path)


def file_sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Verify and read a checkpoint onto the CPU as plain data, running none of its content.

    Raises InputError if the file is missing, damaged, not a checkpoint, or holds anything but tensors, numbers,
    strings, containers and the harmless types of the published files.
    """
    with input_errors():
        return pretrained.read(path)


def plain(value: Any) -> Any:
    """The value with Namespaces as dictionaries, numpy scalars as Python numbers and paths as strings."""
    if isinstance(value, argparse.Namespace):
        return {key: plain(item) for key, item in vars(value).items()}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, tuple):
        return tuple(plain(item) for item in value)
    return value


def restart_from_checkpoint(
    ckp_path: str | Path, run_variables: dict[str, Any] | None = None, **objects: Any
) -> dict[str, Any] | None:
    """Load `objects` (name=module, optimizer, scaler ...) and `run_variables` from a checkpoint (DINO's function).

    Returns the checkpoint's content; None, with nothing done, if there is no file.
    """
    if not Path(ckp_path).is_file():
        return None
    content = read_checkpoint(ckp_path)
    say(f"found checkpoint {ckp_path}")
    for name, item in objects.items():
        if name not in content or item is None:
            say(f"{name} is not in the checkpoint; it stays as it is")
            continue
        state = content[name]
        if isinstance(item, nn.Module):
            wrapped = isinstance(item, nn.parallel.DistributedDataParallel)
            state = {
                ("module." if wrapped else "") + name: value
                for name, value in pretrained.without_prefix(state, "module.").items()
            }
        item.load_state_dict(state)
    for name in run_variables or {}:
        if name in content:
            run_variables[name] = content[name]
    return content
