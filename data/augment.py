"""Multi-crop augmentation in two stages: crops in the worker, colour on the training device.

The distribution is that of the published DINO and SimPool code: per crop RandomResizedCrop (bicubic), flip, colour
jitter in random order, grayscale, Gaussian blur, solarize, normalise. A worker does only what
touches the file: it decodes once and cuts every crop, antialiased, to uint8 (`MultiCrop`). Everything else runs
over whole batches on the device that trains, each crop with its own parameters (`ColourStage`). uint8 crops travel four
times cheaper than floats, and the worker's share is about an eighth of the published pipeline's.

Departures from the published code in the colours: see data/colour.py.
All randomness is a function of (seed, epoch, index): see data/draws.py.

Letters: B images, V views of one resolution, N = V * B crops, C channels, S side of a crop, P colour parameters.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence

import numpy as np
import torch

from data.colour import (
    BRIGHTNESS,
    CONTRAST,
    GRAY,
    HUE,
    ORDER,
    SATURATION,
    SIGMA,
    SOLARIZE,
    P,
    apply_colour,
    channel_statistics,
)
from data.decode import Picture
from data.draws import CROPS, uniforms
from runtime.guards import InputError

ASPECT_RATIOS = (3 / 4, 4 / 3)

_TRIES = 10  # boxes tried before RandomResizedCrop falls back on a central crop
_BOX_DRAWS = 2 * _TRIES + 3  # (scale, ratio) per try, top, left, flip
_COLOUR_DRAWS = 13  # jitter?, 4 factors, 4 ranks, gray?, blur?, sigma, solarize?
_DRAWS = _BOX_DRAWS + _COLOUR_DRAWS


@dataclasses.dataclass(frozen=True)
class CropSpec:
    """What to cut from each image and how to colour it. Sizes in pixels, scales in parts of the image's area.

    flip, jitter, gray: probabilities; blur, solarize: those for the first global crop, the second one, and the local
    crops. brightness, contrast, saturation: a factor is drawn from [1 - s, 1 + s], not below 0; hue: a turn from
    [-s, s], in turns. sigma: range of the blur's standard deviation in pixels.
    Raises `InputError` for a value that makes no sense, named by its flag.
    """

    global_size: int = 224
    local_size: int = 96
    global_scale: tuple[float, float] = (0.25, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.25)
    local_number: int = 6
    global_number: int = 2
    in_chans: int = 3
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    gray: float = 0.2
    blur: tuple[float, float, float] = (1.0, 0.1, 0.5)
    sigma: tuple[float, float] = (0.1, 2.0)
    solarize: tuple[float, float, float] = (0.0, 0.2, 0.0)

    def __post_init__(self):
        for flag, value in (("--global_crops_scale", self.global_scale), ("--local_crops_scale", self.local_scale)):
            _check_scale(flag, value)
        for flag, value in (("--img_size", self.global_size), ("--local_crops_size", self.local_size)):
            if value < 1:
                raise InputError(f"{flag} {value}: the side of a crop must be at least 1 pixel")
        if self.global_number not in (1, 2):
            raise InputError(f"--global_crops_number {self.global_number}: give 1 or 2")
        if self.local_number < 0:
            raise InputError(f"--local_crops_number {self.local_number}: give 0 or more")
        if self.in_chans < 1:
            raise InputError(f"--in_chans {self.in_chans}: an image has at least 1 channel")
        _check_probabilities("--blur_prob", self.blur)
        _check_probabilities("--solarize_prob", self.solarize)
        _check_probabilities("--jitter_prob", (self.jitter,))
        _check_probabilities("--gray_prob", (self.gray,))
        _check_strengths((self.brightness, self.contrast, self.saturation, self.hue))

    @property
    def resolutions(self) -> list[tuple[int, int]]:
        """(views, side) of each resolution: the global crops, then the local ones, if any."""
        local = [(self.local_number, self.local_size)] if self.local_number else []
        return [(self.global_number, self.global_size), *local]

    def left_out(self) -> str | None:
        """The colour operations that make no sense for this number of channels, as a message, or None."""
        if self.in_chans == 3:
            return None
        return (
            f"with {self.in_chans} channels the augmentation leaves out saturation, hue and grayscale, which need RGB; "
            "brightness, contrast, blur and solarize stay"
        )


def _check_scale(flag: str, scale: Sequence[float]) -> None:
    if len(scale) != 2 or not all(0 < s <= 1 for s in scale):
        given = " ".join(str(s) for s in scale)
        raise InputError(f"{flag} {given}: give two parts of the image's area, each above 0 and at most 1")
    if scale[0] > scale[1]:
        raise InputError(f"{flag} {scale[0]} {scale[1]}: the smaller one comes first: {flag} {scale[1]} {scale[0]}")


def _check_probabilities(flag: str, values: Sequence[float]) -> None:
    wrong = [value for value in values if not 0 <= value <= 1]
    if wrong:
        raise InputError(f"{flag} {wrong[0]}: a probability is from 0 to 1")


def _check_strengths(strengths: tuple[float, float, float, float]) -> None:
    if not all(0 <= strength < math.inf for strength in strengths) or strengths[-1] > 0.5:
        given = " ".join(str(strength) for strength in strengths)
        raise InputError(
            f"--jitter {given}: give the strengths of brightness, contrast, saturation and hue, each 0 or more; that "
            "of hue is at most 0.5, half a turn"
        )


# ---- in the worker: boxes and crops ----


class MultiCrop:
    """Cuts the crops of one image, and draws the parameters of their colours."""

    def __init__(self, spec: CropSpec):
        self.spec = spec
        self.views = spec.global_number + spec.local_number

    def draws(self, seed: int, epoch: int, index: int) -> np.ndarray:
        """All random numbers of one image, (V, draws) float64, global crops first."""
        return uniforms(self.views * _DRAWS, seed, CROPS, epoch, index).reshape(self.views, _DRAWS)

    def cut(self, picture: Picture, draws: np.ndarray, out: Sequence[torch.Tensor]) -> None:
        """Cut all crops into `out`, V uint8 tensors (C, S, S), global ones first."""
        spec = self.spec
        scales = [spec.global_scale] * spec.global_number + [spec.local_scale] * spec.local_number
        rows = draws[:, :_BOX_DRAWS].tolist()
        boxes = [crop_box(row, scale, picture.height, picture.width) for row, scale in zip(rows, scales, strict=True)]
        pixels = picture.pixels(_shrink_for(boxes, out))
        ratio = pixels.shape[0] / picture.height, pixels.shape[1] / picture.width
        for row, box, target in zip(rows, boxes, out, strict=True):
            _cut_one(pixels, _scaled(box, ratio, pixels.shape), row[-1] < spec.flip, target)

    def __call__(self, image: np.ndarray, seed: int, epoch: int, index: int):
        """image (H, W, C) uint8 -> (crops, colour): per resolution uint8 (V, C, S, S) and float32 (V, P)."""
        draws = self.draws(seed, epoch, index)
        crops = [crop_memory(v, 1, self.spec.in_chans, s)[:, 0] for v, s in self.spec.resolutions]
        self.cut(Picture.from_array(image), draws, [crop for resolution in crops for crop in resolution])
        return crops, [c[:, 0] for c in colour_parameters(draws[None], self.spec)]


def crop_box(draws: Sequence[float], scale: Sequence[float], height: int, width: int) -> tuple[int, int, int, int]:
    """RandomResizedCrop's box (top, left, height, width) from uniform numbers, as torchvision draws it."""
    area = height * width
    low, high = math.log(ASPECT_RATIOS[0]), math.log(ASPECT_RATIOS[1])
    for t in range(_TRIES):
        target = area * (scale[0] + (scale[1] - scale[0]) * draws[2 * t])
        ratio = math.exp(low + (high - low) * draws[2 * t + 1])
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(draws[2 * _TRIES] * (height - h + 1)), int(draws[2 * _TRIES + 1] * (width - w + 1)), h, w
    # A long, thin image: its central part, cut to the nearest allowed ratio.
    h, w = height, width
    if width / height < ASPECT_RATIOS[0]:
        h = min(height, max(1, round(width / ASPECT_RATIOS[0])))
    elif width / height > ASPECT_RATIOS[1]:
        w = min(width, max(1, round(height * ASPECT_RATIOS[1])))
    return (height - h) // 2, (width - w) // 2, h, w


def _shrink_for(boxes, targets) -> int:
    """How much smaller a JPEG may be decoded (1, 2, 4, 8) so that every crop is still reduced by 2 or more after it.

    Photographs of many megapixels decode several times faster so; at ImageNet's sizes the answer is nearly always 1.
    """
    reduction = min(min(h, w) / max(target.shape[-2:]) for (_, _, h, w), target in zip(boxes, targets, strict=True))
    return max(s for s in (1, 2, 4, 8) if s == 1 or reduction >= 2 * s)


def _scaled(box, ratio: tuple[float, float], shape: torch.Size) -> tuple[int, int, int, int]:
    """The box in the pixels of an image that was decoded at `ratio` of its size."""
    if ratio == (1.0, 1.0):
        return box
    top, left, h, w = box
    top, left = round(top * ratio[0]), round(left * ratio[1])
    h, w = max(1, round(h * ratio[0])), max(1, round(w * ratio[1]))
    return min(top, shape[0] - h), min(left, shape[1] - w), h, w


def _cut_one(pixels: np.ndarray, box: tuple[int, int, int, int], flip: bool, out: torch.Tensor) -> None:
    top, left, h, w = box
    # torch's resize would make the part contiguous itself, a pixel at a time; numpy copies it row by row
    part = np.ascontiguousarray(pixels[top : top + h, left : left + w])
    crop = resize(as_batch(part), out.shape[-2], out.shape[-1])[0]
    out.copy_(crop.flip(-1) if flip else crop)


def as_batch(pixels: np.ndarray) -> torch.Tensor:
    """(H, W, C) uint8 -> (1, C, H, W) over the same memory, strided so that torch's resize copies least."""
    writeable = pixels if pixels.flags.writeable else pixels.copy()  # torch has no read-only tensors
    return torch.from_numpy(writeable).unsqueeze(0).permute(0, 3, 1, 2)


def resize(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(1, C, H, W) uint8 -> (1, C, height, width) uint8, antialiased bicubic, Pillow's filter."""
    if image.shape[-2:] == (height, width):
        return image
    # what F.interpolate ends up calling, without its forty lines of Python for each crop
    return torch.ops.aten._upsample_bicubic2d_aa(image, (height, width), False)


def crop_memory(views: int, count: int, channels: int, side: int, shared: bool = False) -> torch.Tensor:
    """Room for uint8 crops, (V, B, C, S, S), channels last in memory, as torch's resize leaves them."""
    shape = (views, count, side, side, channels)
    memory = torch.empty(0, dtype=torch.uint8)
    if shared:  # made so at once: share_memory_() would copy what is not there yet
        memory = memory.set_(torch.UntypedStorage._new_shared(math.prod(shape)))
    return memory.resize_(shape).permute(0, 1, 4, 2, 3)


# ---- colour parameters ----


def colour_parameters(draws: np.ndarray, spec: CropSpec) -> list[torch.Tensor]:
    """Colour parameters of a batch from its random numbers (B, V, draws): float32 (V, B, P) per resolution.

    A crop without jitter has factors 1 and hue 0; sigma 0 means no blur. Operations that the number of channels rules
    out (see `CropSpec.left_out`) are drawn as their identity.
    """
    u = draws[:, :, _BOX_DRAWS:].transpose(1, 0, 2)  # (V, B, 13)
    views = np.arange(u.shape[0])
    kind = np.where(views < spec.global_number, views, 2)[:, None]  # first global, second global, local
    rgb = spec.in_chans == 3
    out = np.zeros((*u.shape[:2], P), dtype=np.float32)
    jitter = u[..., 0] < spec.jitter
    for column, strength in ((BRIGHTNESS, spec.brightness), (CONTRAST, spec.contrast), (SATURATION, spec.saturation)):
        low, high = max(0.0, 1 - strength), 1 + strength
        out[..., column] = np.where(jitter, low + (high - low) * u[..., 1 + column], 1.0)
    out[..., HUE] = np.where(jitter, spec.hue * (2 * u[..., 4] - 1), 0.0)
    out[..., ORDER] = np.argsort(u[..., 5:9], axis=-1)
    out[..., GRAY] = u[..., 9] < spec.gray
    sigma = spec.sigma[0] + (spec.sigma[1] - spec.sigma[0]) * u[..., 11]
    out[..., SIGMA] = np.where(u[..., 10] < np.asarray(spec.blur)[kind], sigma, 0.0)
    out[..., SOLARIZE] = u[..., 12] < np.asarray(spec.solarize)[kind]
    if not rgb:
        out[..., SATURATION], out[..., HUE], out[..., GRAY] = 1.0, 0.0, 0.0
    stacked = torch.from_numpy(out)
    return list(stacked.split([views for views, _ in spec.resolutions]))


# ---- on the device


class ColourStage:
    """uint8 crops and their parameters -> normalised float crops, on whatever device the crops are.

    mean, std: per channel, for pixels in [0, 1]; ImageNet's by default (their averages if there are not 3 channels).
    The parameters are best left in host memory: they decide which crops an operation runs on, and reading them there
    spares the device a synchronisation.
    """

    def __init__(self, spec: CropSpec, mean: Sequence[float] | None = None, std: Sequence[float] | None = None):
        self.spec = spec
        self.mean, self.std = channel_statistics(spec.in_chans, mean, std)

    def __call__(self, crops: Sequence[torch.Tensor], colour: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Per resolution: (V, B, C, S, S) uint8 and (V, B, P) -> (V * B, C, S, S) float32, view by view."""
        return [
            apply_colour(pixels.flatten(0, 1), parameters.flatten(0, 1), self.mean, self.std)
            for pixels, parameters in zip(crops, colour, strict=True)
        ]


# ---- one image at a time, under DINO's names ----


class DataAugmentationDINO:
    """The whole augmentation of one PIL image: a list of 2 + n normalised float tensors (C, S, S).

    The per-image form for scripts written against DINO; training uses the two stages apart. Draws from torch's
    generator, so `torch.manual_seed` (and a DataLoader's worker seeds) decide.
    """

    def __init__(
        self,
        global_crops_scale: Sequence[float],
        local_crops_scale: Sequence[float],
        local_crops_number: int,
        global_crops_size: int = 224,
        local_crops_size: int = 96,
    ):
        self.spec = CropSpec(
            global_crops_size,
            local_crops_size,
            tuple(global_crops_scale),
            tuple(local_crops_scale),
            local_crops_number,
        )
        self._cut, self._colour = MultiCrop(self.spec), ColourStage(self.spec)

    def __call__(self, image) -> list[torch.Tensor]:
        seed = int(torch.randint(2**62, ()))
        crops, colour = self._cut(np.array(image.convert("RGB")), seed, 0, 0)
        floats = self._colour([c[:, None] for c in crops], [c[:, None] for c in colour])
        return [crop for resolution in floats for crop in resolution]


class GaussianBlur:
    """PIL image -> PIL image, blurred with probability p and a radius drawn from [radius_min, radius_max]."""

    def __init__(self, p: float = 0.5, radius_min: float = 0.1, radius_max: float = 2.0):
        self.prob, self.radius_min, self.radius_max = p, radius_min, radius_max

    def __call__(self, image):
        from PIL import ImageFilter

        if random.random() > self.prob:
            return image
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(self.radius_min, self.radius_max)))


class Solarization:
    """PIL image -> PIL image, values of 128 and more inverted, with probability p."""

    def __init__(self, p: float):
        self.p = p

    def __call__(self, image):
        from PIL import ImageOps

        return ImageOps.solarize(image) if random.random() < self.p else image
