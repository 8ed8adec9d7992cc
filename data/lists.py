"""Lists of images: a text file with `path` or `path label` in each line, or CSV and TSV with or without a header."""

from __future__ import annotations

import csv
import os
import time
from pathlib import Path

import numpy as np

from data import files
from data.cache import cache_folder, entry_name, recall, remember, stamps_of
from data.decode import IMAGE_SUFFIXES
from data.files import Listing
from data.source import PackedStrings, labels_from_words
from runtime.guards import InputError

LIST_SUFFIXES = (".txt", ".csv", ".tsv")


def read_list(file: Path, split: str, check: bool = True) -> Listing:
    """The images of `split` in a list, in its order. Raises `InputError`.

    check: refuse a list that names files which do not exist.
    """
    name = entry_name("list", str(file.resolve()), split)
    taken_ns, stamps = time.time_ns(), stamps_of([file])
    entry = recall(cache_folder() / name)
    if entry is not None and np.array_equal(stamps, entry.get("stamps")):
        listing = Listing.from_arrays(entry)
        if listing is not None:
            return listing
    rows = read_rows(file, split)
    if not rows:
        raise InputError(f"{file} lists no image for {split}: each line should hold a path, or a path and a label")
    root = file.parent
    missing = [path for path, _ in rows if not _is_file(os.path.join(root, path))] if check else []
    if missing:
        some = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise InputError(
            f"{len(missing)} of the {len(rows)} images that {file} lists do not exist ({some}): "
            f"paths are taken relative to {root}; correct the list or leave these lines out"
        )
    labelled = [bool(label) for _, label in rows]
    if any(labelled) and not all(labelled):
        line = labelled.index(False)
        raise InputError(f"{file} has a label in some lines but none for {rows[line][0]}: label all lines or none")
    listing = Listing(PackedStrings.pack(path for path, _ in rows))
    if all(labelled):
        listing.labels, listing.classes = labels_from_words([label for _, label in rows])
    if check and len(rows) >= files.CACHE_FROM:
        remember([cache_folder()], name, {**listing.arrays(), "stamps": stamps}, stamps, taken_ns)
    return listing


def _is_file(path: str) -> bool:
    try:
        return os.path.isfile(path)
    except ValueError:  # a NUL byte: the file is no text
        return False


def read_rows(file: Path, split: str) -> list[tuple[str, str | None]]:
    """(path, label or None) of each image of `split`. Raises `InputError` with the line that makes no sense."""
    try:
        with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
            if file.suffix.lower() == ".txt":
                numbered = [(n, line) for n, line in enumerate(text, 1) if line.strip() and not line.startswith("#")]
                table = [(n, _split_text_line(line)) for n, line in numbered]
            else:
                table = read_csv(file, text)
    except OSError as error:
        raise InputError(f"the list {file} can't be read: {error.strerror or error}") from error
    columns = {"path": 0, "label": 1}
    if table and "path" in [cell.strip().lower() for cell in table[0][1]]:
        columns = {cell.strip().lower(): number for number, cell in enumerate(table.pop(0)[1])}
    needed = max(columns["path"], columns.get("split", 0))
    for line, row in table:
        if len(row) <= needed:
            raise InputError(f"{file}, line {line}: {len(row)} columns, too few for path and split; complete the line")
    if "split" in columns:
        table = [(line, row) for line, row in table if row[columns["split"]].strip() == split]
    elif split == "val" and file.stem != "val":
        raise InputError(f"{file} has no split column, so it has no val images: add one, or give a folder with val.csv")
    path, label = columns["path"], columns.get("label")
    return [
        (row[path].strip(), row[label].strip() if label is not None and label < len(row) else None) for _, row in table
    ]


def read_csv(file: Path, text) -> list[tuple[int, list[str]]]:
    """(line, cells) of each row that is not empty."""
    reader = csv.reader(text, delimiter="\t" if file.suffix.lower() == ".tsv" else ",", strict=True)
    table = []
    try:
        for row in reader:
            if any("\n" in cell or "\r" in cell for cell in row):
                raise csv.Error("a quoted cell goes on in the next line")
            if row:
                table.append((reader.line_num, row))
    except csv.Error as error:
        raise InputError(f"{file}, line {reader.line_num}: {error}; look for a stray quotation mark there") from error
    return table


def _split_text_line(line: str) -> list[str]:
    """`path`, `path<TAB>label`, `path,label` or `path label`."""
    line = line.strip()
    for separator in ("\t", ",", " "):
        head, _, tail = line.rpartition(separator)
        if head and not tail.lower().endswith(IMAGE_SUFFIXES):
            return [head, tail]
    return [line]
