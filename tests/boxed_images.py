"""Photographs with known boxes: objects cut out of the built-in photographs and laid onto textures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from data.demo import read_photograph

# photograph: the object's box in it (x0, y0, x1, y1)
OBJECTS = {"rocket": (300, 20, 350, 400), "cat": (130, 10, 330, 290), "coins": (300, 15, 370, 80)}
TEXTURES = ("grass", "gravel", "brick")


def boxed_image(number: int, side: int = 96) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """(pixels (H, W, 3) uint8, box): an object at a known place on a texture; sides differ from image to image."""
    rng = np.random.default_rng(number)
    width, height = (int(side * factor) for factor in rng.uniform(0.8, 1.3, 2))
    texture = read_photograph(TEXTURES[number % len(TEXTURES)])[:height, :width].copy()
    name = list(OBJECTS)[number % len(OBJECTS)]
    x0, y0, x1, y1 = OBJECTS[name]
    patch = Image.fromarray(read_photograph(name)[y0:y1, x0:x1])
    scale = rng.uniform(0.3, 0.7) * min(width / patch.width, height / patch.height)
    patch = patch.resize((max(8, int(patch.width * scale)), max(8, int(patch.height * scale))))
    left, top = (int(rng.integers(0, room + 1)) for room in (width - patch.width, height - patch.height))
    texture[top : top + patch.height, left : left + patch.width] = np.asarray(patch)
    return texture, (left, top, left + patch.width, top + patch.height)


def boxed_folder(root: Path, count: int = 6, side: int = 96) -> Path:
    """A PASCAL VOC folder of `count` such images, boxes counted from 1 as there."""
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / name).mkdir(parents=True)
    names = [f"image-{number:02d}" for number in range(count)]
    for number, name in enumerate(names):
        pixels, (x0, y0, x1, y1) = boxed_image(number, side)
        Image.fromarray(pixels).save(root / "JPEGImages" / f"{name}.jpg", quality=92)
        (root / "Annotations" / f"{name}.xml").write_text(
            f"<annotation><size><width>{pixels.shape[1]}</width><height>{pixels.shape[0]}</height></size><object>"
            f"<bndbox><xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
            "</annotation>"
        )
    (root / "ImageSets" / "Main" / "trainval.txt").write_text("\n".join(names) + "\n")
    return root
