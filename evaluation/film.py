"""Frames as an animated GIF, one at a time: a film of any length takes the memory and the open files of one frame."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from runtime.checkpoint import write_atomic

MOST_FPS = 50.0  # GIF counts in hundredths of a second, and viewers slow down anything faster than two of them


def write_gif(frames: Iterable[np.ndarray], path: str | Path, fps: float) -> int:
    """Write pictures (H, W, 3) uint8 of one size, each with its own 256 colours, repeated for ever; returns how many.

    The file appears when it is whole. Raises ValueError without a frame.
    """
    written: list[int] = []
    write_atomic(path, lambda temporary: written.append(_write(frames, temporary, fps)))
    return written[0]


def _write(frames: Iterable[np.ndarray], path: Path, fps: float) -> int:
    from PIL import GifImagePlugin, Image

    count = 0
    with open(path, "wb") as file:
        for frame in frames:
            image = Image.fromarray(frame).quantize(256)
            if count == 0:
                header, _ = GifImagePlugin.getheader(image, info={"loop": 0})
                file.write(b"".join(header))
            # a frame's time runs from the start of the film, so that rounding does not add up
            hundredths = round(100 * (count + 1) / fps) - round(100 * count / fps)
            data = GifImagePlugin.getdata(image, (0, 0), duration=10 * hundredths, include_color_table=True)
            file.write(b"".join(data))
            count += 1
        file.write(b";")
    if count == 0:
        raise ValueError("a film needs at least one frame")
    return count
