"""Checkpoints, configs, log.txt and lock files, damaged and made up."""

from __future__ import annotations

import argparse
import io
import json
import pickle
import tracemalloc
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.random import Generator

import pretrained
from runtime import json_log
from runtime.checkpoint import read_checkpoint, save_checkpoint
from runtime.cli import HelpFormatter, add_flag, bool_flag, float_or_none, read_config
from runtime.guards import InputError
from runtime.lock import LOCK_NAME, FolderLock

_LARGEST = 50 << 20  # bytes that Python may take for a case of a few kilobytes


def _content() -> dict[str, Any]:
    weights = {"patch_embed.proj.weight": torch.arange(24.0 * 3 * 64).view(24, 3, 8, 8), "norm.weight": torch.ones(24)}
    weights |= {"pos_embed": torch.zeros(1, 16, 24), "simpool.wq.weight": torch.ones(24, 24)}
    weights |= {f"blocks.{i}.norm1.weight": torch.ones(24) for i in range(2)}
    return {
        "teacher": {f"backbone.{name}": value for name, value in weights.items()}, "epoch": 3,
        "config": {"arch": "vit_small", "mode": "simpool", "gamma": 1.25, "embed_dim": 24, "depth": 2, "num_heads": 2},
        "args": {"lr": 0.1, "crops": [0.1, 1.0], "name": "x", "none": None},
    }  # fmt: skip


@cache
def _sealed() -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(_content(), Path(folder) / "c.pth")
        return (Path(folder) / "c.pth").read_bytes()


@cache
def _foreign(zipped: bool) -> bytes:
    stream = io.BytesIO()
    content = _content() | {"args": argparse.Namespace(gamma=np.float64(1.25), arch="vit_small", out=Path("x"))}
    del content["config"]
    torch.save(content, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


def damaged(rng: Generator, data: bytes) -> bytes:
    """The bytes with one kind of damage: flips, a cut, a run of zeros or noise, a doubled or a moved part."""
    out, kind = bytearray(data), rng.integers(6)
    at, other = sorted(int(i) for i in rng.integers(0, len(out) + 1, 2))
    if kind == 0:
        for i in rng.integers(0, len(out), rng.integers(1, 5)):
            out[i] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        del out[at:]
    elif kind == 2:
        out[at:other] = bytes(other - at)
    elif kind == 3:
        end = min(other, at + 64)
        out[at:end] = rng.bytes(end - at)
    elif kind == 4:
        out[at:at] = out[at:other]
    else:
        del out[at:other]
    return bytes(out)


def _bounded(work: Callable[[], Any]) -> Any:
    """The work's result; AssertionError if it takes much memory (Python's own; tensors are bounded by the file)."""
    tracemalloc.start()
    try:
        return work()
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < _LARGEST, f"{peak >> 20} MiB"


def _check_message(text: str, path: Path) -> None:
    assert path.name in text, f"the message does not name the file: {text}"
    assert len(text.splitlines()) == 1, text
    assert len(text) < 2000, "a message of more than 2000 letters"


def _read(path: Path, expected: dict[str, Any] | None = None) -> str:
    """Read a checkpoint as the programs do; what is read must be the content that was written, if that is given."""
    try:
        content = _bounded(lambda: read_checkpoint(path))
        found = pretrained.interpret(content, path)
    except (InputError, ValueError) as error:
        _check_message(str(error), path)
        return "refused"
    if expected is not None:
        assert content.keys() >= expected.keys()
        for name, value in expected["teacher"].items():
            assert torch.equal(content["teacher"][name], value), f"other numbers in {name}"
    assert all(isinstance(value, torch.Tensor) for value in found.weights.values())
    return "read"


def sealed_checkpoint(rng: Generator, folder: Path) -> str:
    """A file of ours, damaged: never read as anything but what was written."""
    path = folder / "checkpoint.pth"
    path.write_bytes(damaged(rng, _sealed()))
    return _read(path, _content())


def foreign_checkpoint(rng: Generator, folder: Path) -> str:
    """A file of torch.save, damaged: its tensors are those that were written, or it is refused."""
    path = folder / "weights.pth"
    path.write_bytes(damaged(rng, _foreign(True)))
    return _read(path, {"teacher": _content()["teacher"]})


def old_checkpoint(rng: Generator, folder: Path) -> str:
    """The format of torch < 1.6, damaged: it has no checksums, so that only the manner of failing can be checked."""
    path = folder / "old.pth"
    path.write_bytes(damaged(rng, _foreign(False)))
    return _read(path)


_PIECES = [
    b"}", b"]", b")", b"(", b"K\x01", b"N", b"\x88", b"e", b"u", b"s", b"a", b"t", b"\x85", b"\x86", b"\x87", b"R",
    b"b", b"\x81", b"q\0", b"q\1", b"h\0", b"h\1", b"X\1\0\0\0a", b"X\7\0\0\0storage", b"Q", b"0", b"1", b"2",
    b"r\xff\xff\xff\x7f",
    b"ctorch\nFloatStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"cargparse\nNamespace\n", b"cnumpy\ndtype\n",
    b"ccollections\nOrderedDict\n", b"c_codecs\nencode\n", b"cnumpy.core.multiarray\nscalar\n", b"cos\nsystem\n",
    b"\x8a\x09" + b"\xff" * 9, b"G\x7f\xf8" + bytes(6), b"X\xff\xff\xff\x7f", b"\x93", b"\x94", b"J\xff\xff\xff\xff",
    b"X\6\0\0\0latin1", b"ctorch\nSize\n", b"cpathlib\nPosixPath\n", b"itorch\nSize\n", b"ctorch\nfloat32\n",
]  # fmt: skip


def made_up_pickle(rng: Generator, folder: Path) -> str:
    """Opcodes in a random order within a whole archive."""
    stream = b"\x80\x02" + b"".join(_PIECES[i] for i in rng.integers(0, len(_PIECES), rng.integers(1, 200))) + b"."
    path = folder / "made_up.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", stream)
        archive.writestr("archive/data/a", bytes(64))
    return _read(path)


_ODD: list[Any] = [
    None, True, -1, 0, 10**30, float("nan"), float("inf"), "", "a" * 5000, "\x1b[2J", [], {}, [[]], (1,), {"a": 1},
    b"x",
    torch.zeros(()), torch.zeros(0, 3), torch.ones(1).expand(1000, 1000), torch.zeros(2, dtype=torch.complex64), 3.5,
]  # fmt: skip


def odd_content(rng: Generator, folder: Path) -> str:
    """A valid file whose values are of odd types, sizes and shapes, at any depth."""
    content = pickle.loads(pickle.dumps(_content()))
    for _ in range(rng.integers(1, 4)):
        at: Any = content
        while True:
            key = list(at)[rng.integers(len(at))] if at else "new"
            if isinstance(at.get(key), dict) and rng.integers(4):
                at = at[key]
                continue
            at[key] = _ODD[rng.integers(len(_ODD))]
            break
    path = folder / "odd.pth"
    torch.save(content, path)
    return _read(path)


# ---- configs


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, formatter_class=HelpFormatter)
    add_flag(parser, "--lr", type=float, default=0.1)
    add_flag(parser, "--gamma", type=float_or_none, default=1.25)
    add_flag(parser, "--arch", default="vit_small")
    add_flag(parser, "--mode", default="official", choices=("official", "simpool"))
    add_flag(parser, "--scale", type=float, nargs=2, default=[0.1, 1.0])
    add_flag(parser, "--ks", type=int, nargs="+", default=[10])
    add_flag(parser, "--report", type=bool_flag, default=True)
    add_flag(parser, "--dry_run", action="store_true")
    return parser


_VALUES = ["1", "0.5", "null", "[]", "[1, 2]", "[0.1, 1]", "true", "on", '"x"', "{}", "nan", ".inf", "~", "-3", "1e400",
           "&a [1]", "*a", "!!binary aGk=", "2020-01-01", "official", "0x10", '"\\u001b"']  # fmt: skip


def config(rng: Generator, folder: Path) -> str:
    """Flags with values of all kinds, in JSON or YAML, sometimes damaged: each value is of its flag's type."""
    names = ["lr", "gamma", "arch", "mode", "scale", "ks", "report", "dry_run", "lr", "1", "on", "unknown"]
    chosen = [names[i] for i in rng.integers(0, len(names), rng.integers(0, 4))]
    values = [_VALUES[i] for i in rng.integers(0, len(_VALUES), len(chosen))]
    yaml = bool(rng.integers(2))
    lines = [f"{name}: {value}" if yaml else f'"{name}": {value}' for name, value in zip(chosen, values, strict=True)]
    data = ("\n".join(lines) if yaml else "{" + ", ".join(lines) + "}").encode()
    path = folder / ("c.yaml" if yaml else "c.json")
    path.write_bytes(damaged(rng, data) if data and rng.integers(3) == 0 else data)
    try:
        found = _bounded(lambda: read_config(path, _parser()))
    except InputError as error:
        _check_message(str(error), path)
        return "refused"
    kinds = {"lr": float, "gamma": float | None, "arch": str, "mode": str, "scale": list, "ks": list, "report": bool,
             "dry_run": bool}  # fmt: skip
    for name, value in found.items():
        assert isinstance(value, kinds[name]), f"{name}: {value!r}"
    assert len(found.get("scale", [0, 0])) == 2
    return "read"


# ---- a run's small files


def log(rng: Generator, folder: Path) -> str:
    """log.txt: rows stay whole, in order, each epoch once, whatever the file holds."""
    rows = "".join(json.dumps({"epoch": i, "loss": 1.5}) + "\n" for i in range(5))
    path = folder / "log.txt"
    path.write_bytes(damaged(rng, rows.encode()))
    dropped = json_log.cut_json_lines(path, first_epoch=4)
    epochs = [json.loads(line)["epoch"] for line in path.read_text().splitlines()]
    assert len(set(epochs)) == len(epochs)
    assert all(epoch < 4 for epoch in epochs)
    json_log.JsonLog(path).append({"epoch": 4})
    assert [json.loads(line)["epoch"] for line in path.read_text().splitlines()] == [*epochs, 4]
    return "refused" if dropped else "read"


def lock(rng: Generator, folder: Path) -> str:
    """A lock file of any content: taken if it is free, described in one line if it is held."""
    text = json.dumps({"host": "node1", "pid": 5, "job": "7"}).encode()
    data = damaged(rng, text) if rng.integers(4) else rng.bytes(int(rng.integers(0, 9000)))
    if rng.integers(2):
        (folder / LOCK_NAME).write_bytes(data)
        FolderLock(folder).release()
        return "read"
    held = FolderLock(folder)
    try:
        (folder / LOCK_NAME).write_bytes(data)
        with pytest.raises(InputError, match="another run is using"):
            FolderLock(folder)
        return "refused"
    finally:
        held.release()


FORMATS: dict[str, Callable[[Generator, Path], str]] = {
    "checkpoint, sealed": sealed_checkpoint,
    "checkpoint, foreign": foreign_checkpoint,
    "checkpoint, torch < 1.6": old_checkpoint,
    "checkpoint, made-up": made_up_pickle,
    "checkpoint, odd values": odd_content,
    "config": config,
    "log.txt": log,
    "lock file": lock,
}
