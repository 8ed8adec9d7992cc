"""Attention maps of several models on several images as one labelled picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evaluation.attention import attention_maps, coloured, common_top, pictures
from runtime.checkpoint import write_atomic

GAP = 6  # pixels between the pictures of a grid


def _text(text: str, size: int, bold: bool = False) -> Any:
    """Black text on white as a PIL image, cropped to its height."""
    from matplotlib import font_manager
    from PIL import Image, ImageDraw, ImageFont

    path = font_manager.findfont(font_manager.FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal"))
    font = ImageFont.truetype(path, size)
    left, _, right, _ = font.getbbox(text)
    canvas = Image.new("RGB", (max(1, right - left), font.getbbox("Ág")[3]), "white")
    ImageDraw.Draw(canvas).text((-left, 0), text, fill="black", font=font)
    return canvas


def _shortened(text: str, size: int, width: int, bold: bool = False) -> Any:
    """The text as an image no wider than `width`, first smaller, then cut if it must be."""
    while (image := _text(text, size, bold)).width > width and size > 9:
        size -= 1
    while image.width > width and len(text) > 2:
        text = text[:-2] + "…"
        image = _text(text, size, bold)
    return image


def grid(
    rows: Sequence[Sequence[np.ndarray]],
    columns: Sequence[str],
    groups: Sequence[tuple[str, int]] = (),
    top: float | None = None,
) -> np.ndarray:
    """Equal pictures in rows under column titles, with a line of group titles (text, number of columns) above them.

    top: the end of the maps' common scale in multiples of uniform attention, which a bar below the rows explains.
    """
    from PIL import Image

    height, width = rows[0][0].shape[:2]
    font = max(11, round(width / 14))
    line = round(1.9 * font)
    head = line * (2 if groups else 1)
    # a wider gap before a new group
    starts, group_starts = [], set(np.cumsum([count for _, count in groups])[:-1].tolist()) if groups else set()
    x = GAP
    for column in range(len(columns)):
        x += 3 * GAP if column in group_starts else 0
        starts.append(x)
        x += width + GAP
    foot = line + GAP if top is not None else 0
    canvas = Image.new("RGB", (x, head + len(rows) * (height + GAP) + foot), "white")
    column = 0
    for text, count in groups:
        left, right = starts[column], starts[column + count - 1] + width
        if text:
            label = _shortened(text, round(1.1 * font), right - left, bold=True)
            canvas.paste(label, (left + (right - left - label.width) // 2, (line - label.height) // 2))
        column += count
    for left, text in zip(starts, columns, strict=True):
        label = _shortened(text, font, width)
        canvas.paste(label, (left + (width - label.width) // 2, head - line + (line - label.height) // 2))
    for r, row in enumerate(rows):
        for left, picture in zip(starts, row, strict=True):
            canvas.paste(Image.fromarray(picture), (left, head + r * (height + GAP)))
    if top is not None:
        bar = scale_bar(top, x - 2 * GAP, line, font)
        canvas.paste(bar, (x - GAP - bar.width, canvas.height - foot))
    return np.asarray(canvas)


def scale_bar(top: float, width: int, height: int, font: int) -> Any:
    """The colours from 0 to `top` times uniform attention, as a PIL image no wider than `width`."""
    from PIL import Image

    ramp = coloured(torch.linspace(0, 1, max(40, width // 4)).repeat(max(6, height // 2), 1))
    parts = [
        _shortened("attention: 0", font, width // 3),
        Image.fromarray(ramp),
        _shortened(f"{top:.1f} times uniform", font, width // 3),
    ]
    bar = Image.new("RGB", (sum(part.width for part in parts) + 2 * GAP, height), "white")
    left = 0
    for part in parts:
        bar.paste(part, (left, (height - part.height) // 2))
        left += part.width + GAP
    return bar


def save_png(picture: np.ndarray, path: str | Path) -> None:
    """Write a picture (H, W, 3) uint8."""
    from PIL import Image

    write_atomic(path, lambda temporary: Image.fromarray(picture).save(temporary, format="PNG"))


def attention_figure(
    models: nn.Module | Mapping[str, nn.Module], images: Tensor, path: str | Path, **settings: Any
) -> Path:
    """Write one labelled PNG: a row per image, and per model its map and overlay; see `figure_of_maps`.

    models: one, or several under the titles to print; images: uint8 (B, C, H, W).
    Raises ValueError if a model has no attention map.
    """
    named = {"": models} if isinstance(models, nn.Module) else dict(models)
    return figure_of_maps({title: attention_maps(model, images) for title, model in named.items()}, images, path,
                          **settings)  # fmt: skip


def figure_of_maps(
    maps_of: Mapping[str, Tensor],
    images: Tensor,
    path: str | Path,
    *,
    threshold: float | None = None,
    smooth: bool = True,
    per_head: bool = False,
    side: int | None = None,
    normalize: str = "common",
) -> Path:
    """Write one labelled PNG: a row per image, and per model its map, overlay and, with a threshold, mask.

    maps_of: attention (B, heads, h, w) of each model under its title; images: uint8 (B, C, H, W). per_head adds the map
    of every head of a model with several. side: pixels of a picture's shorter side, by default at least 224. normalize:
    "common" shows attention / uniform, from 0, on one scale for all maps; "image" stretches each map to its own range.
    """
    side = side or max(224, min(images.shape[-2:]))
    columns, groups = ["image"], [("", 1)]
    rows: list[list[np.ndarray]] = [[] for _ in images]
    top = common_top([maps.mean(1) for maps in maps_of.values()]) if normalize == "common" else None
    shown_models = [title for title in maps_of if title]
    for title, attention in maps_of.items():
        heads = attention.shape[1]
        kinds = ["map", "overlay"] + (["mask"] if threshold is not None else [])
        titles = ["map", "overlay"] + ([f"{threshold:.0%} of the attention"] if threshold is not None else [])
        if heads > 1:
            titles[0] = f"mean of {heads} heads"
        if per_head and heads > 1:
            titles += [f"head {head + 1}" for head in range(heads)]
        columns, groups = columns + titles, [*groups, (title, len(titles))]
        for row, image, maps in zip(rows, images, attention, strict=True):
            shown = pictures(image, maps.mean(0), threshold, smooth, side, top)
            row.extend(([] if row else [shown["image"]]) + [shown[kind] for kind in kinds])
            if per_head and heads > 1:
                row.extend(pictures(image, one, None, smooth, side, top)["map"] for one in maps)
    path = Path(path)
    save_png(grid(rows, columns, groups if shown_models else (), top), path)
    return path
