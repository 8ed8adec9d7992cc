"""Any image becomes upright pixels with the right colours, or a reason why not."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from data import decode as decode_module
from data.decode import BadImage, Picture, decode, jpeg_size


@pytest.fixture(scope="module")
def photograph(imagenet_sample):
    path = sorted(imagenet_sample.rglob("*.[jJ]*"))[1]
    image = Image.open(path)
    image.load()
    assert image.mode == "RGB"
    return image


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_jpeg_pixels_equal_pillows(imagenet_sample):
    """The fast decoder gives Pillow's pixels exactly, on every real file."""
    for path in sorted(imagenet_sample.rglob("*.[jJ]*"))[:40]:
        with Image.open(path) as image:
            assert np.array_equal(decode(path.read_bytes()), np.asarray(image.convert("RGB")))


def test_pillow_decodes_where_torchvision_cannot(photograph, monkeypatch):
    """Without torchvision's decoder the pixels are the same."""
    data = encoded(photograph, "JPEG")
    fast = decode(data)
    monkeypatch.setattr(decode_module, "_jpeg_decoder", lambda: None)
    assert np.array_equal(decode(data), fast)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP", "PPM"])
def test_lossless_formats_keep_every_pixel(photograph, kind):
    """PNG, BMP, TIFF, lossless WebP and PPM come back bit by bit."""
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    assert np.array_equal(decode(encoded(photograph, kind, **options)), np.asarray(photograph))


def test_gray_and_palette_become_rgb(photograph):
    """A gray image has three equal channels; a palette image has its palette's colours."""
    gray, palette = photograph.convert("L"), photograph.convert("P")
    assert np.array_equal(decode(encoded(gray, "JPEG", quality=95)).std(axis=2), np.zeros(gray.size[::-1]))
    assert np.array_equal(decode(encoded(gray, "PNG"))[:, :, 1], np.asarray(gray))
    assert np.array_equal(decode(encoded(palette, "PNG")), np.asarray(palette.convert("RGB")))


def test_cmyk_becomes_the_photograph_again(photograph):
    """A CMYK JPEG looks like the RGB photograph it was made from."""
    pixels = decode(encoded(photograph.convert("CMYK"), "JPEG", quality=95)).astype(int)
    assert abs(pixels - np.asarray(photograph).astype(int)).mean() < 4


def test_transparency_is_laid_over_white(photograph):
    """Where an image is transparent it is white, whatever lies below; where opaque it is itself."""
    image = photograph.convert("RGBA")
    alpha = np.full(photograph.size[::-1], 255, np.uint8)
    alpha[:10] = 0
    image.putalpha(Image.fromarray(alpha))
    pixels = decode(encoded(image, "PNG"))
    assert (pixels[:10] == 255).all()
    assert np.array_equal(pixels[10:], np.asarray(photograph)[10:])
    la = Image.merge("LA", (photograph.convert("L"), Image.fromarray(alpha)))
    assert (decode(encoded(la, "PNG"))[:10] == 255).all()


def test_sixteen_bits_are_scaled_to_eight(photograph):
    """A 16-bit gray PNG or TIFF is its 8-bit original again, not clipped to white."""
    gray = np.asarray(photograph.convert("L"))
    for kind in ("PNG", "TIFF"):
        pixels = decode(encoded(Image.fromarray(gray.astype(np.uint16) * 257), kind))
        assert np.array_equal(pixels, np.repeat(gray[:, :, None], 3, axis=2))


@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_orientation_is_applied(photograph, orientation):
    """All seven turned orientations come out as Pillow's exif_transpose turns them, with the size known before."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photograph, "JPEG", exif=exif)
    picture = Picture(data)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert (picture.height, picture.width) == upright.shape[:2]
    assert np.array_equal(picture.pixels(), upright)


def test_the_quick_look_at_a_jpegs_header_agrees_with_pillow(imagenet_sample, photograph):
    """A plain JPEG's size is Pillow's; what needs care, and what is cut off or odd, is left to Pillow."""
    known = 0
    for path in sorted(imagenet_sample.rglob("*.[jJ]*")):
        data = path.read_bytes()
        size = jpeg_size(data)
        with Image.open(path) as image:
            assert size in (None, image.size[::-1])
        known += size is not None
        assert all(jpeg_size(data[:cut]) in (None, size) for cut in range(0, 800, 7))
    assert known > 0
    size = photograph.size[::-1]
    exif = Image.Exif()
    exif[0x0112] = 6
    assert jpeg_size(encoded(photograph, "JPEG", progressive=True)) == size
    assert jpeg_size(encoded(photograph, "JPEG", exif=exif)) is None
    assert jpeg_size(encoded(photograph.convert("CMYK"), "JPEG")) is None
    assert jpeg_size(encoded(photograph.convert("L"), "JPEG")) is None
    assert jpeg_size(encoded(photograph, "PNG")) is None


def test_shrunk_decoding_keeps_content_and_orientation(photograph):
    """A JPEG decoded at a fraction of its size looks like the whole one made smaller, turned as EXIF says."""
    big = photograph.resize((1600, 1200))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Picture(encoded(big, "JPEG", quality=95, exif=exif))
    small = picture.pixels(shrink=4)
    assert small.shape == (400, 300, 3)
    expected = big.transpose(Image.Transpose.ROTATE_270).resize((300, 400), Image.Resampling.BOX)
    assert abs(small.astype(int) - np.asarray(expected).astype(int)).mean() < 2


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "empty"), (b"no image at all", "not an image"), (b"\x93NUMPY broken", "npy")],
)
def test_what_is_no_image_is_refused_with_the_reason(data, reason):
    """Empty files, text and broken arrays raise BadImage and say why."""
    with pytest.raises(BadImage, match=reason):
        decode(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_cut_off_file_is_refused(photograph, kind):
    """Half a file is a bad image, never a half-gray one."""
    data = encoded(photograph, kind)
    with pytest.raises(BadImage):
        decode(data[: len(data) // 2])


def test_decompression_bombs_are_refused(monkeypatch):
    """A small file that declares a giant image is refused before its pixels are made."""
    bomb = encoded(Image.new("1", (20_000, 10_000)), "PNG")
    with pytest.raises(BadImage, match="decompression bomb"):
        decode(bomb)


def test_multi_channel_arrays_and_tiffs(photograph):
    """npy and TIFF with other than 3 channels keep them, channels first or last, 8 or 16 bits or floats in [0, 1]."""
    tifffile = pytest.importorskip("tifffile")
    stack = np.concatenate([np.asarray(photograph)] * 2, axis=2)[:, :, :5]

    def npy(array):
        buffer = io.BytesIO()
        np.save(buffer, array)
        return buffer.getvalue()

    for array in (
        stack,
        stack.transpose(2, 0, 1),
        stack.astype(np.uint16) * 257,
        stack / 255,
        stack.astype(np.int32) * 257,
    ):
        assert np.array_equal(decode(npy(array), in_chans=5), stack)
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, stack.transpose(2, 0, 1).astype(np.uint16) * 257, photometric="minisblack")
    assert np.array_equal(decode(buffer.getvalue(), in_chans=5), stack)
    with pytest.raises(BadImage, match="in_chans"):
        decode(npy(stack), in_chans=4)
    with pytest.raises(BadImage, match="outside"):
        decode(npy(stack.astype(float)), in_chans=5)
    with pytest.raises(BadImage):
        decode(npy(np.array([{}], dtype=object)), in_chans=5)


def test_one_channel(photograph):
    """in_chans 1 gives the luma of a colour image."""
    pixels = decode(encoded(photograph, "PNG"), in_chans=1)
    assert np.array_equal(pixels[:, :, 0], np.asarray(photograph.convert("L")))
