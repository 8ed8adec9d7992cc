"""From the bytes of one file to pixels: (H, W, C) uint8, upright, with the number of channels that was asked for.

JPEG, PNG, WebP, BMP, TIFF, PPM and GIF through Pillow; npy, and TIFF through tifffile, for multi-channel images
(data/arrays.py). No other format is tried, whatever the file is called: some of Pillow's readers start programs.
Colours are converted so that each image looks as it was meant to:
 - gray, palette, CMYK and YCbCr images become RGB; 16-bit pixels are divided by 257, floating-point ones lie in [0, 1];
 - transparency is laid over white, where the published code's `convert("RGB")` uncovers what an editor left below it;
 - EXIF orientation is applied, which the published code ignores; a damaged or unknown one counts as upright.
JPEG, nearly all of any data set, goes through torchvision's decoder: the same library as Pillow's and the same pixels,
without Pillow's copy, and without Pillow for the size if the header is a plain one. If torchvision was built without
it, Pillow decodes, and a warning says so.

A still WebP goes the same way, because Pillow decodes it into several canvases.

Decoding takes at most 3 bytes per value of the result and 200 MB, whatever the file declares; an animated WebP, of
which the first frame counts, takes 6.
"""

from __future__ import annotations

import functools
import io
import struct
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image

from data.arrays import NPY_MAGIC, TIFF_MAGICS, read_npy, read_tiff, to_uint8, with_channels
from data.limits import MAX_PIXELS, BadImage, one_line

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif", ".npy")
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF")  # EPS is left out: Pillow runs Ghostscript for it
_ORIENTATION = 0x0112  # EXIF tag
_MAX_SCANS = 64  # of a JPEG; encoders write about ten, and each one costs a pass over the whole image
_BAND = 2**22  # pixels converted at a time
_BOMB = f"has more than {MAX_PIXELS:,} pixels: refused, as it may be a decompression bomb"


class Picture:
    """An image whose size is known and whose pixels wait until `pixels` is called.

    height, width: of the upright image. Raises `BadImage` if the bytes are no image, or a decompression bomb.
    """

    def __init__(self, data: bytes, in_chans: int = 3):
        if not data:
            raise BadImage("the file is empty")
        self.in_chans = in_chans
        self._data = data
        self._image: Image.Image | None = None
        self._array: np.ndarray | None = None
        self._orientation = 1
        plain = jpeg_size(data) if in_chans == 3 and _jpeg_decoder() is not None else None
        if plain is not None:
            self.height, self.width = plain
            return
        if data.startswith(NPY_MAGIC):
            self._array = with_channels(read_npy(data), in_chans)
        elif in_chans not in (1, 3) and data[:4] in TIFF_MAGICS:
            self._array = with_channels(read_tiff(data), in_chans)
        else:
            self._image = _open_with_pillow(data)
            self._orientation = _orientation_of(self._image)
        self.height, self.width = self._size()

    @classmethod
    def from_array(cls, array: np.ndarray) -> Picture:
        """A picture that is decoded already: (H, W, C) uint8."""
        picture = cls.__new__(cls)
        picture.in_chans, picture._data, picture._image, picture._array = array.shape[2], b"", None, array
        picture.height, picture.width = array.shape[:2]
        return picture

    def _size(self) -> tuple[int, int]:
        if self._array is not None:
            return self._array.shape[:2]
        width, height = self._image.size
        return (width, height) if self._orientation >= 5 else (height, width)

    def pixels(self, shrink: int = 1) -> np.ndarray:
        """(H, W, C) uint8. A JPEG may be decoded at 1/shrink of its size (1, 2, 4 or 8): compare the shape."""
        if self._array is not None:
            return self._array
        try:
            if self._image is None:  # a plain JPEG: see jpeg_size
                if shrink == 1:
                    return _jpeg_decoder()(self._data)
                self._image = _open_with_pillow(self._data)
            return upright(self._decode(shrink), self._orientation)
        except BadImage:
            raise
        except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, RuntimeError and others
            raise BadImage(f"can't be decoded: {one_line(error)}") from error

    def _decode(self, shrink: int) -> np.ndarray:
        image = self._image
        plain_jpeg = image.format == "JPEG" and image.mode in ("RGB", "L") and self.in_chans in (1, 3)
        if plain_jpeg and shrink == 1 and image.mode == "RGB" and self.in_chans == 3:
            decode = _jpeg_decoder()
            if decode is not None:
                return decode(self._data)
        if plain_jpeg and shrink > 1:
            image.draft(image.mode, (max(1, image.width // shrink), max(1, image.height // shrink)))
        if image.format == "WEBP" and getattr(image, "n_frames", 1) == 1 and _webp_decoder() is not None:
            return _webp_to_array(self._data, image.mode, self.in_chans)
        return _to_array(image, self.in_chans)


def decode(data: bytes, in_chans: int = 3) -> np.ndarray:
    """Pixels of an encoded image, (H, W, C) uint8. Raises `BadImage`."""
    return Picture(data, in_chans).pixels()


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG that needs no care: three channels of 8 bits, no EXIF, a size within bounds.

    None for anything else, which is left to Pillow. Raises `BadImage` for too many scans. This takes a few µs per file,
    Pillow's look at the header 100 µs.
    """
    if data[:3] != b"\xff\xd8\xff":
        return None
    at, size = 2, None
    while at + 10 <= len(data):
        mark, kind, length = struct.unpack_from(">BBH", data, at)
        if mark != 0xFF or length < 2 or not 0xC0 <= kind <= 0xFE or 0xD0 <= kind <= 0xD9:
            return None  # not a segment
        if kind == 0xDA:  # the first scan: pixels follow
            if size is not None and data[at + 4] != 3:  # one channel, so several scans
                _check_scans(data)
            return size
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):  # the frame's header, SOF
            bits, height, width, channels = struct.unpack_from(">BHHB", data, at + 4)
            plain = kind <= 0xC2 and bits == 8 and channels == 3 and 0 < height * width <= MAX_PIXELS
            if size is not None or not plain:
                return None
            size = height, width
            if kind == 0xC2:
                _check_scans(data)
                return size
        if kind in (0xE1, 0xE2) and data[at + 4 : at + 8] in (b"Exif", b"MPF\0"):
            return None  # it may be turned; or several pictures in one file
        at += 2 + length
    return None


def _check_scans(data: bytes) -> None:
    """Refuse a JPEG of so many scans that decoding it takes minutes."""
    channels, progressive = 0, False
    for kind, at, _ in _segments(data):
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            channels, progressive = data[at + 9], kind % 4 == 2
        if kind == 0xDA and data[at + 4] == channels and not progressive:
            return  # one scan holds all channels: decoders stop after it
    scans = data.count(b"\xff\xda")  # pixel data never holds this pair of bytes
    if scans > _MAX_SCANS:
        raise BadImage(f"has {scans} scans, more than {_MAX_SCANS}: refused, as decoding it would take very long")


def _open_with_pillow(data: bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadImage(_BOMB) from error
    except Exception as error:
        plain = _without_exif(data)
        if len(plain) < len(data):  # a damaged EXIF block keeps Pillow from opening a picture that may be whole
            return _open_with_pillow(plain)
        raise BadImage("is not an image in a known format") from error
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(_BOMB)
    if image.format in ("JPEG", "MPO"):
        _check_scans(data)
    return image


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(kind, offset, length) of a JPEG's segments up to its first scan; nothing for other files."""
    at = 2 if data[:3] == b"\xff\xd8\xff" else len(data)
    while at + 10 <= len(data):
        mark, kind, length = struct.unpack_from(">BBH", data, at)
        if mark != 0xFF or length < 2:
            return
        yield kind, at, 2 + length
        if kind == 0xDA:
            return
        at += 2 + length


def _without_exif(data: bytes) -> bytes:
    """A JPEG without its EXIF and multi-picture blocks; any other file unchanged."""
    kept, end = [], 0
    for kind, at, length in _segments(data):
        if kind in (0xE1, 0xE2) and data[at + 4 : at + 8] in (b"Exif", b"MPF\0"):
            kept.append(data[end:at])
            end = at + length
    return b"".join([*kept, data[end:]])


def _orientation_of(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 if there is none, or one that can't be read or makes no sense."""
    if "exif" not in image.info:
        return 1
    exif = Image.Exif()  # not image.getexif(), which falls back on XMP, as no viewer does
    try:
        exif.load(image.info["exif"])
        value = exif.get(_ORIENTATION, 1)
    except Exception:  # SyntaxError, struct.error and others: the picture itself may be whole
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W, C) as stored, turned and mirrored as an EXIF orientation of 1 to 8 asks."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


@functools.cache
def _jpeg_decoder():
    """bytes -> (H, W, 3) uint8 through torchvision, or None if it was built without JPEG."""
    import torchvision.io

    if not hasattr(torch.ops.image, "decode_jpeg"):
        warnings.warn("torchvision has no JPEG decoder here; Pillow decodes instead, more slowly", stacklevel=2)
        return None

    rgb = torchvision.io.ImageReadMode.RGB.value

    def decode_bytes(data: bytes) -> np.ndarray:
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        # False: the orientation is left to `upright`; torchvision misses an EXIF block that follows an XMP block
        return torch.ops.image.decode_jpeg(encoded, rgb, False).permute(1, 2, 0).numpy()

    return decode_bytes


@functools.cache
def _webp_decoder():
    """(bytes, whether with alpha) -> (H, W, 3 or 4) uint8 through torchvision, or None if it was built without WebP."""
    import torchvision.io

    if not hasattr(torch.ops.image, "decode_webp"):
        return None
    modes = torchvision.io.ImageReadMode

    def decode_bytes(data: bytes, alpha: bool) -> np.ndarray:
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        mode = modes.RGB_ALPHA if alpha else modes.RGB
        return torch.ops.image.decode_webp(encoded, mode.value).permute(1, 2, 0).numpy()

    return decode_bytes


def _webp_to_array(data: bytes, mode: str, in_chans: int) -> np.ndarray:
    """The pixels of a still WebP, which Pillow calls RGB or RGBA, (H, W, in_chans) uint8."""
    pixels = _webp_decoder()(data, mode == "RGBA")
    if mode == "RGB" and in_chans == 3:
        return pixels
    height, width = pixels.shape[:2]
    return _in_bands(height, width, in_chans, lambda top, bottom: Image.fromarray(pixels[top:bottom]))


def _to_array(image: Image.Image, in_chans: int) -> np.ndarray:
    """The pixels of a Pillow image, (H, W, in_chans) uint8."""
    image.load()
    width, height = image.size

    def band(top: int, bottom: int) -> Image.Image:
        return image if bottom - top == height else image.crop((0, top, width, bottom))

    return _in_bands(height, width, in_chans, band)


def _in_bands(height: int, width: int, in_chans: int, band: Callable[[int, int], Image.Image]) -> np.ndarray:
    """(H, W, in_chans) uint8 of an image whose rows `band` gives; converted band by band, which bounds the memory."""
    rows = max(1, _BAND // width)
    if rows >= height:
        return _band_to_array(band(0, height), in_chans)
    out = np.empty((height, width, in_chans), dtype=np.uint8)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        out[top:bottom] = _band_to_array(band(top, bottom), in_chans)
    return out


def _band_to_array(image: Image.Image, in_chans: int) -> np.ndarray:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.array(image)
        if image.mode == "I" and values.min() >= 0 and values.max() <= 65535:
            values = values.astype(np.uint16)  # Pillow's own type for 16 bits, once
        array = to_uint8(values)[:, :, None]
        return np.repeat(array, in_chans, axis=2) if in_chans in (1, 3) else with_channels(array, in_chans)
    if in_chans == 3:
        return np.array(_flattened(image).convert("RGB"))
    if in_chans == 1:
        return np.array(_flattened(image).convert("L"))[:, :, None]
    array = np.array(image.convert("RGBA") if image.mode in ("P", "PA", "LA") else image)
    return with_channels(array, in_chans)


def _flattened(image: Image.Image) -> Image.Image:
    """The image over white, if it has transparency."""
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
