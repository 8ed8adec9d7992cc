"""Crops and the parameters of their colours: what is drawn, what is cut, and the distribution of the whole."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.augmentation import PublishedAugmentation
from data.augment import (
    _BOX_DRAWS,
    _DRAWS,
    ColourStage,
    CropSpec,
    DataAugmentationDINO,
    GaussianBlur,
    MultiCrop,
    Solarization,
    colour_parameters,
    crop_box,
)
from data.colour import BRIGHTNESS, CONTRAST, GRAY, HUE, ORDER, SATURATION, SIGMA, SOLARIZE
from data.decode import Picture, decode
from runtime.guards import InputError

SMALL = CropSpec(global_size=64, local_size=32, local_number=2)


@pytest.fixture(scope="module")
def files(imagenet_sample):
    return sorted(imagenet_sample.rglob("*.[jJ]*"))


@pytest.fixture(scope="module")
def image(files):
    return decode(files[2].read_bytes())


def test_crops_depend_on_seed_epoch_and_index_only(image):
    """Equal (seed, epoch, index) give equal crops and parameters; any other value gives others."""
    cut = MultiCrop(SMALL)
    crops, colour = cut(image, 1, 2, 3)
    again, colour_again = MultiCrop(SMALL)(image, 1, 2, 3)
    assert all(torch.equal(a, b) for a, b in zip(crops + colour, again + colour_again, strict=True))
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert not torch.equal(cut(image, *other)[0][0], crops[0])


def test_shapes_and_no_local_crops(image):
    """Two global and n local crops of the given sides; without local ones there is one resolution."""
    crops, colour = MultiCrop(SMALL)(image, 0, 0, 0)
    assert [tuple(c.shape) for c in crops] == [(2, 3, 64, 64), (2, 3, 32, 32)]
    assert [len(c) for c in colour] == [2, 2]
    crops, colour = MultiCrop(CropSpec(64, 32, local_number=0))(image, 0, 0, 0)
    assert [tuple(c.shape) for c in crops] == [(2, 3, 64, 64)]
    assert len(colour) == 1


@pytest.mark.parametrize(("height", "width"), [(375, 500), (1200, 300), (20, 31), (1, 9)])
def test_boxes_lie_in_the_image_and_have_torchvisions_distribution(height, width):
    """Boxes lie inside; the mean area, ratio and place are those of torchvision's RandomResizedCrop."""
    from torchvision.transforms import RandomResizedCrop

    scale, ratio = (0.25, 1.0), (3 / 4, 4 / 3)
    draws = np.random.RandomState(0).rand(3000, _BOX_DRAWS).tolist()
    ours = np.array([crop_box(row, scale, height, width) for row in draws], dtype=float)
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 2:] >= 1).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()
    torch.manual_seed(0)
    blank = torch.empty(1, height, width)
    theirs = np.array([RandomResizedCrop.get_params(blank, scale, ratio) for _ in range(3000)], dtype=float)
    for a, b in zip(ours.T, theirs.T, strict=True):
        assert abs(a.mean() - b.mean()) <= 4 * np.hypot(a.std(), b.std()) / np.sqrt(3000) + 1e-9
        assert abs(a.std() - b.std()) <= 0.15 * b.std() + 1e-9


def test_crop_is_pillows_resize_of_its_box(image):
    """A cut crop is Pillow's antialiased bicubic resize of the same box, flipped if a flip was drawn."""
    cut = MultiCrop(SMALL)
    for index in range(6):
        draws = cut.draws(0, 0, index)
        crops, _ = cut(image, 0, 0, index)
        for view, crop in enumerate([*crops[0], *crops[1]]):
            scale = SMALL.global_scale if view < 2 else SMALL.local_scale
            top, left, h, w = crop_box(draws[view].tolist(), scale, *image.shape[:2])
            size = crop.shape[-2:]
            box = Image.fromarray(image[top : top + h, left : left + w]).resize(size, Image.Resampling.BICUBIC)
            expected = np.asarray(box)[:, ::-1] if draws[view, _BOX_DRAWS - 1] < SMALL.flip else np.asarray(box)
            difference = abs(crop.permute(1, 2, 0).numpy().astype(int) - expected.astype(int))
            assert difference.mean() < 0.1
            assert difference.max() <= 8


def test_images_smaller_than_a_crop_work():
    """A 5 x 3 image is enlarged to every crop."""
    crops, _ = MultiCrop(SMALL)(np.full((5, 3, 3), 200, np.uint8), 0, 0, 0)
    assert all((c == 200).all() for c in crops)


def test_big_jpegs_are_decoded_smaller_with_the_same_crops(files):
    """A large JPEG decoded at a fraction gives nearly the crops of its full decoding."""
    import io

    big = Image.open(files[0]).convert("RGB").resize((2400, 1800), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    big.save(buffer, "JPEG", quality=95)
    picture, cut = Picture(buffer.getvalue()), MultiCrop(SMALL)
    decoded = picture.pixels(4)
    assert decoded.shape[0] < 1800
    fast, full = ([torch.empty(v, 3, s, s, dtype=torch.uint8) for v, s in SMALL.resolutions] for _ in range(2))
    whole = Picture.from_array(decode(buffer.getvalue()))
    for source, out in ((Picture(buffer.getvalue()), fast), (whole, full)):
        cut.cut(source, cut.draws(0, 0, 0), [crop for resolution in out for crop in resolution])
    for a, b in zip(fast, full, strict=True):
        assert (a.float() - b.float()).abs().mean() < 2


def test_colour_parameters_have_the_published_probabilities():
    """Means and ranges of every parameter, per kind of crop, are those of the published augmentation."""
    spec = CropSpec(local_number=1)
    first, second, local = torch.cat(colour_parameters(np.random.RandomState(0).rand(20_000, 3, _DRAWS), spec))
    for view, blur, solarize in ((first, 1.0, 0.0), (second, 0.1, 0.2), (local, 0.5, 0.0)):
        jittered = view[:, BRIGHTNESS] != 1
        assert jittered.float().mean() == pytest.approx(0.8, abs=0.012)
        assert (view[~jittered, HUE] == 0).all()
        for column, low, high in (
            (BRIGHTNESS, 0.6, 1.4),
            (CONTRAST, 0.6, 1.4),
            (SATURATION, 0.8, 1.2),
            (HUE, -0.1, 0.1),
        ):
            values = view[jittered, column]
            assert low <= values.min()
            assert values.max() <= high
            assert values.std() == pytest.approx((high - low) / 12**0.5, rel=0.03)
        assert view[:, GRAY].mean() == pytest.approx(0.2, abs=0.012)
        assert (view[:, SIGMA] > 0).float().mean() == pytest.approx(blur, abs=0.012)
        sigma = view[view[:, SIGMA] > 0, SIGMA]
        assert sigma.min() >= 0.1
        assert sigma.max() <= 2
        assert sigma.mean() == pytest.approx(1.05, abs=0.05)
        assert view[:, SOLARIZE].mean() == pytest.approx(solarize, abs=0.012)
        code = view[:, ORDER] @ torch.tensor([64.0, 16, 4, 1])
        counts = torch.unique(code, return_counts=True)[1]
        assert len(counts) == 24
        assert counts.min() > 0.8 * 20_000 / 24


def statistics(views):
    """Per view: mean, contrast, colourfulness, sharpness and part of inverted-looking pixels, averaged over images."""
    rows = []
    for x in views:
        gray = x.mean(dim=1)
        sharp = (gray[:, :, 1:] - gray[:, :, :-1]).abs().mean()
        rows.append([x.mean(), x.std(dim=(2, 3)).mean(), (x[:, 0] - x[:, 2]).abs().mean(), sharp])
    return torch.tensor(rows)


@pytest.mark.parametrize("rounds", [6, pytest.param(60, marks=pytest.mark.full)])
def test_the_whole_has_the_published_distribution(files, rounds):
    """Mean, contrast, colourfulness and sharpness of each kind of crop equal the published pipeline's."""
    torch.manual_seed(0)
    np.random.seed(0)
    published, cut, stage = PublishedAugmentation(SMALL), MultiCrop(SMALL), ColourStage(SMALL)
    images = [Image.open(f).convert("RGB") for f in files[:48]]
    theirs, ours = [], []
    for epoch in range(rounds):
        samples = [published(i) for i in images]
        theirs.append(statistics([torch.stack(crops) for crops in zip(*samples, strict=True)]))
        cropped = [cut(np.asarray(i), 0, epoch, n) for n, i in enumerate(images)]
        crops = [torch.stack(c, dim=1) for c in zip(*[c for c, _ in cropped], strict=True)]
        colours = [torch.stack(c, dim=1) for c in zip(*[c for _, c in cropped], strict=True)]
        ours.append(statistics([v for out in stage(crops, colours) for v in out.chunk(2)]))
    a, b = torch.stack(ours), torch.stack(theirs)
    error = (a.std(dim=0).square() + b.std(dim=0).square()).sqrt() / rounds**0.5
    assert ((a.mean(dim=0) - b.mean(dim=0)).abs() <= 4.5 * error + 0.01).all()


def test_per_image_form_gives_normalised_crops(files):
    """DataAugmentationDINO: PIL in, 2 + n float tensors out, another result each time, the same after a seed."""
    augment = DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), 3)
    image = Image.open(files[0])
    torch.manual_seed(1)
    first, second = augment(image), augment(image)
    torch.manual_seed(1)
    again = augment(image)
    assert [tuple(c.shape) for c in first] == [(3, 224, 224)] * 2 + [(3, 96, 96)] * 3
    assert all(c.dtype == torch.float32 for c in first)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], second[0])


def test_pillow_operations_under_dinos_names(files):
    """GaussianBlur and Solarization work on PIL images, always at p = 1 and never at p = 0."""
    image = Image.open(files[0]).convert("RGB")
    assert GaussianBlur(p=0.0)(image) is image
    assert Solarization(0.0)(image) is image
    assert np.asarray(GaussianBlur(1.0, 1.5, 2.0)(image)).std() < np.asarray(image).std()
    assert np.asarray(Solarization(1.0)(image)).max() <= 128


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"global_scale": (0.0, 1.0)}, r"--global_crops_scale 0.0 1.0"),
        ({"local_scale": (0.1, 1.5)}, r"--local_crops_scale 0.1 1.5"),
        ({"global_scale": (0.9, 0.2)}, r"smaller one comes first: --global_crops_scale 0.2 0.9"),
        ({"local_number": -1}, r"--local_crops_number -1"),
        ({"local_size": 0}, r"--local_crops_size 0"),
        ({"in_chans": 0}, r"--in_chans 0"),
        ({"global_number": 3}, r"--global_crops_number 3"),
        ({"blur": (0.5, 1.5, 0.0)}, r"--blur_prob 1.5: a probability is from 0 to 1"),
        ({"solarize": (0.0, float("nan"), 0.0)}, r"--solarize_prob nan"),
        ({"jitter": -0.1}, r"--jitter_prob -0.1"),
        ({"gray": 2.0}, r"--gray_prob 2.0"),
        ({"contrast": -0.4}, r"--jitter 0.4 -0.4 0.2 0.1: give the strengths"),
        ({"brightness": float("inf")}, r"--jitter inf 0.4 0.2 0.1"),
        ({"hue": 0.6}, r"--jitter 0.4 0.4 0.2 0.6: .* hue is at most 0.5"),
    ],
)
def test_a_spec_without_sense_is_an_input_error(change, message):
    """Scales outside (0, 1], impossible counts, probabilities and strengths are refused by their flag."""
    with pytest.raises(InputError, match=message):
        CropSpec(**change)


@pytest.mark.parametrize(
    ("change", "columns"),
    [
        ({"blur": (0.0, 1.0, 0.3)}, {SIGMA}), ({"solarize": (0.0, 1.0, 0.0)}, {SOLARIZE}), ({"gray": 0.0}, {GRAY}),
        ({"jitter": 0.0}, {BRIGHTNESS, CONTRAST, SATURATION, HUE}), ({"hue": 0.5}, {HUE}),
        ({"contrast": 0.0}, {CONTRAST}),
    ],
)  # fmt: skip
def test_a_probability_changes_what_it_names_and_no_other_draw(change, columns):
    """Every operation has its own random number, so the crops and all other parameters stay bit for bit the same."""
    draws = np.random.RandomState(0).rand(200, 4, _DRAWS)
    spec = CropSpec(global_size=8, local_size=8, local_number=2)
    before, after = (torch.cat(colour_parameters(draws, s)) for s in (spec, replace(spec, **change)))
    changed = {column for column in range(before.shape[-1]) if not torch.equal(before[..., column], after[..., column])}
    assert changed == columns


def test_probabilities_of_zero_and_one_are_never_and_always():
    """Of each kind of crop, in the order first global, second global, local."""
    draws = np.random.RandomState(0).rand(100, 4, _DRAWS)
    spec = CropSpec(8, 8, local_number=2, blur=(0.0, 1.0, 0.0), solarize=(0.0, 1.0, 0.0), gray=1.0, jitter=0.0)
    colour = torch.cat(colour_parameters(draws, spec))  # (4, 100, P)
    assert (colour[..., SIGMA] > 0).all(1).tolist() == [False, True, False, False]
    assert (colour[..., SIGMA] == 0).all(1).tolist() == [True, False, True, True]
    assert colour[..., SOLARIZE].mean(1).tolist() == [0, 1, 0, 0]
    assert (colour[..., GRAY] == 1).all()
    assert (colour[..., [BRIGHTNESS, CONTRAST, SATURATION]] == 1).all()


@pytest.mark.parametrize("channels", [1, 4, 5])
def test_other_channels_keep_the_operations_that_make_sense(channels):
    """With other than 3 channels brightness, contrast, blur and solarize act, and the rest is named as left out."""
    spec = CropSpec(global_size=32, local_size=16, in_chans=channels)
    assert "saturation, hue and grayscale" in spec.left_out()
    assert CropSpec().left_out() is None
    image = np.random.RandomState(0).randint(0, 255, (60, 50, channels)).astype(np.uint8)
    crops, colour = MultiCrop(spec)(image, 0, 0, 1)
    assert (colour[0][:, [HUE, GRAY]] == 0).all()
    assert (colour[0][:, SATURATION] == 1).all()
    out = ColourStage(spec)([c[:, None] for c in crops], [c[:, None] for c in colour])
    assert out[0].shape == (2, channels, 32, 32)
    assert all(torch.isfinite(o).all() for o in out)
    # the resize of many channels agrees with the resize of each alone
    alone, _ = MultiCrop(CropSpec(global_size=32, local_size=16, in_chans=1))(image[:, :, :1].copy(), 0, 0, 1)
    assert (crops[0][:, :1].int() - alone[0].int()).abs().max() <= 1
