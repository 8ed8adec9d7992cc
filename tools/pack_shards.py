"""Pack a folder or list of images into tar shards that open_images reads by random access.

    python -m tools.pack_shards --data_path ROOT --split train --output_dir SHARDS
    python -m tools.pack_shards --data_path ROOT --split val --output_dir SHARDS
    python main_dino.py --data_path SHARDS ...

Files are copied as they are, in their order, so the shards stand for the same images under the same indices. A shard
gets its name when it is complete; run the same command again after an interruption and it goes on where it stopped.
A few large files spare a cluster's file system the million small ones.
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
from runtime.checkpoint import write_text_atomic
from runtime.cli import add_flag, parse_described
from runtime.guards import EXIT_DONE, InputError, run_program
from runtime.progress import progress
from runtime.terminal import say


def pack(source: ImageSource, output: Path, prefix: str, per_shard: int) -> list[Path]:
    """Write `source` as output/prefix-000000.tar ..., `per_shard` images each; complete shards are left as they are.

    Raises `InputError` where the folder holds shards of another set, or a file can't be read.
    """
    if per_shard < 1:
        raise InputError(f"--images_per_shard {per_shard}: give at least 1")
    output.mkdir(parents=True, exist_ok=True)
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


def _check_same_job(source: ImageSource, file: Path, per_shard: int) -> None:
    """Shards of one prefix must all come from one data set, cut in one way."""
    job = {"images": len(source), "images_per_shard": per_shard, "fingerprint": source.fingerprint()}
    if file.exists():
        before = json.loads(file.read_text())
        if before != job:
            raise InputError(
                f"{file.parent} holds shards of another job ({before}, now {job}): choose another --output_dir or "
                "--prefix, or remove them"
            )
    else:
        write_text_atomic(file, json.dumps(job) + "\n")


def _write_shard(source: ImageSource, shard: Path, indices: range) -> None:
    temporary = shard.with_name(shard.name + ".partial")
    with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
        for i in indices:
            key, suffix = _key(source, i)
            try:
                data = source.read(i)
            except BadImage as error:
                raise InputError(f"{source.name(i)} {error}: restore it, or leave it out of the list") from error
            _add(tar, f"{key}{suffix}", data)
            if source.labels is not None:
                _add(tar, f"{key}.cls", str(source.labels[i]).encode())
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, shard)


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
    group = parser.add_argument_group("shards")
    add_flag(group, "--output_dir", required=True, help="folder of the shards; one may hold train and val")
    add_flag(group, "--prefix", default="", help="start of the shards' names; default: the split")
    add_flag(group, "--images_per_shard", type=int, default=10_000, help="images in each shard but the last")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = parse_described(get_args_parser(), __doc__, argv)
    source = open_images(args.data_path, args.split, args.subset)
    shards = pack(source, Path(args.output_dir), args.prefix or args.split, args.images_per_shard)
    say(f"{len(source)} images in {len(shards)} shards: --data_path {args.output_dir}")
    return EXIT_DONE


if __name__ == "__main__":
    run_program(main)
