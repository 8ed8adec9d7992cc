"""The built-in demonstration set: patches of the photographs that ship inside scikit-image and scikit-learn.

Real content without a download. A class is a photograph; its patches are squares cut at random place and scale and
brought to one size. Training patches come from the left part of each photograph and validation patches from the right
part, so no pixel is in both. The same patches come out on every machine.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from data.decode import Picture
from data.draws import DEMO, uniforms
from data.source import ImageSource
from runtime.guards import InputError

# class -> file inside the package. Only files of the wheels: scikit-image fetches its other images from the network.
PHOTOGRAPHS = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "brick": ("skimage", "data/brick.png"),
    "camera": ("skimage", "data/camera.png"),
    "cat": ("skimage", "data/chelsea.png"),
    "cell": ("skimage", "data/cell.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "coins": ("skimage", "data/coins.png"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "grass": ("skimage", "data/grass.png"),
    "gravel": ("skimage", "data/gravel.png"),
    "hubble": ("skimage", "data/hubble_deep_field.jpg"),
    "moon": ("skimage", "data/moon.png"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "page": ("skimage", "data/page.png"),
    "retina": ("skimage", "data/retina.jpg"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "temple": ("sklearn", "datasets/images/china.jpg"),
    "text": ("skimage", "data/text.png"),
    "tissue": ("skimage", "data/ihc.png"),
}
COUNTS = {"train": 4000, "val": 1000}
SIZES = (32, 48)
TRAIN_PART = 0.7  # of a photograph's width
LARGEST_PATCH = 4.0  # side of the largest patch in the photograph, in sides of the finished patch


class DemoSource(ImageSource):
    """4,000 training or 1,000 validation patches of `size` x `size` pixels, with the photograph as the class."""

    def __init__(self, split: str, size: int = 32, in_chans: int = 3):
        if in_chans != 3:
            raise InputError(f"the demo set has 3 channels, not {in_chans}: leave --in_chans at 3 with it")
        self._pixels, labels = _patches(split, size)
        identity = f"demo {split} {size}".encode()
        super().__init__(len(labels), labels, list(PHOTOGRAPHS), 3, identity, f"demo:{size}")

    def open(self, i: int) -> Picture:
        return Picture.from_array(self._pixels[i])

    def name(self, i: int) -> str:
        return f"demo/{self.classes[self.labels[i]]}/{i:05d}"


def open_demo(data_path: str, split: str, in_chans: int = 3) -> DemoSource:
    """The source behind `demo` (32-pixel patches), `demo:32` or `demo:48`."""
    _, _, size = data_path.partition(":")
    if size and size not in map(str, SIZES):
        raise InputError(f"{data_path!r} is not a demo set: use demo, demo:32 or demo:48")
    return DemoSource(split, int(size or SIZES[0]), in_chans)


def read_photograph(label: str) -> np.ndarray:
    """(H, W, 3) uint8."""
    package, file = PHOTOGRAPHS[label]
    import importlib.util

    spec = importlib.util.find_spec(package)  # finds the folder without importing the package
    path = Path(spec.origin).parent / file if spec and spec.origin else None
    if path is None or not path.is_file():
        distribution = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[package]
        raise InputError(f"the demo set needs {file} of {distribution}, not found: pip install {distribution}")
    return Picture(path.read_bytes()).pixels()


@functools.cache
def _patches(split: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (N, size, size, 3) uint8 and labels (N,), image i of class i modulo the number of classes."""
    from PIL import Image

    count = COUNTS[split]
    pixels = np.empty((count, size, size, 3), dtype=np.uint8)
    labels = np.arange(count) % len(PHOTOGRAPHS)
    for number, label in enumerate(PHOTOGRAPHS):
        photograph = read_photograph(label)
        edge = int(photograph.shape[1] * TRAIN_PART)
        part = Image.fromarray(photograph[:, :edge] if split == "train" else photograph[:, edge:])
        largest = min(size * LARGEST_PATCH, part.width, part.height)
        for i in np.flatnonzero(labels == number):
            u = uniforms(3, size, DEMO, epoch=("train", "val").index(split), index=int(i))
            side = int(size * (largest / size) ** u[0])
            left, top = int(u[1] * (part.width - side + 1)), int(u[2] * (part.height - side + 1))
            # crop first: a resize with a box would also read pixels outside the box
            patch = part.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)
            pixels[i] = np.asarray(patch)
    pixels.flags.writeable = False
    return pixels, labels
