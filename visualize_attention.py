"""Attention maps of one or several checkpoints as pictures: single ones, one labelled grid, or a video's frames.

    python visualize_attention.py --pretrained_weights checkpoint.pth --image_path photo.jpg more/ --threshold .6
    python visualize_attention.py --pretrained_weights official.pth simpool.pth --data_path demo --num_images 8
    python visualize_attention.py --pretrained_weights output/checkpoint.pth --image_path frames/ --video

Works for every model with an attention map: SimPool on any backbone, and the [CLS] heads of an official ViT. Writes to
attention/ beside the (first) checkpoint, or to --output_dir: grid.png, and for each image and model its map, overlay,
mask (with --threshold) and, for several heads, each head's map. The flags of DINO's program keep their names.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.datasets import FileSource, open_images
from data.decode import BadImage
from data.source import ImageSource, PackedStrings
from evaluation import attention, options, records
from runtime.cli import add_flag, parse_program
from runtime.distributed import choose_device
from runtime.guards import EXIT_DONE, InputError, input_errors, run_program
from runtime.progress import progress
from runtime.reproduce import fix_random_seeds
from runtime.terminal import say
from utils import LoadedModel, load_checkpoint_model

VIDEO_BATCH = 8


def get_args_parser() -> argparse.ArgumentParser:
    """The flags; those of DINO's program keep their names and meaning."""
    parser = options.evaluation_parser("visualize_attention")
    group = parser.add_argument_group("images")
    add_flag(group, "--image_path", nargs="+", default=None, help="image files and folders of images")
    add_flag(group, "--data_path", default=None, help="or a data set: its first images (val, where it has one)")
    add_flag(group, "--num_images", type=int, default=8, help="how many images of a folder or data set")
    add_flag(group, "--image_size", type=int, nargs="+", default=None,
             help="input height and width (default: 480 480, or the model's own where that is under 96)")  # fmt: skip
    group = parser.add_argument_group("pictures")
    add_flag(group, "--output_dir", default=None, help="folder to write to (default: attention/ beside the checkpoint)")
    add_flag(group, "--threshold", type=float, default=None, help="also masks that hold this part of the attention")
    add_flag(group, "--per_head", action="store_true", help="also every [CLS] head in the grid")
    add_flag(group, "--interpolation", choices=("bicubic", "nearest"), default="bicubic", help="how maps are enlarged")
    add_flag(group, "--titles", nargs="+", default=None, help="names of the models in the grid, one per checkpoint")
    add_flag(group, "--video", action="store_true", help="treat the images as frames: overlays in order, and a GIF")
    add_flag(group, "--fps", type=float, default=25.0, help="frames per second of the GIF")
    options.add_checkpoint_flags(parser, many=True)
    group = parser.add_argument_group("running")
    add_flag(group, "--device", default="auto", help="auto, cuda, cuda:N, mps or cpu")
    add_flag(group, "--local_rank", type=int, default=0, help="accepted and ignored, as in the other programs")
    add_flag(group, "--seed", type=int, default=0, help="seed of the weights where no checkpoint is given")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    args = parse_program("visualize_attention.py", get_args_parser(), __doc__, argv)
    options.check_positive(args, "num_images")
    if args.threshold is not None and not 0 < args.threshold <= 1:
        raise InputError(f"--threshold {args.threshold}: give the part of the attention to keep, above 0, at most 1")
    first = Path(args.pretrained_weights[0]).parent if args.pretrained_weights else Path(".")
    folder = records.output_folder(args.output_dir or first / "attention", None)
    models = load_models(args)
    source, indices = open_selection(args)
    size = input_size(args, list(models.values()))
    with input_errors():
        if args.video:
            write_video(models, source, indices, size, args, folder)
        else:
            write_stills(models, source, indices, size, args, folder)
    return EXIT_DONE


# ---- models and images ----------------------------------------------------------------------------------------------


def load_models(args: argparse.Namespace) -> dict[str, LoadedModel]:
    """The models under the titles of the grid."""
    paths = args.pretrained_weights or [""]
    if args.titles is not None and len(args.titles) != len(paths):
        raise InputError(f"--titles has {len(args.titles)} names for {len(paths)} checkpoint(s): give one for each")
    device = choose_device(args.device)
    fix_random_seeds(args.seed)
    models: dict[str, LoadedModel] = {}
    for i, path in enumerate(paths):
        loaded = load_checkpoint_model(
            path, checkpoint_key=args.checkpoint_key, device=device, **options.model_flags(args)
        )
        title = args.titles[i] if args.titles else title_of(loaded)
        while title in models:
            title += "'"
        models[title] = loaded
    channels = {options.channels(loaded.config) for loaded in models.values()}
    if len(channels) > 1:
        raise InputError(f"the checkpoints take images of {sorted(channels)} channels: show them in separate runs")
    return models


def title_of(loaded: LoadedModel) -> str:
    """What the grid calls a model: architecture and pooling, and the epoch where it is known."""
    config = loaded.config
    pooling = "SimPool" if config.get("mode") == "simpool" else "[CLS]"
    epoch = f", epoch {loaded.epoch}" if loaded.epoch is not None else "" if loaded.path else ", random weights"
    return f"{config['arch']}, {pooling}{epoch}"


def open_selection(args: argparse.Namespace) -> tuple[ImageSource, np.ndarray]:
    """The images to show, as a source and indices into it. A folder of frames gives all of them with --video."""
    if (args.image_path is None) == (args.data_path is None):
        raise InputError("give either --image_path (files, folders) or --data_path (a data set)")
    in_chans = args.in_chans or 3
    if args.data_path is not None:
        try:
            source = open_images(args.data_path, "val", -1, in_chans)
        except InputError:  # a bare folder has no val
            source = open_images(args.data_path, "train", -1, in_chans)
        return source, spread(source, args.num_images)
    files: list[str] = []
    for path in map(Path, args.image_path):
        if path.is_dir():
            inside = open_images(path, "train", -1, in_chans)
            count = len(inside) if args.video else min(args.num_images, len(inside))
            files += [inside.name(i) for i in range(count)]
        elif path.is_file():
            files.append(str(path))
        else:
            raise InputError(f"--image_path {path} does not exist: give image files or folders")
    source = FileSource(Path("."), PackedStrings.pack(str(Path(f).absolute()) for f in files), in_chans=in_chans)
    return source, np.arange(len(files))


def spread(source: ImageSource, count: int) -> np.ndarray:
    """The first `count` images, taken class by class in turn where there are labels, so that they differ."""
    if source.labels is None:
        return np.arange(min(count, len(source)))
    order = np.argsort(source.labels, kind="stable")
    rank = np.arange(len(order)) - np.searchsorted(source.labels[order], source.labels[order])
    return order[np.argsort(rank, kind="stable")][:count]


def input_size(args: argparse.Namespace, models: list[LoadedModel]) -> tuple[int, int]:
    """(height, width) of the models' input, a multiple of every patch size."""
    patches = [m.model.patch_size for m in models if isinstance(getattr(m.model, "patch_size", None), int)]
    step = int(np.lcm.reduce(patches)) if patches else 1
    if args.image_size is None:
        native = max(options.input_side(m.config) for m in models)
        size = [480 if native >= 96 else native] * 2
        return tuple(max(step, s // step * step) for s in size)
    if len(args.image_size) > 2 or min(args.image_size) < 1:
        raise InputError(f"--image_size {' '.join(map(str, args.image_size))}: give one or two sides in pixels")
    size = args.image_size * 2 if len(args.image_size) == 1 else args.image_size
    if any(s % step for s in size):
        nearest = [max(step, round(s / step) * step) for s in size]
        raise InputError(
            f"--image_size {size[0]} {size[1]} is not divisible by the patch size {step}: use {nearest[0]} {nearest[1]}"
        )
    return tuple(size)


def load_batch(source: ImageSource, indices: np.ndarray, size: tuple[int, int]) -> Tensor:
    """uint8 (B, C, H, W) of the images at `indices`. Raises InputError naming one that cannot be read."""
    images = []
    for i in indices:
        try:
            images.append(attention.fit(source.load(int(i)), size))
        except BadImage as error:
            raise InputError(f"{source.name(int(i))} {error}") from error
    return torch.stack(images)


# ---- pictures -------------------------------------------------------------------------------------------------------


def write_stills(
    models: dict[str, LoadedModel], source: ImageSource, indices: np.ndarray, size: tuple[int, int],
    args: argparse.Namespace, folder: Path,
) -> None:  # fmt: skip
    """grid.png, and the single pictures of every image and model."""
    images = load_batch(source, indices, size)
    smooth = args.interpolation == "bicubic"
    stems = unique_stems(source, indices)
    for title, loaded in models.items():
        prefix = "" if len(models) == 1 else f"{slug(title)}-"
        maps = attention.attention_maps(loaded.model, images)  # (B, heads, h, w)
        if maps[0, 0].numel() == 1:
            say(
                f"{title} sees {size[0]} x {size[1]} pixels as one cell, so its map is flat: give a larger --image_size"
            )
        for stem, image, heads in zip(stems, images, maps, strict=True):
            shown = attention.pictures(image, heads.mean(0), args.threshold, smooth)
            attention.save_png(shown.pop("image"), folder / f"{stem}-image.png")
            for kind, picture in shown.items():
                attention.save_png(picture, folder / f"{stem}-{prefix}{kind}.png")
            if len(heads) > 1:
                for number, one in enumerate(heads, start=1):
                    picture = attention.pictures(image, one, None, smooth)["map"]
                    attention.save_png(picture, folder / f"{stem}-{prefix}head{number}.png")
    titled = {title: loaded.model for title, loaded in models.items()}
    path = attention.attention_figure(
        titled, images, folder / "grid.png", threshold=args.threshold, smooth=smooth, per_head=args.per_head
    )
    say(f"{len(images)} image(s), {len(models)} model(s): single pictures in {folder}, all together in {path}")


def write_video(
    models: dict[str, LoadedModel], source: ImageSource, indices: np.ndarray, size: tuple[int, int],
    args: argparse.Namespace, folder: Path,
) -> None:  # fmt: skip
    """video/frame-00000.png ... (image beside the overlay of every model) and video.gif."""
    from PIL import Image

    frames = folder / "video"
    frames.mkdir(exist_ok=True)
    written = []
    for picture in video_frames(models, source, indices, size, args):
        path = frames / f"frame-{len(written):05d}.png"
        attention.save_png(picture, path)
        written.append(path)
    opened = [Image.open(path) for path in written]
    opened[0].save(
        folder / "video.gif", save_all=True, append_images=opened[1:], duration=round(1000 / args.fps), loop=0
    )
    for image in opened:
        image.close()
    say(f"{len(written)} frames in {frames}, and {folder / 'video.gif'}")


def video_frames(
    models: dict[str, LoadedModel], source: ImageSource, indices: np.ndarray, size: tuple[int, int],
    args: argparse.Namespace,
) -> Iterator[np.ndarray]:  # fmt: skip
    """One picture per frame, a few frames in memory at a time."""
    kind = "overlay" if args.threshold is None else "mask"
    starts = range(0, len(indices), VIDEO_BATCH)
    for start in progress(starts, len(starts), "frames"):
        images = load_batch(source, indices[start : start + VIDEO_BATCH], size)
        maps = [attention.attention_maps(loaded.model, images).mean(1) for loaded in models.values()]
        for b, image in enumerate(images):
            shown = [
                attention.pictures(image, m[b], args.threshold, args.interpolation == "bicubic")[kind] for m in maps
            ]
            yield np.concatenate([attention.displayable(image), *shown], axis=1)


def unique_stems(source: ImageSource, indices: np.ndarray) -> list[str]:
    """A file name for each image, from its own; numbered where two agree."""
    stems: list[str] = []
    for i in indices:
        stem = slug(Path(source.name(int(i))).stem)
        stems.append(f"{stem}-{len(stems)}" if stem in stems else stem)
    return stems


def slug(text: str) -> str:
    """The text as a part of a file name."""
    return "".join(c if c.isalnum() else "_" for c in text).strip("_") or "image"


if __name__ == "__main__":
    run_program(main)
