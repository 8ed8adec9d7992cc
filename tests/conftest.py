"""Fixtures that every test may use: real images, and one deterministic arithmetic."""

from __future__ import annotations

import multiprocessing.process
import os
import shutil
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # torch.compile then starts no processes

import torch

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="skip what starts a process or sleeps")


@pytest.fixture(autouse=True)
def fast(request, monkeypatch):
    """With --fast, a test that starts a process or sleeps is skipped at that moment."""
    if not request.config.getoption("--fast"):
        return

    def skip(*_, **__):
        pytest.skip("starts a process or sleeps, which --fast leaves out")

    for owner, name in (
        (subprocess.Popen, "__init__"), (multiprocessing.process.BaseProcess, "start"), (os, "fork"), (time, "sleep"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, skip)


@pytest.fixture(autouse=True)
def exact_arithmetic():
    """One thread, full float32: numbers do not depend on the machine's mood or on an earlier test."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def on_an_accelerator(monkeypatch):
    """The optimizers take the CPU's tensors for an accelerator's, and go the ways that ask for no value."""
    monkeypatch.setattr("optim.devices.on_cpu", lambda tensor: False)


def _unpacked(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    archive = SHARED_DATA / f"{name}.tar"
    if not archive.is_file():
        return None
    root = tmp_path_factory.mktemp(name)
    with tarfile.open(archive) as tar:
        tar.extractall(root, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # since 3.11.4
    (folder,) = root.iterdir()
    return folder


def _photographs(root: Path, count: int = 100) -> Path:
    """A bare folder of JPEG files of varied sizes, cut from the built-in photographs."""
    from PIL import Image

    from data.demo import PHOTOGRAPHS, read_photograph

    for i in range(count):
        pixels = read_photograph(list(PHOTOGRAPHS)[i % len(PHOTOGRAPHS)])
        height, width = min(pixels.shape[0], 150 + 37 * i % 240), min(pixels.shape[1], 150 + 37 * i % 330)
        Image.fromarray(pixels[-height:, :width]).save(root / f"photograph_{i:03d}.JPEG")
    return root


def _class_folders(root: Path, classes: int = 10) -> Path:
    """An image-folder root of the built-in patches of some photographs, 32 pixels, about 200 and 50 of each."""
    from PIL import Image

    from data.datasets import open_images

    for split in ("train", "val"):
        source = open_images("demo:32", split)
        for i in range(len(source)):
            if source.labels[i] < classes:
                folder = root / split / source.classes[source.labels[i]]
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(source.load(i)).save(folder / f"{i:05d}.jpg")
    return root


@pytest.fixture(scope="session")
def imagenet_sample(tmp_path_factory) -> Path:
    """A bare folder of 100 real photographs (JPEG, varied sizes), without labels."""
    folder = _unpacked("imagenet_sample_100", tmp_path_factory)
    return folder if folder is not None else _photographs(tmp_path_factory.mktemp("photographs"))


@pytest.fixture(scope="session")
def cifar10(tmp_path_factory) -> Path:
    """An image-folder root (train/ and val/, ten class folders) of small real JPEG images."""
    folder = _unpacked("cifar10_12k", tmp_path_factory)
    return folder if folder is not None else _class_folders(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def small(cifar10, tmp_path_factory) -> Path:
    """96 training and 40 validation images of two classes, real ones."""
    root = tmp_path_factory.mktemp("two_classes")
    for split, count in (("train", 48), ("val", 20)):
        for folder in sorted((cifar10 / split).iterdir())[:2]:
            target = root / split / folder.name
            target.mkdir(parents=True)
            for image in sorted(folder.iterdir())[:count]:
                shutil.copy(image, target)
    return root
