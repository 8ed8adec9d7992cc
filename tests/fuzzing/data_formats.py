"""Fuzzing of what the data package reads: images, shards and their indices, lists, the caches of folders.

Every function of `FORMATS` makes one case in a scratch folder from a generator, reads it, and returns "read" or
"refused". It raises `AssertionError` if anything but an error of one line came (`InputError`, `BadImage`), if pixels
have another form than promised, or if damage to a file that is sealed by checksums changed what was read.
"""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

from data import files
from data.cache import recall
from data.datasets import open_images
from data.decode import BadImage, Picture
from data.source import ImageSource
from runtime.guards import InputError
from tools.pack_shards import pack

READ, REFUSED = "read", "refused"
_BROKEN_STEM = "a\nb"
_EXTREMES = (0, 1, 0x7F, 0x80, 0xFF)


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """`data` with flipped bits, a piece cut off, moved, repeated or overwritten; sometimes several of these."""
    for _ in range(rng.integers(1, 4)):
        if not data:
            break
        content = bytearray(data)
        # headers are short and decide most: half of the damage is done to the first 64 bytes
        size = len(content) if rng.random() < 0.5 else min(len(content), 64)
        at = int(rng.integers(size))
        length = int(rng.integers(1, 9))
        other = int(rng.integers(len(content)))
        kind = rng.integers(6)
        if kind == 0:
            for place in rng.integers(size, size=int(rng.integers(1, 16))):
                content[place] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            del content[max(1, other) :]
        elif kind == 2:
            content[at : at + length] = bytes([_EXTREMES[rng.integers(5)]]) * length
        elif kind == 3:  # fields change places
            content[at : at + length], content[other : other + length] = (
                content[other : other + length],
                content[at : at + length],
            )
        elif kind == 4:
            content[at:at] = content[other : other + length * 16]
        else:
            del content[at : at + length]
        data = bytes(content)
    return data


@contextlib.contextmanager
def _one_line_errors() -> Iterator[list[str]]:
    """Errors of bad input inside the block, of which each must be one line; any other error is a failure."""
    errors: list[str] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow and tifffile warn of what they see in damaged headers
            yield errors
    except (InputError, BadImage) as error:
        errors.append(str(error))
    except Exception as error:
        raise AssertionError(f"{type(error).__name__} where InputError or BadImage is due: {error}") from error
    for message in errors:
        assert message, "an error without a message"
        # a name with a line break is escaped by the terminal, which writes all messages
        assert "\n" not in message.replace(_BROKEN_STEM, ""), f"an error of several lines: {message!r}"


def _outcome(errors: list[str]) -> str:
    return REFUSED if errors else READ


# ---- images ----


def _picture(rng: np.random.Generator, mode: str) -> Image.Image:
    """A small picture with smooth parts and noise."""
    width, height = (int(side) for side in rng.integers(3, 40, size=2))
    ramp = np.linspace(0, 200, width * height * 3).reshape(height, width, 3)
    pixels = (ramp + rng.integers(0, 50, size=ramp.shape)).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def _image_format(modes: tuple[str, ...], kind: str, **options) -> Callable[[np.random.Generator, Path], str]:
    def case(rng: np.random.Generator, _folder: Path) -> str:
        buffer = io.BytesIO()
        chosen = {key: values[rng.integers(len(values))] for key, values in options.items()}
        _picture(rng, modes[rng.integers(len(modes))]).save(
            buffer, kind, **{key: value for key, value in chosen.items() if value is not None}
        )
        return _decode(damaged(buffer.getvalue(), rng), 3 if rng.random() < 0.8 else 1, rng)

    return case


def _decode(data: bytes, in_chans: int, rng: np.random.Generator) -> str:
    with _one_line_errors() as errors:
        picture = Picture(data, in_chans)
        shrink = int(rng.choice([1, 1, 2, 8]))
        pixels = picture.pixels(shrink)
        assert pixels.dtype == np.uint8, pixels.dtype
        assert pixels.ndim == 3, pixels.shape
        assert pixels.shape[2] == in_chans, pixels.shape
        for side, declared in zip(pixels.shape, (picture.height, picture.width), strict=False):
            assert side == declared or (shrink > 1 and -(-declared // shrink) <= side <= declared), (side, declared)
    return _outcome(errors)


def _exif(rng: np.random.Generator) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = int(rng.integers(0, 11))
    exif[0x010E] = "a description"
    return exif.tobytes()


def _jpeg_with_exif(rng: np.random.Generator, _folder: Path) -> str:
    """Damage to the EXIF block alone must cost no image."""
    buffer = io.BytesIO()
    _picture(rng, "RGB").save(buffer, "JPEG")
    block = _exif(rng)
    block = block[:6] + damaged(block[6:], rng)
    data = buffer.getvalue()
    segment = b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block
    outcome = _decode(data[:2] + segment + data[2:], 3, rng)
    assert outcome == READ, "a damaged EXIF block cost an image"
    return outcome


def _npy(rng: np.random.Generator, _folder: Path) -> str:
    buffer = io.BytesIO()
    kind = ["u1", "<u2", ">u2", "i4", "f4", "f8", "?"][rng.integers(7)]
    pixels = np.asarray(_picture(rng, "RGB")).astype(kind) / (255 if kind[0] == "f" else 1)
    np.save(buffer, np.asarray(pixels, dtype=kind))
    return _decode(damaged(buffer.getvalue(), rng), 3, rng)


def _tiff(rng: np.random.Generator, _folder: Path) -> str:
    import tifffile

    pixels = rng.integers(0, 255, size=(int(rng.integers(4, 40)), 16, 5)).astype(np.uint16) * 257
    buffer = io.BytesIO()
    compression = [None, "zlib"][rng.integers(2)]
    tifffile.imwrite(buffer, pixels, photometric="minisblack", compression=compression)
    return _decode(damaged(buffer.getvalue(), rng), 5, rng)


# ---- shards, lists, caches ----


def _files(rng: np.random.Generator, folder: Path) -> Path:
    """Class folders with six good images, whose time stamps are old enough to be kept in a cache."""
    root = folder / "images"
    for i in range(6):
        place = root / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        _picture(rng, "RGB").save(place / f"{i}.png")
    for place in (root, root / "a", root / "b"):
        os.utime(place, (1e9, 1e9))
    return root


def _shards(rng: np.random.Generator, folder: Path) -> Path:
    root = folder / "shards"
    pack(open_images(_files(rng, folder)), root, "train", 3)
    for shard in root.glob("*.tar"):
        os.utime(shard, (1e9, 1e9))
    return root


def _load_all(source: ImageSource, errors: list[str]) -> None:
    for i in range(len(source)):
        try:
            assert source.load(i).dtype == np.uint8
        except BadImage as error:
            errors.append(str(error))


@contextlib.contextmanager
def _cache_in(folder: Path) -> Iterator[None]:
    """The caches in `folder`, also for small sets, and no progress on the terminal."""
    quiet = contextlib.redirect_stdout(io.StringIO())
    settings = mock.patch.dict(os.environ, {"SIMPOOL_CACHE": str(folder / "cache")})
    with settings, quiet, contextlib.redirect_stderr(io.StringIO()), mock.patch.object(files, "CACHE_FROM", 1):
        yield


def _shard(rng: np.random.Generator, folder: Path) -> str:
    with _cache_in(folder):
        root = _shards(rng, folder)
        shard = root / f"train-00000{rng.integers(2)}.tar"
        shard.write_bytes(damaged(shard.read_bytes(), rng))
        with _one_line_errors() as errors:
            source = open_images(root)
            assert len(source) == 6, f"{len(source)} of 6 packed images without a word"
            _load_all(source, errors)
    return _outcome(errors)


def _shard_headers(rng: np.random.Generator, folder: Path) -> str:
    """Whole headers with valid checksums and odd fields, of shards that nobody recorded."""
    names = [
        "1.png",
        "1.cls",
        "../x.png",
        "/etc/x.png",
        "a/b.c.png",
        "",
        "x" * 300 + ".png",
        f"{_BROKEN_STEM}.png",
        "._a.png",
    ]
    types = [tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.GNUTYPE_SPARSE, tarfile.FIFOTYPE, b"?"]
    buffer = io.BytesIO()
    _picture(rng, "RGB").save(buffer, "PNG")
    path = folder / "x.tar"
    with open(path, "wb") as file:
        for _ in range(rng.integers(1, 6)):
            member = tarfile.TarInfo(names[rng.integers(len(names))])
            member.type = types[max(0, int(rng.integers(-6, len(types))))]
            content = buffer.getvalue() if rng.random() < 0.7 else b"7"
            member.size = len(content) if rng.random() < 0.8 else int(rng.integers(2**33))
            file.write(member.tobuf([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT][rng.integers(2)]))
            file.write(content + bytes(-len(content) % 512))
        file.write(bytes(1024 if rng.random() < 0.8 else 512))
    with _cache_in(folder), _one_line_errors() as errors:
        _load_all(open_images(path), errors)
    return _outcome(errors)


def _sealed_cache(rng: np.random.Generator, folder: Path, root: Path, entries: str) -> str:
    """Damage to a cache changes nothing: its arrays carry checksums, and it is made again."""
    first = open_images(root).fingerprint()
    (entry,) = folder.glob(entries)
    if rng.random() < 0.5:
        entry.write_bytes(damaged(entry.read_bytes(), rng))
        sealed = True
    else:  # whole arrays under wrong names, of wrong types and sizes, with right checksums
        arrays = recall(entry)
        names = list(arrays)
        name, other = (names[rng.integers(len(names))] for _ in range(2))
        changes = (
            lambda: arrays.pop(name),
            lambda: arrays.update({name: arrays[other]}),
            lambda: arrays.update({name: arrays[name].astype(np.float64)}),
            lambda: arrays.update({name: arrays[name][: len(arrays[name]) // 2]}),
            lambda: arrays.update({name: arrays[name][None]}),
            lambda: arrays.update({name: arrays[name] + arrays[name].dtype.type(rng.integers(100))}),
        )
        changes[rng.integers(len(changes))]()
        np.savez(entry, **arrays)
        sealed = False
    with _one_line_errors() as errors:
        source = open_images(root, check=sealed)
        assert not sealed or source.fingerprint() == first, "a damaged cache changed the data set"
        _load_all(source, errors)
        assert not (sealed and errors), errors
    return _outcome(errors)


def _shard_index(rng: np.random.Generator, folder: Path) -> str:
    with _cache_in(folder):
        return _sealed_cache(rng, folder, _shards(rng, folder), "shards/.shards-*.npz")


def _folder_cache(rng: np.random.Generator, folder: Path) -> str:
    with _cache_in(folder):
        return _sealed_cache(rng, folder, _files(rng, folder), "cache/*.npz")


def _list(rng: np.random.Generator, folder: Path) -> str:
    root = _files(rng, folder)
    suffix = [".txt", ".csv", ".tsv"][rng.integers(3)]
    separator = {".txt": " ", ".csv": ",", ".tsv": "\t"}[suffix]
    lines = [f"{p.parent.name}/{p.name}{separator}{p.parent.name}" for p in sorted(root.rglob("*.png"))]
    if suffix != ".txt" and rng.random() < 0.5:
        lines = [f"path{separator}label{separator}split"] + [f"{line}{separator}train" for line in lines]
    if rng.random() < 0.3:
        lines[rng.integers(len(lines))] += ['"', ',"', "\0", separator, "\r", "9" * 25][rng.integers(6)]
    path = root / f"l{suffix}"
    path.write_bytes(damaged("\n".join(lines).encode(), rng))
    with _cache_in(folder), _one_line_errors() as errors:
        _load_all(open_images(path), errors)
    return _outcome(errors)


FORMATS: dict[str, Callable[[np.random.Generator, Path], str]] = {
    "jpeg": _image_format(("RGB", "L", "CMYK"), "JPEG", progressive=(None, True), quality=(30, 95)),
    "jpeg_exif": _jpeg_with_exif,
    "png": _image_format(("RGB", "RGBA", "L", "P", "1", "I;16"), "PNG"),
    "webp": _image_format(("RGB", "RGBA"), "WEBP", lossless=(False, True)),
    "bmp": _image_format(("RGB", "L", "P"), "BMP"),
    "tiff": _image_format(("RGB", "L", "F", "CMYK"), "TIFF", compression=(None, "tiff_deflate", "tiff_lzw")),
    "ppm": _image_format(("RGB", "L"), "PPM"),
    "gif": _image_format(("RGB", "P"), "GIF"),
    "npy": _npy,
    "tiff_of_channels": _tiff,
    "shard": _shard,
    "shard_headers": _shard_headers,
    "shard_index": _shard_index,
    "folder_cache": _folder_cache,
    "list": _list,
}
