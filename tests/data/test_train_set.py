"""The training set: which crops it cuts, and which images stand in for broken files."""

import numpy as np
import pytest
import torch
from PIL import Image

from data.augment import CropSpec, MultiCrop, _shrink_for
from data.datasets import open_images
from data.eval_set import central_square
from data.train_set import TrainSet
from runtime.guards import InputError

SPEC = CropSpec(global_size=24, local_size=16, local_number=2)


def position_image(side=200):
    """Red tells a pixel's column and green its row, both from 0 to 250."""
    ramp = np.linspace(0, 250, side).round().astype(np.uint8)
    image = np.zeros((side, side, 3), np.uint8)
    image[:, :, 0], image[:, :, 1] = ramp, ramp[:, None]
    return image


def test_crops_have_the_published_scales_and_half_are_flipped():
    """Read from the pixels: areas cover .25 to 1 (global) and .05 to .25 (local) evenly, and half are mirrored."""
    image, cut = position_image(), MultiCrop(SPEC)
    areas, flips = ([], []), []
    for index in range(300):
        for kind, crops in enumerate(cut(image, 0, 0, index)[0]):
            for crop in crops.float():
                red, green = crop[0].mean(dim=0), crop[1].mean(dim=1)
                side = crop.shape[-1]
                # the means of the outermost columns are half a pixel inside the box: side - 1 of its side steps
                width, height = ((line[-1] - line[0]).item() / 250 * side / (side - 1) for line in (red, green))
                flips.append(width < 0)
                areas[kind].append(abs(width) * height)
    assert np.mean(flips) == pytest.approx(0.5, abs=4 * 0.5 / len(flips) ** 0.5)
    for values, (low, high) in zip(areas, ((0.25, 1.0), (0.05, 0.25)), strict=True):
        assert min(values) >= low - 0.02
        assert max(values) <= high + 0.02
        # uniform between the bounds, but for boxes that do not fit, which are drawn again: fewer of the largest
        below_middle = np.mean(np.array(values) < (low + high) / 2)
        assert 0.45 < below_middle < 0.62


@pytest.mark.parametrize(
    ("reduction", "shrink"), [(0.5, 1), (2, 1), (3.9, 1), (4, 2), (7.9, 2), (8, 4), (15.9, 4), (16, 8), (99, 8)]
)
def test_a_jpeg_is_decoded_smaller_only_if_every_crop_is_still_halved_after_it(reduction, shrink):
    """The crop that is reduced least decides; one that is enlarged keeps the full size."""
    side = int(reduction * 20)
    least, other = (0, 0, side, side + 50), (0, 0, 5000, 5000)
    targets = [torch.empty(3, 20, 20), torch.empty(3, 20, 20)]
    assert _shrink_for([other, least], targets) == _shrink_for([least, other], targets) == shrink


@pytest.mark.parametrize(("side", "shrink"), [(127, 1), (128, 2), (255, 2), (256, 4), (511, 4), (512, 8)])
def test_evaluation_decodes_smaller_by_the_same_rule(side, shrink):
    """The shorter side is still reduced twofold or more after a smaller decoding."""
    asked = []

    class Spy:
        height, width = side, side + 40

        def pixels(self, shrink):
            asked.append(shrink)
            return np.zeros((self.height, self.width, 3), np.uint8)

    assert central_square(Spy(), 32, 32).shape == (3, 32, 32)
    assert asked == [shrink]


def test_a_very_long_image_is_evaluated_by_its_centre():
    """A line of 1 x 1,000,000 pixels does not become 32 x 32,000,000 on its way to the central square."""
    image = np.zeros((1, 1_000_000, 3), np.uint8)
    image[:, 499_990:500_010] = 200

    from data.decode import Picture

    for pixels in (image, image.swapaxes(0, 1)):
        assert (central_square(Picture.from_array(pixels), 16, 16) == 200).all()


@pytest.fixture
def grays(tmp_path):
    """Twelve images, each of one gray value, 20 times its number; 3, 5 and 7 are broken."""
    for i in range(12):
        Image.fromarray(np.full((20, 20), 20 * i, np.uint8)).save(tmp_path / f"{i:02d}.png")
    for i in (3, 5, 7):
        (tmp_path / f"{i:02d}.png").write_bytes(b"broken")
    return open_images(tmp_path)


def shown(batch):
    """The number of the image that each element of a batch really shows."""
    return (batch.crops[0][0, :, 0, 0, 0] // 20).tolist()


def test_substitutes_are_spread_over_the_good_images(grays):
    """Over epochs a broken file is replaced by many images, by each about as often, and never by a broken one."""
    train = TrainSet(grays, SPEC, seed=0)
    batch = train.__getitems__([(epoch, index) for epoch in range(60) for index in (3, 5, 7)])
    assert batch.bad.all()
    counts = np.bincount(shown(batch), minlength=12)
    assert counts[[3, 5, 7]].sum() == 0
    # 180 draws from 9 images: 20 each, standard deviation 4.2
    assert counts[[0, 1, 2, 4, 6, 8, 9, 10, 11]].min() > 20 - 4 * 4.2
    assert counts.max() < 20 + 4 * 4.2


def test_good_images_show_themselves(grays):
    """An image that can be read is never replaced."""
    batch = TrainSet(grays, SPEC, seed=0).__getitems__([(0, i) for i in (0, 11, 4)])
    assert not batch.bad.any()
    assert shown(batch) == [0, 11, 4]


def test_other_channels_than_the_source_are_refused(grays):
    """The crops must have the channels that the images are read with."""
    with pytest.raises(InputError, match=r"3 channels and the crops 1.*--in_chans"):
        TrainSet(grays, CropSpec(in_chans=1), seed=0)
