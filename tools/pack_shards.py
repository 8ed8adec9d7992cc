"""Pack a folder or list of images into tar shards that open_images reads by random access.

    python -m tools.pack_shards --data_path ROOT --split train --output_dir SHARDS
    python -m tools.pack_shards --data_path ROOT --split val --output_dir SHARDS
    python main_dino.py --data_path SHARDS ...

Files are copied as they are, in their order, so the shards stand for the same images under the same indices. A shard
gets its name when it is complete; after an interruption, the same command continues where it stopped. How many images
were packed is recorded beside the shards, and checked when they are opened. A few large files spare a cluster's file
system the million small ones.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import tarfile
from pathlib import Path

from data.datasets import SPLITS, open_images
from data.decode import BadImage
from data.source import ImageSource
from runtime.checkpoint import check_writable, fsync_folder, write_text_atomic
from runtime.cli import add_flag, parse_described
from runtime.guards import EXIT_DONE, InputError, run_program
from runtime.progress import progress
from runtime.terminal import say


def pack(source: ImageSource, output: Path, prefix: str, per_shard: int) -> list[Path]:
    """Write `source` as output/prefix-000000.tar ..., `per_shard` images each; complete shards are left as they are.

    Raises `InputError` if the folder can't be written or holds shards of another set, if a class can't be a folder in a
    shard, or a file can't be read.
    """
    if per_shard < 1:
        raise InputError(f"--images_per_shard {per_shard}: give at least 1")
    if not prefix or "/" in prefix or prefix.startswith("."):
        raise InputError(f"--prefix {prefix!r} can't start a file's name: use letters, digits, - and _")
    _check_classes(source)
    check_writable(output, "--output_dir")
    _check_same_job(source, output / f"{prefix}.json", per_shard)
    starts = range(0, len(source), per_shard)
    shards = [output / f"{prefix}-{number:06d}.tar" for number in range(len(starts))]
    kept = sum(shard.exists() for shard in shards)
    if kept:
        say(f"{kept} of {len(shards)} shards are there already")
    for shard, start in progress(list(zip(shards, starts, strict=True)), desc="packing shards", unit="shard"):
        if not shard.exists():
            _write_shard(source, shard, range(start, min(start + per_shard, len(source))))
    return shards


def _check_classes(source: ImageSource) -> None:
    """Classes become folders inside the shards: a list's label must not lead out of them, or hide its images."""
    for name in source.classes or []:
        if not name or name.startswith(".") or not name.isprintable() or set(name) & set("/\\"):
            raise InputError(
                f"the class {name!r} can't be a folder in a shard: use labels without /, \\ and control characters, "
                "which do not start with a dot"
            )


def _check_same_job(source: ImageSource, file: Path, per_shard: int) -> None:
    """Shards of one prefix must all come from one data set, cut in one way."""
    job = {"images": len(source), "images_per_shard": per_shard, "fingerprint": source.fingerprint()}
    if file.exists():
        try:
            before = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"{file} can't be read ({error}): choose another --output_dir or --prefix") from error
        if before != job:
            raise InputError(
                f"{file.parent} holds shards of another job ({before}, now {job}): choose another --output_dir or "
                "--prefix, or remove them"
            )
    else:
        write_text_atomic(file, json.dumps(job) + "\n")


def _write_shard(source: ImageSource, shard: Path, indices: range) -> None:
    temporary = shard.with_name(shard.name + ".partial")
    try:
        temporary.unlink(missing_ok=True)  # half a shard; or a link, which must not be followed
        with open(temporary, "xb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
                for i in indices:
                    _add_image(tar, source, i)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, shard)
        fsync_folder(shard.parent)
    except OSError as error:
        raise InputError(f"{temporary} can't be written: {error.strerror or error}") from error


def _add_image(tar: tarfile.TarFile, source: ImageSource, i: int) -> None:
    key, suffix = _key(source, i)
    try:
        data = source.read(i)
    except BadImage as error:
        raise InputError(f"{source.name(i)} {error}: restore it, or leave it out of the list") from error
    _add(tar, f"{key}{suffix}", data)
    if source.labels is not None:
        _add(tar, f"{key}.cls", str(source.labels[i]).encode())


def _key(source: ImageSource, i: int) -> tuple[str, str]:
    """`class/00000012-name` and `.jpg`: WebDataset ends a key at the first dot, so the name keeps none."""
    stem, suffix = os.path.splitext(os.path.basename(source.name(i)))
    key = f"{i:08d}-{re.sub(r'[^A-Za-z0-9_-]', '_', stem)}"
    return (key if source.labels is None else f"{source.classes[source.labels[i]]}/{key}"), suffix.lower()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("pack_shards", add_help=False)
    group = parser.add_argument_group("data")
    add_flag(group, "--data_path", required=True, help="folder or list of images, as for main_dino.py")
    add_flag(group, "--split", default="train", choices=SPLITS, help="which images of a root with train and val")
    add_flag(group, "--subset", type=int, default=-1, help="first images of each class; -1: all")
    add_flag(group, "--in_chans", type=int, default=3, help="channels that an image must have, as for main_dino.py")
    group = parser.add_argument_group("shards")
    add_flag(group, "--output_dir", required=True, help="folder of the shards; one may hold train and val")
    add_flag(group, "--prefix", default="", help="start of the shards' names; default: the split")
    add_flag(group, "--images_per_shard", type=int, default=10_000, help="images in each shard but the last")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = parse_described(get_args_parser(), __doc__, argv, "python -m tools.pack_shards")
    source = open_images(args.data_path, args.split, args.subset, args.in_chans)
    shards = pack(source, Path(args.output_dir), args.prefix or args.split, args.images_per_shard)
    say(f"{len(source)} images in {len(shards)} shards: --data_path {args.output_dir}")
    return EXIT_DONE


if __name__ == "__main__":
    run_program(main)
