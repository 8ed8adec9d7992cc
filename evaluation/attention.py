"""Where a model looks: attention maps as arrays, and as pictures fit to be printed.

SimPool's map is the attention of its one query over all patches (or cells of the feature map); an official ViT's is the
attention of [CLS] in the last block, one map per head, shown as their mean or one by one. Maps are scaled to [0, 1] per
image for display, enlarged smoothly or patch by patch, and coloured with viridis. A mask at threshold t is the smallest
set of patches that holds t of the attention.

Letters: B images, C channels, H x W pixels, h x w patches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.augment import as_batch, resize
from data.loader import normalize
from evaluation.features import eval_mode

OVERLAY = 0.55  # weight of the coloured map over the image
DIMMED = 0.2  # brightness that is left outside a mask
GAP = 6  # pixels between the pictures of a grid


# ---- maps -----------------------------------------------------------------------------------------------------------


def fit(pixels: np.ndarray, size: tuple[int, int]) -> Tensor:
    """(H0, W0, C) uint8 -> (C, H, W) uint8: resized to cover `size` = (H, W), then its centre cut out."""
    height, width = size
    scale = max(height / pixels.shape[0], width / pixels.shape[1])
    image = resize(
        as_batch(np.array(pixels)),
        max(height, round(pixels.shape[0] * scale)),
        max(width, round(pixels.shape[1] * scale)),
    )
    top, left = (image.shape[-2] - height) // 2, (image.shape[-1] - width) // 2
    return image[0, :, top : top + height, left : left + width].contiguous()


@torch.no_grad()
def attention_maps(model: nn.Module, images: Tensor, batch_size: int = 8) -> Tensor:
    """uint8 images (B, C, H, W) -> attention (B, heads, h, w) on the CPU; over each map's patches it sums to 1.

    [CLS] attention is renormalised over the patches. Raises ValueError, from the model, where it has no attention map.
    """
    device = next(model.parameters()).device
    maps = []
    with eval_mode(model):
        for start in range(0, len(images), batch_size):
            batch = normalize(images[start : start + batch_size].to(device))
            maps.append(model.get_attention_map(batch).float().cpu())
    attention = torch.cat(maps)
    return attention / attention.sum((-2, -1), keepdim=True).clamp_min(1e-12)


def mass_mask(attention: Tensor, threshold: float) -> Tensor:
    """(..., h, w) -> bool: for each map the smallest set of patches that holds at least `threshold` of its sum."""
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold {threshold}: give the part of the attention to keep, above 0 and at most 1")
    flat = attention.flatten(-2)
    ordered, order = flat.sort(dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered  # what the patches before hold
    kept = before < threshold * flat.sum(-1, keepdim=True) * (1 - 1e-6)
    return torch.zeros_like(kept).scatter_(-1, order, kept).view(attention.shape)


def scaled(attention: Tensor) -> Tensor:
    """Each map (..., h, w) stretched to [0, 1]; a flat one becomes 0."""
    low = attention.amin((-2, -1), keepdim=True)
    span = attention.amax((-2, -1), keepdim=True) - low
    return (attention - low) / span.clamp_min(1e-12)


def enlarge(maps: Tensor, size: tuple[int, int], smooth: bool = True) -> Tensor:
    """(..., h, w) -> (..., H, W): bicubic, or each patch as a block."""
    flat = maps.reshape(-1, 1, *maps.shape[-2:]).float()
    big = F.interpolate(flat, size, mode="bicubic", align_corners=False) if smooth else F.interpolate(flat, size)
    return big.clamp(0, 1).view(*maps.shape[:-2], *size)


# ---- pictures (H, W, 3) uint8 ---------------------------------------------------------------------------------------


def displayable(image: Tensor) -> np.ndarray:
    """(C, H, W) uint8 -> (H, W, 3): gray is repeated, of more than three channels the first three are shown."""
    channels = image if len(image) == 3 else image[:3] if len(image) > 3 else image[:1].expand(3, -1, -1)
    return channels.permute(1, 2, 0).numpy()


def coloured(values: Tensor) -> np.ndarray:
    """(H, W) in [0, 1] -> viridis."""
    import matplotlib

    return (matplotlib.colormaps["viridis"](values.numpy())[..., :3] * 255).round().astype(np.uint8)


def overlaid(image: np.ndarray, values: Tensor) -> np.ndarray:
    """The coloured map over the image, which is dimmed where little attention falls."""
    weight = OVERLAY * (0.45 + 0.55 * values.numpy()[..., None])
    return (image * (1 - weight) + coloured(values) * weight).round().astype(np.uint8)


def masked(image: np.ndarray, mask: Tensor) -> np.ndarray:
    """The image inside the mask, and dimmed to gray outside, with the mask's border drawn."""
    inside = mask.numpy()
    gray = image.mean(axis=2, keepdims=True) * DIMMED
    picture = np.where(inside[..., None], image, gray).astype(np.uint8)
    edge = np.zeros_like(inside)
    edge[:-1] |= inside[:-1] != inside[1:]
    edge[:, :-1] |= inside[:, :-1] != inside[:, 1:]
    picture[edge] = (253, 231, 37)
    return picture


def pictures(
    image: Tensor, attention: Tensor, threshold: float | None = None, smooth: bool = True, side: int | None = None
) -> dict[str, np.ndarray]:
    """The pictures of one image (C, H, W) uint8 under one map (h, w): "map", "overlay" and, with a threshold, "mask".

    side: shorter side of the pictures in pixels, where the image is to be enlarged for print.
    """
    size = tuple(image.shape[-2:])
    if side is not None and side != min(size):
        size = tuple(round(s * side / min(size)) for s in size)
        image = resize(image[None], *size)[0]
    values = enlarge(scaled(attention), size, smooth)
    shown = displayable(image)
    result = {"image": shown, "map": coloured(values), "overlay": overlaid(shown, values)}
    if threshold is not None:
        result["mask"] = masked(shown, enlarge(mass_mask(attention, threshold).float(), size, smooth=False) > 0.5)
    return result


# ---- grids ----------------------------------------------------------------------------------------------------------


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
    """The text as an image no wider than `width`, smaller and then cut where it must be."""
    while (image := _text(text, size, bold)).width > width and size > 9:
        size -= 1
    while image.width > width and len(text) > 2:
        text = text[:-2] + "…"
        image = _text(text, size, bold)
    return image


def grid(
    rows: Sequence[Sequence[np.ndarray]], columns: Sequence[str], groups: Sequence[tuple[str, int]] = ()
) -> np.ndarray:
    """Equal pictures in rows under column titles, with a line of group titles (text, number of columns) above them."""
    from PIL import Image

    height, width = rows[0][0].shape[:2]
    font = max(11, round(width / 14))
    line = round(1.9 * font)
    head = line * (2 if groups else 1)
    # a wider gap where a new group begins
    starts, group_starts = [], set(np.cumsum([count for _, count in groups])[:-1].tolist()) if groups else set()
    x = GAP
    for column in range(len(columns)):
        x += 3 * GAP if column in group_starts else 0
        starts.append(x)
        x += width + GAP
    canvas = Image.new("RGB", (x, head + len(rows) * (height + GAP)), "white")
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
    return np.asarray(canvas)


def save_png(picture: np.ndarray, path: str | Path) -> None:
    """Write a picture (H, W, 3) uint8."""
    from PIL import Image

    Image.fromarray(picture).save(path)


def attention_figure(
    models: nn.Module | Mapping[str, nn.Module],
    images: Tensor,
    path: str | Path,
    *,
    threshold: float | None = None,
    smooth: bool = True,
    per_head: bool = False,
    side: int | None = None,
) -> Path:
    """Write one labelled PNG: a row per image, and per model its map, overlay and, with a threshold, mask.

    models: one, or several under the titles to print; images: uint8 (B, C, H, W). per_head adds the map of every head
    of a model with several. side: pixels of a picture's shorter side, by default at least 224.
    Raises ValueError where a model has no attention map.
    """
    named = {"": models} if isinstance(models, nn.Module) else dict(models)
    side = side or max(224, min(images.shape[-2:]))
    columns, groups = ["image"], [("", 1)]
    rows: list[list[np.ndarray]] = [[] for _ in images]
    for title, model in named.items():
        attention = attention_maps(model, images)  # (B, heads, h, w)
        heads = attention.shape[1]
        kinds = ["map", "overlay"] + (["mask"] if threshold is not None else [])
        titles = [*kinds]
        if heads > 1:
            titles[0] = f"mean of {heads} heads"
        if per_head and heads > 1:
            titles += [f"head {head + 1}" for head in range(heads)]
        columns, groups = columns + titles, [*groups, (title, len(titles))]
        for row, image, maps in zip(rows, images, attention, strict=True):
            shown = pictures(image, maps.mean(0), threshold, smooth, side)
            row.extend(([] if row else [shown["image"]]) + [shown[kind] for kind in kinds])
            if per_head and heads > 1:
                row.extend(pictures(image, one, None, smooth, side)["map"] for one in maps)
    path = Path(path)
    save_png(grid(rows, columns, groups if any(named) else ()), path)
    return path
