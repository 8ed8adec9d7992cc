"""Where a model looks: attention maps as arrays, and as pictures.

SimPool's map is the attention of its one query over all patches (or cells of the feature map); an official ViT's is the
attention of [CLS] in the last block, one map per head, shown as their mean or one by one. Maps are shown relative to
uniform attention, all on one scale from 0: a map stretched to its own minimum and maximum, as the published figures
are, makes an untrained model look as sure as a trained one. A mask at threshold t is the smallest set of patches that
holds t of the attention.

Letters: B images, C channels, H x W pixels, h x w patches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.augment import as_batch, resize
from data.loader import normalize
from evaluation.features import eval_mode

OVERLAY = 0.85  # weight of the map's colour at the largest attention; without attention the image is untouched
LEAST_TOP = 4.0  # times uniform attention
DIMMED = 0.2  # brightness that is left outside a mask


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

    [CLS] attention is renormalised over the patches. Raises ValueError, from the model, if it has no attention map.
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
    ordered, order = flat.sort(dim=-1, descending=True, stable=True)  # of equal ones the first
    before = ordered.cumsum(-1) - ordered  # what the patches before hold
    kept = before < threshold * flat.sum(-1, keepdim=True) * (1 - 1e-6)
    return torch.zeros_like(kept).scatter_(-1, order, kept).view(attention.shape)


def stretched(attention: Tensor) -> Tensor:
    """Each map (..., h, w) stretched to [0, 1] by its own minimum and maximum; a flat one becomes 0."""
    low = attention.amin((-2, -1), keepdim=True)
    span = attention.amax((-2, -1), keepdim=True) - low
    return (attention - low) / span.clamp_min(1e-12)


def relative(attention: Tensor) -> Tensor:
    """Maps (..., h, w) that sum to 1, as multiples of uniform attention."""
    return attention * attention.shape[-2] * attention.shape[-1]


def common_top(attention: Sequence[Tensor]) -> float:
    """The multiple of uniform attention that ends the scale of several maps: what 99.5 % of their patches reach.

    At least LEAST_TOP, so that maps that are nearly uniform look nearly uniform.
    """
    values = torch.cat([relative(maps).flatten() for maps in attention])
    if not len(values):
        return LEAST_TOP
    number = max(1, math.ceil(0.995 * len(values)))
    return max(LEAST_TOP, values.kthvalue(number).values.item())


def displayed(attention: Tensor, top: float | None) -> Tensor:
    """Maps (..., h, w) in [0, 1]: from 0 to `top` times uniform attention, or, with None, each one stretched."""
    return stretched(attention) if top is None else (relative(attention) / top).clamp(0, 1)


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
    """The coloured map over the image, in proportion to the attention; without any, the image is as it was."""
    weight = OVERLAY * values.numpy()[..., None]
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
    image: Tensor, attention: Tensor, threshold: float | None = None, smooth: bool = True, side: int | None = None,
    top: float | None = LEAST_TOP,
) -> dict[str, np.ndarray]:  # fmt: skip
    """The pictures of one image (C, H, W) uint8 under one map (h, w): "map", "overlay" and, with a threshold, "mask".

    side: shorter side of the pictures in pixels, if the image is to be enlarged; top: of the scale, see `displayed`.
    """
    size = tuple(image.shape[-2:])
    if side is not None and side != min(size):
        size = tuple(round(s * side / min(size)) for s in size)
        image = resize(image[None], *size)[0]
    values = enlarge(displayed(attention, top), size, smooth)
    shown = displayable(image)
    result = {"image": shown, "map": coloured(values), "overlay": overlaid(shown, values)}
    if threshold is not None:
        result["mask"] = masked(shown, enlarge(mass_mask(attention, threshold).float(), size, smooth=False) > 0.5)
    return result
