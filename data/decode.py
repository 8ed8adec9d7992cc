"""From the bytes of one file to pixels: (H, W, C) uint8, upright, with the number of channels that was asked for.

JPEG, PNG, WebP, BMP, TIFF and what else Pillow reads; npy, and TIFF through tifffile, for multi-channel images.
Colour is made right, not merely accepted:
 - gray, palette, CMYK and YCbCr images become RGB; 16-bit pixels are divided by 257, floating-point ones lie in [0, 1];
 - transparency is laid over white, where the published code's `convert("RGB")` uncovers what an editor left below it;
 - EXIF orientation is applied, which the published code ignores.
JPEG, nearly all of any data set, goes through torchvision's decoder: the same library as Pillow's and the same pixels,
without Pillow's copy, and without Pillow for the size where the header is a plain one. Where torchvision was built
without it, Pillow decodes, and a warning says so.
"""

from __future__ import annotations

import functools
import io
import re
import struct
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif", ".npy")
MAX_PIXELS = 89_478_485  # Pillow's own limit: a quarter of a GiB of RGB
_ORIENTATION = 0x0112  # EXIF tag
_NPY_MAGIC = b"\x93NUMPY"


class BadImage(Exception):
    """An image that can't be used; the message is the reason, without the name of the file."""


class Picture:
    """An image whose size is known and whose pixels wait until `pixels` is called.

    height, width: of the upright image. Raises `BadImage` where the bytes are no image, or a decompression bomb.
    """

    def __init__(self, data: bytes, in_chans: int = 3):
        if not data:
            raise BadImage("the file is empty")
        self.in_chans = in_chans
        self._data = data
        self._image: Image.Image | None = None
        self._array: np.ndarray | None = None
        self._rotated = 1
        plain = jpeg_size(data) if in_chans == 3 and _jpeg_decoder() is not None else None
        if plain is not None:
            self.height, self.width = plain
            return
        if data.startswith(_NPY_MAGIC):
            self._array = _with_channels(_read_npy(data), in_chans)
        elif in_chans not in (1, 3) and data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            self._array = _with_channels(_read_tiff(data), in_chans)
        else:
            self._image = _open_with_pillow(data)
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
        self._rotated = self._image.getexif().get(_ORIENTATION, 1) if "exif" in self._image.info else 1
        return (width, height) if self._rotated >= 5 else (height, width)

    def pixels(self, shrink: int = 1) -> np.ndarray:
        """(H, W, C) uint8. A JPEG may be decoded at 1/shrink of its size (1, 2, 4 or 8): compare the shape."""
        if self._array is not None:
            return self._array
        try:
            if self._image is None:  # a plain JPEG: see jpeg_size
                if shrink == 1:
                    return _jpeg_decoder()(self._data)
                self._image = _open_with_pillow(self._data)
            return self._decode(shrink)
        except BadImage:
            raise
        except (
            Exception
        ) as error:  # decoders raise whatever they like: OSError, SyntaxError, ValueError, RuntimeError ...
            raise BadImage(f"can't be decoded: {_one_line(error)}") from error

    def _decode(self, shrink: int) -> np.ndarray:
        image = self._image
        plain_jpeg = image.format == "JPEG" and image.mode in ("RGB", "L") and self.in_chans in (1, 3)
        if plain_jpeg and shrink == 1 and image.mode == "RGB" and self.in_chans == 3:
            decode = _jpeg_decoder()
            if decode is not None:
                return decode(self._data)
        if plain_jpeg and shrink > 1:
            image.draft(image.mode, (image.width // shrink, image.height // shrink))
        if self._rotated != 1:
            image = ImageOps.exif_transpose(image)
        return _to_array(image, self.in_chans)


def decode(data: bytes, in_chans: int = 3) -> np.ndarray:
    """Pixels of an encoded image, (H, W, C) uint8. Raises `BadImage`."""
    return Picture(data, in_chans).pixels()


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG that needs no care: three channels of 8 bits, no EXIF, a size within bounds.

    None for anything else, which is left to Pillow. A file costs 10 µs so, and 100 µs through Pillow.
    """
    if data[:3] != b"\xff\xd8\xff":
        return None
    at = 2
    while at + 10 <= len(data):
        mark, kind, length = struct.unpack_from(">BBH", data, at)
        if mark != 0xFF or length < 2 or not 0xC0 <= kind <= 0xFE or 0xD0 <= kind <= 0xDA:
            return None  # not a segment, or the picture itself begins before its size was told
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):  # the frame's header, SOF
            bits, height, width, channels = struct.unpack_from(">BHHB", data, at + 4)
            plain = kind <= 0xC2 and bits == 8 and channels == 3 and 0 < height * width <= MAX_PIXELS
            return (height, width) if plain else None
        if kind in (0xE1, 0xE2) and data[at + 4 : at + 8] in (b"Exif", b"MPF\0"):
            return None  # it may be turned; or several pictures in one file
        at += 2 + length
    return None


def _open_with_pillow(data: bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadImage(f"has more than {MAX_PIXELS:,} pixels: refused, as it may be a decompression bomb") from error
    except Exception as error:
        raise BadImage("is not an image in a known format") from error
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(f"has more than {MAX_PIXELS:,} pixels: refused, as it may be a decompression bomb")
    return image


@functools.cache
def _jpeg_decoder():
    """bytes -> (H, W, 3) uint8 through torchvision, or None where it was built without JPEG."""
    import torchvision.io

    if not hasattr(torch.ops.image, "decode_jpeg"):
        warnings.warn("torchvision has no JPEG decoder here; Pillow decodes instead, more slowly", stacklevel=2)
        return None

    rgb = torchvision.io.ImageReadMode.RGB.value

    def decode_bytes(data: bytes) -> np.ndarray:
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return torch.ops.image.decode_jpeg(encoded, rgb, True).permute(1, 2, 0).numpy()  # True: EXIF is applied

    return decode_bytes


def _to_array(image: Image.Image, in_chans: int) -> np.ndarray:
    """The pixels of a Pillow image with 1, 3 or 4 channels, (H, W, in_chans) uint8."""
    if image.mode.startswith("I") or image.mode == "F":
        array = _to_uint8(np.array(image))[:, :, None]
        return np.repeat(array, in_chans, axis=2) if in_chans in (1, 3) else _with_channels(array, in_chans)
    if in_chans == 3:
        return np.array(_flattened(image).convert("RGB"))
    if in_chans == 1:
        return np.array(_flattened(image).convert("L"))[:, :, None]
    array = np.array(image.convert("RGBA") if image.mode in ("P", "PA", "LA") else image)
    return _with_channels(array, in_chans)


def _flattened(image: Image.Image) -> Image.Image:
    """The image over white where it has transparency."""
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def _read_npy(data: bytes) -> np.ndarray:
    try:
        return np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:
        raise BadImage(f"is not a readable npy array: {_one_line(error)}") from error


def _read_tiff(data: bytes) -> np.ndarray:
    import tifffile  # comes with scikit-image

    try:
        with tifffile.TiffFile(io.BytesIO(data)) as tiff:
            series = tiff.series[0]
            if int(np.prod(series.shape, dtype=np.int64)) > MAX_PIXELS * 3:
                raise BadImage(f"has {series.shape} values: refused, as it may be a decompression bomb")
            return series.asarray()
    except BadImage:
        raise
    except Exception as error:
        raise BadImage(f"is not a readable TIFF: {_one_line(error)}") from error


def _with_channels(array: np.ndarray, in_chans: int) -> np.ndarray:
    """(H, W, in_chans) uint8 from an array with its channels last, first, or (for one channel) left out."""
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim == 3 and array.shape[2] != in_chans and array.shape[0] == in_chans:
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] != in_chans or 0 in array.shape:
        raise BadImage(f"has shape {array.shape}, which is not an image of {in_chans} channels: see --in_chans")
    return np.ascontiguousarray(_to_uint8(array))


def _to_uint8(array: np.ndarray) -> np.ndarray:
    """uint8 as it is, 16 bits scaled by 257 (full range to full range), floating point from [0, 1]."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype.kind == "f":
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise BadImage("has floating-point pixels outside [0, 1]: scale them first")
        return np.round(array * 255).astype(np.uint8)
    if array.dtype.kind in "iu" and array.min() >= 0 and array.max() <= 65535:
        return np.round(array / 257).astype(np.uint8)
    raise BadImage(f"has pixels of type {array.dtype} outside 0..65535: scale them to 8 or 16 bits first")


def _one_line(error: BaseException) -> str:
    """The error's text in one line, without the place in a C++ source that torchvision puts before it."""
    text = re.sub(r"^\w+, \S+:\d+, ", "", " ".join(str(error).split()))
    return text[:160] or type(error).__name__
