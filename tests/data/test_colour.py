"""Colour operations on batches, against Pillow's and torchvision's on real photographs."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import functional as TF

from data import colour
from data.augment import ColourStage, CropSpec
from data.colour import (
    BRIGHTNESS,
    CONTRAST,
    GRAY,
    HUE,
    IMAGENET_MEAN,
    IMAGENET_STD,
    ORDER,
    SATURATION,
    SIGMA,
    SOLARIZE,
    P,
    apply_colour,
)

LEVEL = 1 / 255


@pytest.fixture(scope="module")
def photographs(imagenet_sample):
    """Real crops (6, 3, 64, 96) uint8."""
    files = sorted(imagenet_sample.rglob("*.[jJ]*"))[:6]
    crops = [Image.open(f).convert("RGB").resize((128, 96)).crop((8, 8, 104, 72)) for f in files]
    return torch.from_numpy(np.stack([np.asarray(c) for c in crops])).permute(0, 3, 1, 2)


def neutral(n):
    """Parameters of n crops that change nothing."""
    parameters = torch.zeros(n, P)
    parameters[:, :3] = 1
    parameters[:, ORDER] = torch.arange(4.0)
    return parameters


def ours(pixels, parameters):
    """Colours without the normalisation, (N, C, H, W) in [0, 1]."""
    return apply_colour(pixels, parameters, (0,) * pixels.shape[1], (1,) * pixels.shape[1])


def pillow(pixels, operation):
    """`operation` of Pillow on each crop, (N, C, H, W) in [0, 1]."""
    images = [operation(Image.fromarray(p.permute(1, 2, 0).numpy()), i) for i, p in enumerate(pixels)]
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 255


def test_neutral_parameters_only_normalise(photographs):
    """Without jitter, gray, blur and solarize a crop is torchvision's to_tensor and normalize."""
    ours_ = apply_colour(photographs, neutral(6), IMAGENET_MEAN, IMAGENET_STD)
    theirs = TF.normalize(photographs / 255, IMAGENET_MEAN, IMAGENET_STD)
    torch.testing.assert_close(ours_, theirs, rtol=1e-5, atol=1e-5)


def test_training_crops_are_normalised_as_torchvisions_models_want_it(photographs):
    """The stage's own mean and deviation are ImageNet's, channel by channel."""
    from torchvision.models import ResNet50_Weights

    wanted = ResNet50_Weights.IMAGENET1K_V1.transforms()
    (ours_,) = ColourStage(CropSpec(local_number=0))(
        [photographs.unflatten(0, (2, 3))], [neutral(6).unflatten(0, (2, 3))]
    )
    theirs = TF.normalize(photographs / 255, wanted.mean, wanted.std)
    torch.testing.assert_close(ours_, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("column", "operation", "values", "levels"),
    [
        (BRIGHTNESS, TF.adjust_brightness, (0.6, 0.8, 1.0, 1.1, 1.3, 1.4), 1.0),
        (CONTRAST, TF.adjust_contrast, (0.6, 0.8, 1.0, 1.1, 1.3, 1.4), 1.6),
        (SATURATION, TF.adjust_saturation, (0.8, 0.9, 1.0, 1.05, 1.1, 1.2), 1.6),
    ],
)
def test_blends_match_pillow_within_its_rounding(photographs, column, operation, values, levels):
    """Brightness, contrast and saturation, each crop with its own factor, are Pillow's up to its rounding to 8 bits."""
    parameters = neutral(6)
    parameters[:, column] = torch.tensor(values)
    difference = ours(photographs, parameters) - pillow(photographs, lambda image, i: operation(image, values[i]))
    assert difference.abs().max() <= levels * LEVEL


def test_hue_matches_torchvision(photographs):
    """A turn of hue is torchvision's float one exactly, and Pillow's 8-bit one within its coarse hue steps."""
    shifts = (-0.1, -0.04, 0.0, 0.03, 0.07, 0.1)
    parameters = neutral(6)
    parameters[:, HUE] = torch.tensor(shifts)
    result = ours(photographs, parameters)
    exact = torch.stack([TF.adjust_hue(p / 255, s) for p, s in zip(photographs, shifts, strict=True)])
    torch.testing.assert_close(result, exact, rtol=0, atol=2e-5)
    coarse = pillow(photographs, lambda image, i: TF.adjust_hue(image, shifts[i]))
    assert (result - coarse).abs().mean() < 1.5 * LEVEL


def test_hue_of_corner_colours():
    """Black, white, grays, primaries and ties turn as torchvision turns them, without a NaN."""
    levels = torch.tensor([0, 1, 127, 254, 255], dtype=torch.uint8)
    corners = torch.cartesian_prod(levels, levels, levels).T.reshape(3, 5, 25)
    for shift in (-0.1, 0.05, 0.1):
        parameters = neutral(1)
        parameters[:, HUE] = shift
        result = ours(corners[None], parameters)[0]
        torch.testing.assert_close(result, TF.adjust_hue(corners / 255, shift), rtol=0, atol=2e-5)


def test_jitter_runs_in_each_crops_own_order(photographs):
    """All 24 orders: the result is the four operations one after the other in that order."""
    operations = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    orders = torch.cartesian_prod(*[torch.arange(4)] * 4)
    orders = orders[[len(set(o.tolist())) == 4 for o in orders]]
    pixels = photographs[:1].expand(24, -1, -1, -1)
    factors = (1.3, 0.7, 1.2, 0.08)
    parameters = neutral(24)
    parameters[:, :4] = torch.tensor(factors)
    parameters[:, ORDER] = orders.float()
    result = ours(pixels, parameters)
    assert len(orders) == 24
    for order, crop in zip(orders.tolist(), result, strict=True):
        expected = pixels[0] / 255
        for operation in order:
            expected = operations[operation](expected, factors[operation])
        # torchvision's float contrast takes its mean from the same gray weights, rounded to four digits
        torch.testing.assert_close(crop, expected, rtol=0, atol=2e-3)


def test_gray_and_solarize_touch_only_the_chosen_crops(photographs):
    """Grayscale and solarize are Pillow's on the crops that drew them; the others stay as they are."""
    parameters = neutral(6)
    parameters[[1, 4], GRAY] = 1
    parameters[[2, 4], SOLARIZE] = 1

    def expected(image, i):
        image = ImageOps.grayscale(image).convert("RGB") if i in (1, 4) else image
        return ImageOps.solarize(image) if i in (2, 4) else image

    difference = (ours(photographs, parameters) - pillow(photographs, expected)).abs()
    assert difference[[0, 3, 5]].max() < 1e-6
    assert difference[[1, 2]].max() <= 1.01 * LEVEL
    assert (difference[4] > 1.01 * LEVEL).float().mean() < 1e-3  # rounding may fall on either side of 128


@pytest.mark.parametrize("size", [(64, 96), (50, 33), (13, 7), (224, 224), (1, 1)])
def test_blur_is_a_gaussian_of_each_crops_own_sigma(photographs, size):
    """Blur equals torchvision's Gaussian with repeated edges, at any side, with a sigma per crop."""
    sigmas = torch.tensor([0.25, 0.5, 0.8, 1.2, 1.6, 2.0])
    pixels = torch.nn.functional.interpolate(photographs, size)
    parameters = neutral(6)
    parameters[:, SIGMA] = sigmas
    result = ours(pixels, parameters)
    for crop, original, sigma in zip(result, pixels / 255, sigmas.tolist(), strict=True):
        padded = torch.nn.functional.pad(original[None], (6,) * 4, mode="replicate")
        blurred = TF.gaussian_blur(padded, [13, 13], [sigma, sigma])[0]
        torch.testing.assert_close(crop, blurred[:, 6 : 6 + size[0], 6 : 6 + size[1]], rtol=0, atol=1e-5)


def test_blur_is_close_to_pillows(photographs):
    """Pillow's blur, made of boxes, differs from the Gaussian by half a level on average."""
    parameters = neutral(6)
    parameters[:, SIGMA] = torch.tensor([0.3, 0.6, 1.0, 1.4, 1.7, 2.0])
    theirs = pillow(photographs, lambda im, i: im.filter(ImageFilter.GaussianBlur(float(parameters[i, SIGMA]))))
    assert (ours(photographs, parameters) - theirs).abs().mean() < 0.8 * LEVEL


def test_blocks_and_batches_do_not_change_a_crop(photographs, monkeypatch):
    """A crop's colours are the same alone, in a batch, and whatever the block size."""
    spec = CropSpec(global_size=32, local_size=16)
    generator = np.random.RandomState(0)
    from data.augment import _DRAWS, colour_parameters

    parameters = colour_parameters(generator.rand(6, 8, _DRAWS), spec)[0][0]
    whole = ours(photographs, parameters)
    alone = torch.cat([ours(photographs[i : i + 1], parameters[i : i + 1]) for i in range(6)])
    monkeypatch.setattr(colour, "_BLOCK", {"cpu": 1})
    single = ours(photographs, parameters)
    monkeypatch.setattr(colour, "_BLOCK", {})
    together = ours(photographs, parameters)
    for other in (alone, single, together):
        torch.testing.assert_close(other, whole, rtol=0, atol=3e-6)


def test_stage_returns_crops_view_by_view(photographs):
    """(V, B) crops come out as V * B rows: crop 0 of all images first."""
    stage = ColourStage(CropSpec(), mean=(0, 0, 0), std=(1, 1, 1))
    crops = photographs.reshape(2, 3, 3, 64, 96)
    (out,) = stage([crops], [neutral(6).view(2, 3, P)])
    torch.testing.assert_close(out, photographs / 255, rtol=0, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_cpus_colours(photographs):
    """The stage on CUDA equals the CPU's within float rounding."""
    from data.augment import _DRAWS, colour_parameters

    parameters = colour_parameters(np.random.RandomState(0).rand(6, 8, _DRAWS), CropSpec())[0][0]
    on_cuda = ours(photographs.cuda(), parameters).cpu()
    difference = (on_cuda - ours(photographs, parameters)).abs()
    assert (difference > 1e-3).float().mean() < 1e-4  # a solarized pixel may sit on the threshold
