"""Reading the boxes of objects: PASCAL VOC, COCO, the metadata folders of wsolevaluation, and plain CSV.

    VOC     a folder or a tar with JPEGImages/, Annotations/*.xml and ImageSets/Main/trainval.txt
    COCO    instances_*.json
    WSOL    a folder with image_ids.txt, image_sizes.txt (id,w,h) and localization.txt (id,x0,y0,x1,y1)
    CSV     image,x0,y0,x1,y1 in each line, with or without that header

Every reader returns boxes as (x0, y0, x1, y1) in pixels, the far edge not part of the box: VOC's xmin and ymin, which
count from 1, are lowered by 1; COCO's corners x, y, x + w, y + h are each rounded to a whole number, half to even, as
object discovery does. Annotations come from elsewhere, so every size is bounded, and XML must not declare anything.
"""

from __future__ import annotations

import contextlib
import json
import math
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.parsers import expat

from data.decode import IMAGE_SUFFIXES
from data.lists import read_csv
from runtime.guards import InputError

WSOL_FILES = ("image_ids.txt", "image_sizes.txt", "localization.txt")
_MOST_XML = 4 << 20  # bytes; VOC's largest has 20,000
_MOST_TEXT = 4 << 30  # bytes of a JSON or a text; COCO's largest has 450 million
_DEEPEST = 32  # elements within each other in XML
_MOST_OBJECTS = 10_000  # in one image
_LARGEST_SIDE = 1_000_000  # pixels
_COLUMNS = ("image", "x0", "y0", "x1", "y1")

Box = tuple[float, float, float, float]


class Annotation(NamedTuple):
    """What a file says of one image: its name there, its boxes, its (width, height) if known, and where it stands."""

    image: str
    boxes: list[Box]
    size: tuple[int, int] | None
    where: str


class Problem(NamedTuple):
    """An annotation that can't be used."""

    image: str
    message: str


Found = tuple[list[Annotation], list[Problem]]


def kind_of(path: Path) -> str | None:
    """ "voc", "coco", "wsol" or "csv", judged by what lies at `path`; None for anything else."""
    if path.is_dir():
        if all((path / name).is_file() for name in WSOL_FILES):
            return "wsol"
        return "voc" if voc_root(path) is not None else None
    if not path.is_file():
        return None
    if path.suffix.lower() == ".tar":
        return "voc" if _TarFiles.has_annotations(path) else None
    return {".json": "coco", ".csv": "csv"}.get(path.suffix.lower())


def read_annotations(path: Path, wanted: Sequence[str] | None = None) -> Found:
    """The annotations at `path`, and those that can't be used.

    wanted: names of the images to keep, with or without folder and suffix. Raises InputError for a file that makes no
    sense, and for a wanted image that is not annotated.
    """
    readers: dict[str, Callable[[Path], Found]] = {"coco": read_coco, "wsol": read_wsol, "csv": read_boxes_csv}
    kind = kind_of(path)
    if kind is None:
        raise InputError(
            f"{path} holds no boxes that are known here: give a PASCAL VOC folder or tar, a COCO .json, a folder with "
            f"{', '.join(WSOL_FILES)}, or a .csv with {','.join(_COLUMNS)} in each line"
        )
    try:
        if kind == "voc":
            return read_voc(path, wanted)
        found, problems = readers[kind](path)
    except (OSError, tarfile.TarError) as error:
        raise InputError(f"the annotations {path} can't be read: {getattr(error, 'strerror', 0) or error}") from error
    if wanted is None:
        return found, problems
    keys = {_key(name) for name in wanted}
    missing = keys - {_key(a.image) for a in found}
    if missing:
        raise InputError(f"{path} has no image {some(sorted(missing))}, which the list of images names")
    return [a for a in found if _key(a.image) in keys], [p for p in problems if _key(p.image) in keys]


def read_names(path: Path) -> list[str]:
    """The first word of each line of a list of images. Raises InputError."""
    names = [line.split()[0] for line in _text(path).splitlines() if line.strip()]
    if not names:
        raise InputError(f"{path} names no image: write one file name in each line")
    return names


def some(names: Sequence[str], most: int = 3) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def without_suffix(name: str) -> str:
    """A file name without the suffix of an image, if it has one."""
    return name.rpartition(".")[0] if name.lower().endswith(IMAGE_SUFFIXES) else name


def _key(name: str) -> str:
    return without_suffix(name.rpartition("/")[2])


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _MOST_TEXT:
            raise InputError(f"{path} has more than {_MOST_TEXT:,} bytes: is it the right file?")
        return path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror or error}") from error


def _number(value: Any, where: str) -> float:
    """A finite number, whole ones without a fraction. Raises InputError."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise InputError(f"{where}: {str(value)[:40]!r} is not a number")
    return number


def _size(width: Any, height: Any, where: str) -> tuple[int, int]:
    """A picture's (width, height). Raises InputError for anything that no picture has."""
    sides = (_number(width, where), _number(height, where))
    if not all(1 <= side <= _LARGEST_SIDE for side in sides):
        raise InputError(f"{where}: a picture of {width} x {height} pixels; give its real size")
    return int(sides[0]), int(sides[1])


# ---- PASCAL VOC -----------------------------------------------------------------------------------------------------


class _FolderFiles:
    """The texts of a VOC folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def ids(self) -> list[str]:
        return sorted(path.stem for path in (self.root / "Annotations").glob("*.xml"))

    def read(self, name: str) -> bytes | None:
        """A file below the root, None if it does not exist. Raises InputError if it is too large."""
        path = self.root / name
        if not path.is_file():
            return None
        with open(path, "rb") as file:
            return _bounded(file.read(_MOST_XML + 1), str(path))

    def place(self, name: str) -> str:
        return str(self.root / name)


class _TarFiles:
    """The texts of a VOC folder inside a tar."""

    def __init__(self, path: Path, tar: tarfile.TarFile) -> None:
        self.path, self.tar = path, tar
        self.members = {m.name.removeprefix("./"): m for m in tar if m.isfile() and not m.issparse()}
        roots = {name.partition("Annotations/")[0] for name in self.members if _is_annotation(name)}
        if len(roots) != 1:
            raise InputError(f"{path} holds {len(roots)} folders with Annotations/: pack one of {some(sorted(roots))}")
        self.root = roots.pop()

    @staticmethod
    def has_annotations(path: Path) -> bool:
        try:
            with tarfile.open(path, "r:") as tar:
                return any(_is_annotation(member.name) for member in tar)
        except (OSError, tarfile.TarError):
            return False

    def ids(self) -> list[str]:
        return sorted(Path(name).stem for name in self.members if _is_annotation(name))

    def read(self, name: str) -> bytes | None:
        member = self.members.get(self.root + name)
        if member is None:
            return None
        return _bounded(self.tar.extractfile(member).read(_MOST_XML + 1), self.place(name))

    def place(self, name: str) -> str:
        return f"{self.path}:{self.root}{name}"


@contextlib.contextmanager
def _voc_files(path: Path) -> Iterator[_FolderFiles | _TarFiles]:
    if path.is_dir():
        yield _FolderFiles(voc_root(path))
        return
    with tarfile.open(path, "r:") as tar:
        yield _TarFiles(path, tar)


def _is_annotation(name: str) -> bool:
    folder, _, base = name.removeprefix("./").rpartition("/")
    return folder.rpartition("/")[2] == "Annotations" and base.endswith(".xml") and base[0] != "."


def _bounded(data: bytes, where: str) -> bytes:
    if len(data) > _MOST_XML:
        raise InputError(f"{where} is larger than {_MOST_XML >> 20} MB, which no annotation of one image is")
    return data


def voc_root(folder: Path) -> Path | None:
    """The folder itself or the one below it that has JPEGImages and Annotations; None if not exactly one has."""
    candidates = [folder]
    if not (folder / "Annotations").is_dir():
        candidates = sorted(path for path in folder.iterdir() if path.is_dir())
    found = [place for place in candidates if (place / "Annotations").is_dir() and (place / "JPEGImages").is_dir()]
    return found[0] if len(found) == 1 else None


def read_voc(path: Path, wanted: Sequence[str] | None = None) -> Found:
    """A VOC folder or tar: the images that ImageSets/Main/trainval.txt or `wanted` names; without both, all."""
    with _voc_files(path) as files:
        return _read_voc(files, wanted)


def _read_voc(files: _FolderFiles | _TarFiles, wanted: Sequence[str] | None) -> Found:
    listed = files.read("ImageSets/Main/trainval.txt")
    where = files.place("ImageSets/Main/trainval.txt") if wanted is None else "the list of images"
    if wanted is not None:
        ids = [_key(name) for name in wanted]
    elif listed is not None:
        ids = [line.split()[0] for line in listed.decode("utf-8", "replace").splitlines() if line.strip()]
    else:
        ids = files.ids()
    found, problems = [], []
    for number in dict.fromkeys(ids):
        place = files.place(f"Annotations/{number}.xml")
        data = files.read(f"Annotations/{number}.xml")
        if data is None:
            problems.append(Problem(number, f"{where} names {number}, but {place} does not exist"))
            continue
        size, boxes = parse_voc(data, place)
        found.append(Annotation(number, boxes, size, place))
    return found, problems


def parse_voc(data: bytes, where: str) -> tuple[tuple[int, int] | None, list[Box]]:
    """(size or None, boxes) of one XML file. Boxes of an object's parts are left out. Raises InputError."""
    path: list[str] = []
    objects: list[dict[str, str]] = []
    size: dict[str, str] = {}

    def start(name: str, _attributes: dict) -> None:
        path.append(name)
        if len(path) > _DEEPEST:
            raise InputError(f"{where}: more than {_DEEPEST} elements within each other; this is no VOC annotation")
        if path[1:] == ["object"]:
            if len(objects) == _MOST_OBJECTS:
                raise InputError(f"{where}: more than {_MOST_OBJECTS:,} objects in one image")
            objects.append({})

    def text(content: str) -> None:
        place = path[1:-1]
        target = objects[-1] if place == ["object", "bndbox"] else size if place == ["size"] else None
        if target is not None:
            target[path[-1]] = (target.get(path[-1], "") + content)[:40]

    def refuse(*_: Any) -> None:
        raise InputError(f"{where} declares a document type, which may hide an entity bomb: remove its <!DOCTYPE ...>")

    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = start, lambda _name: path.pop()
    parser.CharacterDataHandler = text
    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = refuse
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        raise InputError(f"{where} is not XML: {error}") from error
    boxes = []
    for number, corners in enumerate(objects, 1):
        missing = [name for name in ("xmin", "ymin", "xmax", "ymax") if name not in corners]
        if missing:
            raise InputError(f"{where}: object {number} has no {missing[0]} in its bndbox")
        x0, y0, x1, y1 = (_number(corners[name], where) for name in ("xmin", "ymin", "xmax", "ymax"))
        boxes.append((x0 - 1, y0 - 1, x1, y1))
    sides = [size.get(name, "0").strip() for name in ("width", "height")]
    return (None if "0" in sides else _size(*sides, where)), boxes  # some tools write 0 for a size that they don't know


# ---- COCO -----------------------------------------------------------------------------------------------------------


def read_coco(path: Path) -> Found:
    """A COCO file of instances; crowds are left out, and so are boxes that rounding leaves without a pixel."""
    try:
        content = json.loads(_text(path), object_hook=_slim)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {' '.join(str(error).split())[:200]}") from error
    images, annotations = (content.get(k) if isinstance(content, dict) else None for k in ("images", "annotations"))
    if not isinstance(images, list) or not isinstance(annotations, list):
        raise InputError(f"{path} is no COCO file of instances: it needs lists under images and annotations")
    by_id: dict[Any, Annotation] = {}
    for image in images:
        if not isinstance(image, dict) or not isinstance(image.get("file_name"), str) or not _is_id(image.get("id")):
            raise InputError(f"{path}: image {str(image)[:80]} needs an id and a file_name")
        sides = [image.get(side) for side in ("width", "height")]
        where = f"{path}, image {image['id']}"
        size = _size(*sides, where) if None not in sides else None
        by_id[image["id"]] = Annotation(image["file_name"], [], size, where)
    for annotation in annotations:
        if not isinstance(annotation, dict) or not _is_id(annotation.get("image_id")):
            raise InputError(f"{path}: annotation {str(annotation)[:80]} needs an image_id")
        if annotation["image_id"] not in by_id:
            raise InputError(f"{path}: an annotation is of image {annotation['image_id']}, which images does not list")
        image = by_id[annotation["image_id"]]
        box = annotation.get("bbox")
        if annotation.get("iscrowd"):
            continue
        if not isinstance(box, list) or len(box) != 4:
            raise InputError(f"{image.where}: bbox {str(box)[:60]} is not x, y, width, height")
        x, y, width, height = (_number(value, image.where) for value in box)
        if width < 0 or height < 0:
            raise InputError(f"{image.where}: bbox {box} has a negative side")
        corners = (round(x), round(y), round(x + width), round(y + height))
        if corners[0] < corners[2] and corners[1] < corners[3]:
            image.boxes.append(corners)
    return list(by_id.values()), []


def _slim(entry: dict[str, Any]) -> dict[str, Any]:
    """An object without the outlines, which are nearly all of a COCO file."""
    entry.pop("segmentation", None)
    return entry


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


# ---- wsolevaluation, CSV --------------------------------------------------------------------------------------------


def read_wsol(folder: Path) -> Found:
    """The metadata folder of one split of wsolevaluation."""
    ids_file, sizes_file, boxes_file = (folder / name for name in WSOL_FILES)
    sizes = {}
    for line, (image, *sides) in _rows(sizes_file, 3):
        sizes[image] = _size(*sides, f"{sizes_file}, line {line}")
    found: dict[str, Annotation] = {}
    for image in dict.fromkeys(line.strip() for line in _text(ids_file).splitlines() if line.strip()):
        if image not in sizes:
            raise InputError(f"{sizes_file} has no size of {image}, which {ids_file} names")
        found[image] = Annotation(image, [], sizes[image], str(boxes_file))
    for line, (image, *corners) in _rows(boxes_file, 5):
        if image not in found:
            raise InputError(f"{boxes_file}, line {line}: {image} is not one of the images of {ids_file}")
        found[image].boxes.append(tuple(_number(c, f"{boxes_file}, line {line}") for c in corners))
    return list(found.values()), []


def _rows(path: Path, columns: int) -> Iterable[tuple[int, list[str]]]:
    """(line, cells) of a text whose cells are divided by commas; a comma in an image's name belongs to the name."""
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        cells = [cell.strip() for cell in line.rsplit(",", columns - 1)]
        if len(cells) != columns:
            raise InputError(f"{path}, line {number}: {len(cells)} values and not {columns}")
        yield number, cells


def read_boxes_csv(path: Path) -> Found:
    """One box in each line; several lines make several boxes of an image, and a line without corners makes none."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        table = read_csv(path, text)
    order = list(range(len(_COLUMNS)))
    if table:
        header = [cell.strip().lower() for cell in table[0][1]]
        if "image" in header or "x0" in header:
            missing = [name for name in _COLUMNS if name not in header]
            if missing:
                raise InputError(f"{path} has no column {missing[0]}: its header should be {','.join(_COLUMNS)}")
            order = [header.index(name) for name in _COLUMNS]
            table = table[1:]
    found: dict[str, Annotation] = {}
    for line, row in table:
        if len(row) <= max(order):
            raise InputError(f"{path}, line {line}: {len(row)} values, but {','.join(_COLUMNS)} are needed")
        image, *corners = (row[column].strip() for column in order)
        annotation = found.setdefault(image, Annotation(image, [], None, str(path)))
        if any(corners):
            annotation.boxes.append(tuple(_number(corner, f"{path}, line {line}") for corner in corners))
    return list(found.values()), []
