"""Arrays as images: npy files, TIFF through tifffile, and the conversion of any pixel type to 8 bits.

These are the formats of images with other than one or three channels, which Pillow cannot hold. What a file declares is
checked before memory is reserved for it, so that a small file cannot ask for a large amount.
"""

from __future__ import annotations

import io
import logging
import math
import zlib

import numpy as np

from data.limits import MAX_PIXELS, BadImage, one_line

NPY_MAGIC = b"\x93NUMPY"
TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_MAX_VALUES = 3 * MAX_PIXELS
_SPARE_BYTES = 200_000_000  # decoding may take 3 bytes per value (one is the result's), and this much more
_BLOCK = 2**22  # values converted at a time: the temporary floats of a large image stay small


def read_npy(data: bytes) -> np.ndarray:
    """The array of an npy file, a view of `data`. Raises `BadImage`."""
    try:
        file = io.BytesIO(data)
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read_header(file)
        if min(shape, default=0) < 1:
            raise ValueError(f"its shape is {shape}")
        flat = np.frombuffer(data, dtype, math.prod(shape), file.tell())
        return flat.reshape(shape[::-1]).T if fortran_order else flat.reshape(shape)
    except Exception as error:
        raise BadImage(f"is not a readable npy array: {one_line(error)}") from error


def read_tiff(data: bytes) -> np.ndarray:
    """The first image series of a TIFF file. Raises `BadImage`."""
    import tifffile  # comes with scikit-image

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it logs a line for every odd tag of a damaged file
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as tiff:
            series = tiff.series[0]
            itemsize = np.dtype(series.dtype).itemsize
            _check_size(series.shape, itemsize)
            for page in series.pages:
                _check_segments(page, data, itemsize)
            return series.asarray()
    except BadImage:
        raise
    except Exception as error:
        raise BadImage(f"is not a readable TIFF: {one_line(error)}") from error


def _check_size(shape: tuple[int, ...], itemsize: int) -> None:
    values = math.prod(int(side) for side in shape)
    if values > _MAX_VALUES or values * itemsize > 2 * values + _SPARE_BYTES:
        raise BadImage(
            f"has {values:,} values of {itemsize} bytes: refused, as it may be a decompression bomb; 8 or 16 bits, "
            "and smaller images, are accepted"
        )


def _check_segments(page, data: bytes, itemsize: int) -> None:
    """Refuse tiles that are missing, larger than an image may be, or hold more than they declare once inflated."""
    import tifffile

    if page is None:  # a page of the series that the file leaves out
        return
    _check_size(page.keyframe.chunks, itemsize)
    there, due = len(page.dataoffsets), math.prod(page.keyframe.chunked)
    if there != due:
        raise BadImage(f"has {there} of its {due} tiles or strips")
    if page.keyframe.compression not in (tifffile.COMPRESSION.ADOBE_DEFLATE, tifffile.COMPRESSION.DEFLATE):
        return
    declared = math.prod(page.keyframe.chunks) * itemsize
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
        inflate = zlib.decompressobj()
        inflate.decompress(data[offset : offset + count], max(1, declared))
        if inflate.unconsumed_tail and inflate.decompress(inflate.unconsumed_tail, 1):
            raise BadImage("has more compressed data than it declares: refused, as it may be a decompression bomb")


def with_channels(array: np.ndarray, in_chans: int) -> np.ndarray:
    """(H, W, in_chans) uint8 from an array with its channels last, first, or (for one channel) left out."""
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim == 3 and array.shape[2] != in_chans and array.shape[0] == in_chans:
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] != in_chans or 0 in array.shape:
        raise BadImage(f"has shape {array.shape}, which is not an image of {in_chans} channels: see --in_chans")
    if array.size > _MAX_VALUES:
        raise BadImage(f"has {array.size:,} values, more than the {_MAX_VALUES:,} that an image may have")
    return np.require(to_uint8(array), requirements=["C", "W"])


def to_uint8(array: np.ndarray) -> np.ndarray:
    """uint8 unchanged, 16 bits divided by 257 (full range to full range), floating point from [0, 1].

    Wider integers count as 16 bits. Where they end at 255 they may just as well be 8 bits stored in a wide type, and
    are refused: either guess would turn some images black or white.
    """
    if array.dtype == np.uint8:
        return array
    kind = array.dtype.kind
    if kind not in "bfiu":
        raise BadImage(f"has pixels of type {array.dtype}: save them as 8 or 16 bits, or as floats in [0, 1]")
    low, high = array.min(), array.max()
    if kind == "b":
        return array.astype(np.uint8) * np.uint8(255)
    if kind == "f":
        if not (low >= 0 and high <= 1):  # false for NaN too
            raise BadImage("has floating-point pixels outside [0, 1]: scale them first")
        return _by_blocks(array, lambda block: np.round(block * 255))
    if low < 0 or high > 65535:
        raise BadImage(f"has pixels of type {array.dtype} outside 0..65535: scale them to 8 or 16 bits first")
    if array.dtype.newbyteorder("=") != np.uint16 and 0 < high <= 255:
        raise BadImage(
            f"has pixels of type {array.dtype} of at most {high}, which may be 8 bits or dark 16 bits: save them as "
            "uint8 or uint16"
        )
    return _by_blocks(array, lambda block: np.round(block / 257))


def _by_blocks(array: np.ndarray, convert) -> np.ndarray:
    """`convert` applied to blocks of rows, as uint8."""
    out = np.empty(array.shape, dtype=np.uint8)
    rows = max(1, _BLOCK // max(1, array[0].size))
    for start in range(0, len(array), rows):
        out[start : start + rows] = convert(array[start : start + rows])
    return out
