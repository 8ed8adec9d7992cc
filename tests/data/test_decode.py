"""Any image becomes upright pixels with the right colours, or a reason why not."""

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from data import arrays as arrays_module
from data import decode as decode_module
from data.decode import BadImage, Picture, decode, jpeg_size

ROOT = Path(__file__).resolve().parents[2]


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


@pytest.mark.parametrize("lossless", [True, False])
@pytest.mark.parametrize(("mode", "in_chans"), [("RGB", 3), ("RGB", 1), ("RGBA", 3), ("RGBA", 1), ("RGBA", 4)])
def test_webp_pixels_equal_pillows(photograph, monkeypatch, mode, lossless, in_chans):
    """torchvision's decoder gives Pillow's pixels, transparent and gray ones too, in one band or in several."""
    image = photograph.convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    data = encoded(image, "WEBP", lossless=lossless, quality=80)
    fast = decode(data, in_chans)
    monkeypatch.setattr(decode_module, "_BAND", 40 * image.width)
    banded = decode(data, in_chans)
    monkeypatch.setattr(decode_module, "_webp_decoder", lambda: None)
    assert np.array_equal(fast, decode(data, in_chans))
    assert np.array_equal(banded, fast)


def test_an_animated_webp_is_its_first_frame(photograph):
    """Frames after the first are not looked at; a torn file is a reason, not a traceback."""
    frames = [photograph, photograph.rotate(180)]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True, exact=True)
    assert np.array_equal(decode(data), np.asarray(photograph))
    still = encoded(photograph, "WEBP")
    for torn in (still[:-500], still[:60], data[:-500]):
        with pytest.raises(BadImage):
            decode(torn)


@pytest.mark.full
def test_a_large_webp_takes_three_bytes_per_value(tmp_path):
    """192 million values: at most 576 MB and 200, above the memory after the imports."""
    side = 8000
    Image.new("RGB", (side, side), (10, 200, 30)).save(tmp_path / "large.webp", lossless=True, method=0)
    code = (
        "import resource, sys; from data.decode import decode; decode(open(sys.argv[2], 'rb').read())\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "decode(open(sys.argv[1], 'rb').read())\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)"
    )
    Image.new("RGB", (8, 8)).save(tmp_path / "small.webp")
    files = [str(tmp_path / "large.webp"), str(tmp_path / "small.webp")]
    done = subprocess.run([sys.executable, "-c", code, *files], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 3 * 3 * side**2 + 200 * 2**20


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


def jpeg_with(data, *segments):
    """The JPEG `data` with APP1 segments of these contents before all others."""
    return data[:2] + b"".join(b"\xff\xe1" + struct.pack(">H", len(s) + 2) + s for s in segments) + data[2:]


def exif_block(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def test_an_eps_file_is_refused_whatever_its_name(monkeypatch):
    """Pillow hands EPS to Ghostscript; no such file gets that far, here or in any other format of Pillow's."""
    from PIL import EpsImagePlugin

    def run(*_, **__):
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n"
    assert Image.open(io.BytesIO(eps)).format == "EPS"
    with pytest.raises(BadImage, match="not an image in a known format"):
        decode(eps)


@pytest.mark.parametrize(
    "block", [b"Exif\0\0II", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\0", b"Exif\0\0garbage", exif_block(9), exif_block(0)]
)
def test_a_malformed_orientation_counts_as_upright(photograph, block):
    """Cut-off EXIF, noise and values outside 1..8 leave the image as it is stored, and its size right."""
    data = encoded(photograph, "JPEG")
    picture = Picture(jpeg_with(data, block))
    assert (picture.height, picture.width) == photograph.size[::-1]
    assert np.array_equal(picture.pixels(), decode(data))


def test_orientation_is_found_behind_an_xmp_block_and_taken_from_exif_alone(photograph):
    """XMP before EXIF hides nothing, and an orientation in XMP, which no viewer follows, turns nothing."""
    data = encoded(photograph, "JPEG")
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>'
    turned = Picture(jpeg_with(data, xmp, exif_block(8)))
    assert (turned.height, turned.width) == photograph.size
    assert np.array_equal(turned.pixels(), np.rot90(decode(data)))
    no_tag = Image.Exif()
    no_tag[0x010E] = "a description"
    for blocks in ([xmp], [xmp, no_tag.tobytes()]):
        assert np.array_equal(decode(jpeg_with(data, *blocks)), decode(data))


@pytest.mark.parametrize("exif", [b"", exif_block(6)])
def test_a_jpeg_of_hundreds_of_scans_is_refused(photograph, exif):
    """Repeating a progressive file's last scan costs a pass over the image each; above 64 the file is bad."""
    data = encoded(photograph, "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    many = data[:-2] + data[last:-2] * 300 + data[-2:]
    few = data[:-2] + data[last:-2] * 20 + data[-2:]
    if exif:
        many, few = jpeg_with(many, exif), jpeg_with(few, exif)
    with pytest.raises(BadImage, match=r"scans, more than 64"):
        decode(many)
    assert Picture(few).height > 0


def test_pixels_do_not_depend_on_the_bands_they_are_converted_in(photograph, monkeypatch):
    """Conversion a few rows at a time gives what conversion at once gives, in every mode."""
    gray = photograph.convert("L")
    alpha = photograph.convert("RGBA")
    alpha.putalpha(gray)
    files = [encoded(i, "PNG") for i in (photograph, alpha, gray, photograph.convert("P"))]
    files.append(encoded(photograph.convert("CMYK"), "JPEG"))
    files.append(encoded(Image.fromarray(np.asarray(gray).astype(np.uint16) * 200), "PNG"))
    files.append(encoded(Image.fromarray(np.asarray(gray) / np.float32(255)), "TIFF"))
    whole = [decode(f, chans) for f in files for chans in (1, 3)]
    monkeypatch.setattr(decode_module, "_BAND", 7 * photograph.width)
    banded = [decode(f, chans) for f in files for chans in (1, 3)]
    assert all(np.array_equal(a, b) for a, b in zip(banded, whole, strict=True))


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64, np.uint32])
def test_wide_integers_that_may_be_8_or_16_bits_are_refused(dtype):
    """int32 pixels of at most 255 are 8 bits or dark 16 bits: an error, not a black image; a black one is black."""
    values = np.full((6, 5, 5), 200, dtype)
    with pytest.raises(BadImage, match=r"at most 200.*uint8 or uint16"):
        decode(npy(values), in_chans=5)
    assert not decode(npy(values * 0), in_chans=5).any()
    assert (decode(npy(values * 100), in_chans=5) == 78).all()
    assert (decode(npy(np.full((6, 5, 5), 200, np.uint16)), in_chans=5) == 1).all()


def test_npy_arrays_in_either_memory_order_and_with_lying_headers(photograph):
    """Fortran order reads as C order; a header that declares more than the file holds is refused, at no cost."""
    pixels = np.asarray(photograph)
    assert np.array_equal(decode(npy(np.asfortranarray(pixels))), pixels)
    assert decode(npy(pixels)).flags.writeable
    true = str(pixels.shape).encode()
    for lie in (b"(99999999999, 9, 3)", b"(-5, 9, 3)", b"(0, 9, 3)"):
        with pytest.raises(BadImage, match="not a readable npy"):
            decode(npy(pixels).replace(true, lie.ljust(len(true)), 1))
    with pytest.raises(BadImage, match="not a readable npy"):
        decode(npy(pixels)[:-1])


def test_tiffs_are_bounded_by_bytes_and_by_what_is_packed_into_them():
    """Doubles of 6 GB, and a strip that inflates to more than it declares, are refused before memory is taken."""
    tifffile = pytest.importorskip("tifffile")
    buffer = io.BytesIO()
    small = np.zeros((64, 64, 5))
    tifffile.imwrite(buffer, small, photometric="minisblack", compression="zlib", rowsperstrip=64)
    assert decode(buffer.getvalue(), in_chans=5).shape == (64, 64, 5)
    for values, itemsize in ((89_000_000 * 5, 8), (89_000_000 * 3, 8), (decode_module.MAX_PIXELS * 3 + 1, 2)):
        with pytest.raises(BadImage, match="decompression bomb"):
            arrays_module._check_size((values,), itemsize)
    arrays_module._check_size((89_000_000 * 3,), 2)
    packed = zlib.compress(small.tobytes())
    at = buffer.getvalue().find(packed[:2])
    assert at > 0
    bomb = zlib.compress(bytes(10**7), 9)
    content = bytearray(buffer.getvalue())
    with tifffile.TiffFile(io.BytesIO(content)) as tiff:
        tag = tiff.pages[0].tags["StripByteCounts"], tiff.pages[0].tags["StripOffsets"]
    for entry, value in zip(tag, (len(bomb), len(content)), strict=True):
        form = {3: "<H", 4: "<I"}[int(entry.dtype)]
        struct.pack_into(form, content, entry.valueoffset, value)
    with pytest.raises(BadImage, match="more compressed data than it declares"):
        decode(bytes(content) + bomb, in_chans=5)


def test_a_plain_jpeg_of_too_many_pixels_is_refused(photograph):
    """The quick look at a header keeps the limit of pixels, which Pillow keeps for all other files."""
    data = bytearray(encoded(photograph, "JPEG"))
    frame = data.index(b"\xff\xc0")
    struct.pack_into(">HH", data, frame + 5, 60_000, 60_000)
    assert jpeg_size(bytes(data)) is None
    with pytest.raises(BadImage, match="89,478,485 pixels"):
        Picture(bytes(data))
    struct.pack_into(">HH", data, frame + 5, 9_460, 9_459)  # 0.003 % above and below the limit
    assert jpeg_size(bytes(data)) is None
    struct.pack_into(">HH", data, frame + 5, 9_459, 9_459)
    assert jpeg_size(bytes(data)) == (9_459, 9_459)
