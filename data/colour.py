"""Colour, on the device that trains: whole batches of uint8 crops become normalised floats.

Colour jitter in each crop's own order, grayscale, Gaussian blur, solarize, normalise, with one row of parameters per
crop. Every operation is a few tensor passes over many crops, on CPU, CUDA and MPS alike; none loops over images.
In between, pixels are floats in [0, 255]: bringing them to [0, 1] is left to the normalisation, which scales anyway.

Departures from the published code (Pillow, one image at a time):
 - operations compute in float and don't round to 8 bits after each one;
 - the blur is a true Gaussian, cut at three standard deviations; Pillow's is three box blurs (mean difference 0.4/255).
Together they are not invisible: over 320 crops with the same parameters the mean difference from Pillow was 1.2 levels
of 255, and the largest 31, because rounding is amplified by the operations after it, hue and solarize above all.

Letters: N crops, C channels, H and W their sides, P parameters of a crop.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from runtime.guards import InputError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GRAY_WEIGHTS = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's "L"

WHITE = 255.0  # the largest value of a pixel between the operations

# Columns of the colour parameters. ORDER: the four jitter operations by number, in the order in which they run.
BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER, GRAY, SIGMA, SOLARIZE = 0, 1, 2, 3, slice(4, 8), 8, 9, 10
P = 11


def channel_statistics(in_chans: int, mean: Sequence[float] | None, std: Sequence[float] | None):
    """Mean and standard deviation per channel: those given, or ImageNet's."""
    if in_chans == 3:
        mean, std = mean or IMAGENET_MEAN, std or IMAGENET_STD
    else:
        mean = mean or [sum(IMAGENET_MEAN) / 3] * in_chans
        std = std or [sum(IMAGENET_STD) / 3] * in_chans
    if len(mean) != in_chans or len(std) != in_chans:
        raise InputError(f"{len(mean)} means and {len(std)} standard deviations given for {in_chans} channels")
    return tuple(mean), tuple(std)


# Elements handled at a time: on a CPU the float planes of a block stay in its cache, which makes each of the dozens of
# passes several times faster; on an accelerator blocks are large, so that launches don't count.
_BLOCK = {"cpu": 3 * 256 * 256}
_LARGE_BLOCK = 2**27
_NO_BLUR = 0.2  # below this sigma, in pixels, a neighbour weighs under 4e-6: no blur at all


def apply_colour(pixels: torch.Tensor, parameters: torch.Tensor, mean: Sequence[float], std: Sequence[float]):
    """(N, C, H, W) uint8 and (N, P) -> (N, C, H, W) float32: jitter, grayscale, blur, solarize, normalise.

    The crops are sorted by the order of their jitter operations, so that hue, the most expensive operation, runs
    once on each, on contiguous slices; brightness, contrast and saturation are one formula with three weights.
    """
    device = pixels.device
    out = torch.empty(pixels.shape, dtype=torch.float32, device=device)
    plan = _Plan(parameters.detach().cpu().numpy())
    table, rows = _to_device(plan.table, device), _to_device(plan.order, device)
    per_block = max(1, _BLOCK.get(device.type, _LARGE_BLOCK) // max(1, pixels[0].numel()))
    for start in range(0, len(pixels), per_block):
        block = slice(start, min(start + per_block, len(pixels)))
        # one crop is reached by a view, several by a copy
        one = int(plan.order[start]) if block.stop - start == 1 else None
        some = pixels.index_select(0, rows[block]) if one is None else pixels[one : one + 1]
        x = torch.empty(some.shape, device=device).copy_(some)
        x = _jitter(x, plan, block, table[block])
        x = _on_some(x, plan.gray[block], lambda part, _: grayscale(part))
        x = _on_some(x, plan.sigma[block] > _NO_BLUR, gaussian_blur, table[block, _Plan.SIGMA_COLUMN])
        x = _on_some(x, plan.solarize[block], lambda part, _: solarize(part))
        if one is None:
            out.index_copy_(0, rows[block], normalise(x, mean, std, x))
        else:
            normalise(x, mean, std, out[one : one + 1])
    return out


def normalise(x: torch.Tensor, mean: Sequence[float], std: Sequence[float], out: torch.Tensor) -> torch.Tensor:
    """Write (x / 255 - mean) / std per channel of (N, C, H, W) into `out`, which may be x itself."""
    for c, (m, s) in enumerate(zip(mean, std, strict=True)):
        torch.add(x.new_full((), -m / s), x[:, c], alpha=1 / (WHITE * s), out=out[:, c])
    return out


class _Plan:
    """The parameters of N crops, sorted for `apply_colour`, on the host.

    order: (N,) the sorted crops; hue_after: (N,) how many of the other three jitter operations run before hue, 3 at
    most, and 4 for crops without a hue shift; operation: (N, 3) those three by number; table: (N, 11) float32, what
    the device needs: per round its factor, gray's weight and the mean gray's weight; then hue and sigma.
    """

    HUE_COLUMN, SIGMA_COLUMN = 9, 10

    def __init__(self, parameters: np.ndarray):
        operations = parameters[:, ORDER].astype(np.int64)
        others = operations[operations != HUE].reshape(-1, 3)
        hue_after = np.where(parameters[:, HUE] == 0, 4, (operations == HUE).argmax(axis=1))
        self.order = np.lexsort((others[:, 2], others[:, 1], others[:, 0], hue_after))
        p = parameters[self.order]
        self.hue_after, self.operation = hue_after[self.order], others[self.order]
        self.factor = np.take_along_axis(p[:, :3], self.operation, axis=1)
        self.gray, self.sigma, self.solarize = p[:, GRAY] > 0, p[:, SIGMA], p[:, SOLARIZE] > 0
        self.table = np.zeros((len(p), 11), dtype=np.float32)
        self.table[:, 0:9:3] = self.factor
        self.table[:, 1:9:3] = (1 - self.factor) * (self.operation == SATURATION)
        self.table[:, 2:9:3] = (1 - self.factor) * (self.operation == CONTRAST)
        self.table[:, self.HUE_COLUMN], self.table[:, self.SIGMA_COLUMN] = p[:, HUE], p[:, SIGMA]


def _to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _on_some(x: torch.Tensor, chosen: np.ndarray, operation, values: torch.Tensor | None = None) -> torch.Tensor:
    """`operation(x, values)` on the chosen crops of a block."""
    if not chosen.any():
        return x
    if chosen.all():
        return operation(x, values)
    rows = _to_device(np.flatnonzero(chosen), x.device)
    part = operation(x.index_select(0, rows), None if values is None else values.index_select(0, rows))
    return x.index_copy_(0, rows, part)


def _jitter(x: torch.Tensor, plan: _Plan, block: slice, table: torch.Tensor) -> torch.Tensor:
    """The four jitter operations, each crop in its own order: hue slices between rounds of the other three."""
    hue_after = plan.hue_after[block]
    for position in range(4):
        low, high = np.searchsorted(hue_after, [position, position + 1])
        if low < high:
            shift_hue_(x[low:high], table[low:high, _Plan.HUE_COLUMN])
        if position < 3 and (plan.factor[block, position] != 1).any():
            kinds = set(plan.operation[block, position].tolist())
            blend_(x, table[:, 3 * position : 3 * position + 3], kinds)
            if (plan.factor[block, position] > 1).any():  # else every value lies between two values in range
                x.clamp_(0, WHITE)
    return x


def blend_(x: torch.Tensor, weights: torch.Tensor, kinds: set[int]) -> torch.Tensor:
    """In place: f x + s gray(x) + c mean(gray(x)) with weights (f, s, c) per crop, (N, 3); to be clamped.

    Brightness is (f, 0, 0), saturation (f, 1 - f, 0), contrast (f, 0, 1 - f). kinds: which of them occur.
    """
    factor, gray_weight, mean_weight = (w.view(-1, 1, 1, 1) for w in weights.unbind(1))
    anchor = None
    if CONTRAST in kinds or SATURATION in kinds:
        gray = luminance(x)
        if CONTRAST in kinds:
            anchor = gray.mean(dim=(2, 3), keepdim=True) * mean_weight
        if SATURATION in kinds:
            anchor = gray.mul_(gray_weight) if anchor is None else gray.mul_(gray_weight).add_(anchor)
    x.mul_(factor)
    return x if anchor is None else x.add_(anchor)


def luminance(x: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) -> (N, 1, H, W): ITU-R 601 luma of RGB, the plain mean of any other number of channels."""
    if x.shape[1] != 3:
        return x.mean(dim=1, keepdim=True)
    gray = x[:, 0:1] * GRAY_WEIGHTS[0]
    return gray.add_(x[:, 1:2], alpha=GRAY_WEIGHTS[1]).add_(x[:, 2:3], alpha=GRAY_WEIGHTS[2])


def grayscale(x: torch.Tensor) -> torch.Tensor:
    """RGB (N, 3, H, W) -> its luma in all three channels."""
    return luminance(x).expand_as(x).contiguous()


def shift_hue_(x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """In place: turn the hue of RGB (N, 3, H, W) by `shift` (N,) parts of the circle, keeping HSV's S and V.

    Branches are written as arithmetic on 0/1 masks, and planes are used again: on a CPU four times as fast as with
    `torch.where`, and exact all the same.
    """
    r, g, b = x.unbind(1)
    high, low = torch.maximum(g, b), torch.minimum(g, b)
    g_below_b, r_below = torch.lt(g, b, out=torch.empty_like(high)), torch.lt(r, high, out=torch.empty_like(high))
    chroma, mid = torch.maximum(r, high), torch.minimum(r, high)  # chroma holds the value (the largest channel) so far
    # hue in sextants from red: |K + (mid - low) / chroma|, K = 0, -6 (g < b), -2 (r < high) or 4 (both)
    hue = torch.sub(mid, low)
    torch.minimum(mid, low, out=low)
    chroma.sub_(low)
    hue.div_(torch.clamp(chroma, min=1e-9, out=high))
    hue.sub_(g_below_b, alpha=6.0).addcmul_(r_below, g_below_b, value=12.0).sub_(r_below, alpha=2.0).abs_()
    hue.add_(6.0 * shift.view(-1, 1, 1))
    hue.sub_(torch.mul(hue, 1 / 6, out=high).floor_(), alpha=6.0)  # back into [0, 6)
    # A channel is low + chroma * w, where w rises and falls with the distance d = clamp(., 1, 2) of the hue:
    # w = d - 1 counted from cyan for r, w = 2 - d counted from the channel's own hue for g and b.
    near_low, near_high = torch.sub(low, chroma, out=high), torch.add(low, chroma, alpha=2.0, out=r_below)
    for channel, centre, base, sign in ((r, 3.0, near_low, 1.0), (g, 2.0, near_high, -1.0), (b, 4.0, near_high, -1.0)):
        d = torch.sub(hue, centre, out=mid).abs_().clamp_(1, 2)
        torch.addcmul(base, chroma, d, value=sign, out=channel)
    return x


def solarize(x: torch.Tensor) -> torch.Tensor:
    """Invert what 8 bits would round to 128 or more."""
    bright = torch.ge(x, WHITE / 2, out=torch.empty_like(x))
    return x.addcmul(bright, WHITE - 2 * x)


def gaussian_blur(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Gaussian blur of (N, C, H, W) with its own sigma (N,), in pixels, at most 2; edges are repeated outward.

    Each axis is a product with banded matrices, one per crop, tile by tile: the fastest of five forms on a CPU
    (docs/performance.md), and batched products on an accelerator.
    """
    n, c, height, width = x.shape
    radius = _BLUR_RADIUS
    taps = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (taps / sigma.view(-1, 1)).square())
    # far taps of a narrow kernel are subnormal numbers, which slow a processor's products down tenfold
    kernel = torch.where(kernel < 1e-8, 0.0, kernel)
    kernel = kernel / kernel.sum(dim=1, keepdim=True)  # (N, taps)
    padded = F.pad(x, (radius,) * 4, mode="replicate")
    tall, tile = height + 2 * radius, _tile(width)
    band = _band(kernel, tile)
    columns = padded.unfold(3, tile + 2 * radius, tile).reshape(n, -1, tile + 2 * radius)
    y = torch.matmul(columns, band).view(n, c, tall, width)
    if height != width:
        tile = _tile(height)
        band = _band(kernel, tile)
    s = y.stride()
    rows = y.as_strided((n, c, height // tile, tile + 2 * radius, width), (s[0], s[1], tile * s[2], s[2], s[3]))
    return torch.matmul(band.transpose(1, 2)[:, None, None], rows).reshape(n, c, height, width)


_BLUR_RADIUS = 6  # three times the largest sigma


def _tile(side: int) -> int:
    """Outputs of one banded product: the largest divisor of the side up to 32, or the side if all are small."""
    tile = max(t for t in range(1, min(side, 32) + 1) if side % t == 0)
    return tile if tile >= 8 else side


def _band(kernel: torch.Tensor, tile: int) -> torch.Tensor:
    """(N, taps) -> (N, tile + taps - 1, tile): column j holds the kernel in rows j .. j + taps - 1."""
    n, taps = kernel.shape
    band = kernel.new_zeros(n, tile + taps - 1, tile)
    view = band.as_strided((n, tile, taps), (band.stride(0), tile + 1, tile))
    view.copy_(kernel[:, None, :].expand(n, tile, taps))
    return band
