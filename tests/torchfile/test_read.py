"""Files of torch.save, whole: both formats, what else a file may be, and the memory that reading takes."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.patience import PATIENCE_S
from torchfile.read import read, verify

CONTENT = {
    "teacher": {"w": torch.arange(12.0).view(3, 4), "t": torch.arange(12.0).view(3, 4).t(), "n": torch.tensor(3)},
    "half": torch.ones(5).half(), "brain": torch.ones(3).bfloat16(), "none": torch.zeros(0, 4),
    "scalar": torch.ones(()),
    "parameter": torch.nn.Parameter(torch.ones(2)), "flags": torch.tensor([True, False]),
    "args": argparse.Namespace(arch="vit_small", out=Path("a/b"), root=Path("/a")), "lr": np.float64(0.25),
}  # fmt: skip


def assert_same(found: dict) -> None:
    for name, expected in CONTENT["teacher"].items():
        assert torch.equal(found["teacher"][name], expected)
    for name in ("half", "brain", "none", "scalar", "parameter", "flags"):
        assert torch.equal(found[name], CONTENT[name])
        assert found[name].dtype == CONTENT[name].dtype
    assert not isinstance(found["parameter"], torch.nn.Parameter)
    assert found["args"] == {"arch": "vit_small", "out": "a/b", "root": "/a"}
    assert type(found["lr"]) is float


@pytest.mark.parametrize("zipped", [True, False])
def test_both_formats(tmp_path, zipped):
    """Values, dtypes and strides come back from the zip format and from the one before it."""
    torch.save(CONTENT, tmp_path / "c.pth", _use_new_zipfile_serialization=zipped)
    assert_same(read(tmp_path / "c.pth"))


def test_types_without_a_storage_of_their_own(tmp_path):
    """8-bit floats are stored as bytes with the name of their type."""
    value = torch.tensor([0.5, 2.0]).to(torch.float8_e4m3fn)
    torch.save({"w": value}, tmp_path / "c.pth")
    assert torch.equal(read(tmp_path / "c.pth")["w"].float(), value.float())


def test_tensors_can_be_written_to(tmp_path):
    """They own their memory and are aligned for the processor."""
    torch.save({"w": torch.ones(1000)}, tmp_path / "c.pth")
    weight = read(tmp_path / "c.pth")["w"]
    weight += 1
    assert weight.sum() == 2000
    assert weight.data_ptr() % 16 == 0


OTHERS = {
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-lfs pointer.*git lfs pull"),
    "html": (b"\n<!DOCTYPE html><html></html>", "web page"),
    "gzip": (b"\x1f\x8b\x08" + bytes(40), "gzip"),
    "safetensors": ((80).to_bytes(8, "little") + b'{"w":{}}' + b" " * 80, "safetensors"),
    "text": (b"epoch 3, loss 2.5\n", "text file.*epoch 3"),
    "zeros": (bytes(5000), "begins with zeros"),
    "tar": (bytes(100) .replace(b"\0", b"a") + bytes(157) + b"ustar" + bytes(300), "tar archive"),
    "bytes": (bytes(range(128, 255)), "torch.save did not write it"),
    "pickle": (b"\x80\x02K\x01.", "torch.save did not write"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_other_files_are_named(tmp_path, kind):
    """What is no checkpoint is told by what it is, with what to do."""
    data, message = OTHERS[kind]
    (tmp_path / "c.pth").write_bytes(data)
    with pytest.raises(ValueError, match=rf"c\.pth.*{message}"):
        read(tmp_path / "c.pth")


def test_another_zip_is_named(tmp_path):
    """A zip file of something else."""
    with zipfile.ZipFile(tmp_path / "c.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match=r"zip archive that torch\.save did not write"):
        read(tmp_path / "c.pth")


def test_a_program_is_named(tmp_path):
    """A TorchScript archive is no state dict."""
    with zipfile.ZipFile(tmp_path / "c.pth", "w") as archive:
        for name in ("data.pkl", "constants.pkl"):
            archive.writestr(f"archive/{name}", b"\x80\x02).")
    with pytest.raises(ValueError, match="TorchScript program"):
        read(tmp_path / "c.pth")


def test_pipes_do_not_block(tmp_path):
    """Opening a named pipe would wait for ever for its writer."""
    os.mkfifo(tmp_path / "pipe.pth")
    for function in (read, verify):
        with pytest.raises(ValueError, match="a pipe or a device"):
            function(tmp_path / "pipe.pth")


def test_a_large_file_that_is_none_is_not_read_whole(tmp_path):
    """20 GB of zeros (a sparse file) are refused within seconds; see also the memory below."""
    with open(tmp_path / "c.pth", "wb") as file:
        file.truncate(20 << 30)
    with pytest.raises(ValueError, match="begins with zeros"):
        read(tmp_path / "c.pth")


HOSTILE = """
import collections, io, resource, struct, sys, zipfile, torch
from pathlib import Path
from torchfile.read import read
sys.path.insert(0, sys.argv[2])
kind, path = sys.argv[1], Path(sys.argv[2]) / "c.pth"
if kind == "bomb":
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("archive/data.pkl", "archive/data/0"):
            with archive.open(name, "w") as entry:
                for _ in range(600):
                    entry.write(bytes(1 << 20))
elif kind == "expanded":
    torch.save({"w": torch.ones(1).expand(40000, 40000), "v": torch.ones(1).expand(40000, 40000)}, path)
elif kind == "sparse":
    with open(path, "wb") as file:
        file.truncate(20 << 30)
elif kind == "nested":
    value = []
    for _ in range(3000):
        value = [value]
    sys.setrecursionlimit(20000)
    torch.save({"config": value}, path)
elif kind == "honest":
    torch.save({str(i): torch.randn(1 << 20) for i in range(30)}, path)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read(path)
    print("read", end=" ")
except ValueError as error:
    print("refused", end=" ")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, path.stat().st_blocks * 512 >> 10)
"""


@pytest.mark.parametrize(
    ("kind", "outcome"),
    [("bomb", "refused"), ("expanded", "refused"), ("sparse", "refused"), ("nested", "refused"), ("honest", "read")],
)
def test_memory_is_bounded_by_the_file(tmp_path, kind, outcome):
    """Reading takes no more than three times the file's bytes and 200 MB."""
    command = [sys.executable, "-c", HOSTILE, kind, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE_S)
    found, grown_kib, file_kib = done.stdout.split()
    assert found == outcome
    assert int(grown_kib) < 3 * int(file_kib) + 200_000
