"""Attention maps of one or several checkpoints as pictures: single ones, one labelled grid, or a video's frames.

    python visualize_attention.py --pretrained_weights checkpoint.pth --image_path photo.jpg more/ --threshold .6
    python visualize_attention.py --pretrained_weights official.pth simpool.pth --data_path demo --num_images 8
    python visualize_attention.py --pretrained_weights output/checkpoint.pth --image_path frames/ --video

Works for every model with an attention map: SimPool or another attentive pooling on any backbone, and the [CLS] heads
of an official ViT. Maps show attention as a multiple of uniform attention, all on one scale, so that models and images
can be compared; --untrained adds the same network with random weights. Writes to attention/ in the (first) checkpoint's
folder, or to --output_dir: grid.png, and for each image and model its map, overlay, mask (with --threshold) and, for
several heads, each head's map; --masks adds masks.png, what AttMask and others would hide of the images. `--data_path
demo` shows the photographs that the built-in patches are cut from. The flags of DINO's program keep their names.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.datasets import FileSource, has_val, open_images
from data.decode import BadImage
from data.source import ImageSource, PackedStrings
from evaluation import attention, examples, film, options, records
from evaluation.attention_figure import figure_of_maps, save_png
from evaluation.mask_figure import mask_figure
from evaluation.models import LoadedModel, load_checkpoint_model
from runtime.cli import add_flag, parse_program
from runtime.distributed import choose_device
from runtime.guards import EXIT_DONE, InputError, input_errors, run_program
from runtime.progress import progress
from runtime.reproduce import fix_random_seeds
from runtime.terminal import say

VIDEO_BATCH = 8


def get_args_parser() -> argparse.ArgumentParser:
    """The flags; those of DINO's program keep their names and meaning."""
    parser = options.evaluation_parser("visualize_attention")
    group = parser.add_argument_group("images")
    add_flag(group, "--image_path", nargs="+", default=None, help="image files and folders of images")
    add_flag(group, "--data_path", default=None, help="or a data set: its first images, of val if it has one")
    add_flag(group, "--num_images", type=int, default=None,
             help="how many images of a folder or data set (default: 8; with --video all)")  # fmt: skip
    add_flag(group, "--image_size", type=int, nargs="+", default=None,
             help="input height and width (default: 480 480; for models of small images their own)")  # fmt: skip
    group = parser.add_argument_group("pictures")
    add_flag(group, "--output_dir", default=None, help="folder to write to (default: attention/ in the checkpoint's)")
    add_flag(group, "--threshold", type=float, default=None, help="also masks that hold this part of the attention")
    add_flag(group, "--per_head", action="store_true", help="also every [CLS] head in the grid")
    add_flag(group, "--interpolation", choices=("bicubic", "nearest"), default="bicubic", help="how maps are enlarged")
    add_flag(group, "--normalize", choices=("common", "image"), default="common",
             help="common: attention / uniform, one scale for all; image: each map by its own range")  # fmt: skip
    add_flag(group, "--masks", action="store_true",
             help="also what masked image modelling hides: blocks, random patches, AttMask's choices")  # fmt: skip
    add_flag(group, "--mask_ratio", type=float, default=0.3, help="part of the patches that those masks hide")
    add_flag(group, "--show_max", type=float, default=0.1,
             help="AttMask-Hint reveals hints among this part of the patches")  # fmt: skip
    add_flag(group, "--untrained", action="store_true", help="also show the first model with random weights")
    add_flag(group, "--titles", nargs="+", default=None, help="names of the models in the grid, one per checkpoint")
    add_flag(group, "--video", action="store_true", help="treat the images as frames: overlays in order, and a GIF")
    add_flag(group, "--fps", type=float, default=25.0, help="frames per second of the GIF")
    options.add_checkpoint_flags(parser, many=True)
    group = parser.add_argument_group("running")
    add_flag(group, "--device", default="auto", help="auto, cuda, cuda:N, mps or cpu")
    add_flag(group, "--local_rank", type=int, default=0, help="accepted and ignored, as in the other programs")
    add_flag(group, "--seed", type=int, default=0, help="seed of random weights")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    args = parse_program("visualize_attention.py", get_args_parser(), __doc__, argv)
    if args.num_images is not None:
        options.check_positive(args, "num_images")
    if not 0 < args.fps <= film.MOST_FPS:
        raise InputError(f"--fps {args.fps:g}: give a number above 0, and at most {film.MOST_FPS:g}")
    if args.masks and args.video:
        raise InputError("--masks --video: masks are drawn of single images; leave one of them out")
    if args.threshold is not None and not 0 < args.threshold <= 1:
        raise InputError(f"--threshold {args.threshold}: give the part of the attention to keep, above 0, at most 1")
    if args.masks and not (0 < args.mask_ratio <= 1 and 0 < args.show_max < 1):
        raise InputError(
            f"--mask_ratio {args.mask_ratio:g} --show_max {args.show_max:g}: give the part to hide, above 0 and at "
            "most 1, and the part that holds the hints, between 0 and 1"
        )
    first = Path(args.pretrained_weights[0]).parent if args.pretrained_weights else Path(".")
    folder = records.output_folder(args.output_dir or first / "attention", None)
    models = load_models(args)
    source, indices = open_selection(args)
    size = input_size(args, list(models.values()), isinstance(source, examples.Photographs))
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
    if args.untrained:
        first = next(iter(models.values()))
        flags = {name: first.config[name] for name in options.MODEL_FLAGS if name in first.config}
        models["untrained"] = load_checkpoint_model("", device=device, **{"gamma": None, **flags})
    channels = {options.channels(loaded.config) for loaded in models.values()}
    if len(channels) > 1:
        raise InputError(f"the checkpoints take images of {sorted(channels)} channels: show them in separate runs")
    return models


def title_of(loaded: LoadedModel) -> str:
    """What the grid calls a model: architecture and pooling, and the epoch if it is known."""
    config = loaded.config
    mode = config.get("mode", "official")
    pooling = {"simpool": "SimPool", "official": "[CLS]"}.get(mode, mode)
    epoch = f", epoch {loaded.epoch}" if loaded.epoch is not None else "" if loaded.path else ", random weights"
    return f"{config['arch']}, {pooling}{epoch}"


def open_selection(args: argparse.Namespace) -> tuple[ImageSource, np.ndarray]:
    """The images to show, as a source and indices into it."""
    if (args.image_path is None) == (args.data_path is None):
        raise InputError("give either --image_path (files, folders) or --data_path (a data set)")
    in_chans = args.in_chans or 3
    most = args.num_images or (None if args.video else 8)
    if args.data_path is not None:
        if args.data_path.partition(":")[0] == "demo" and not Path(args.data_path).exists() and in_chans == 3:
            source = examples.Photographs()
        else:
            split = "val" if has_val(args.data_path) else "train"
            source = open_images(args.data_path, split, -1, in_chans)
        return source, spread(source, most or len(source))
    files: list[str] = []
    for path in map(Path, args.image_path):
        if path.is_dir():
            inside = open_images(path, "train", -1, in_chans)
            files += [inside.name(i) for i in range(min(most or len(inside), len(inside)))]
        elif path.is_file():
            files.append(str(path))
        else:
            raise InputError(f"--image_path {path} does not exist: give image files or folders")
    source = FileSource(Path("."), PackedStrings.pack(str(Path(f).absolute()) for f in files), in_chans=in_chans)
    return source, np.arange(len(files))


def spread(source: ImageSource, count: int) -> np.ndarray:
    """The first `count` images, taken class by class in turn if there are labels, so that they differ."""
    if source.labels is None:
        return np.arange(min(count, len(source)))
    order = np.argsort(source.labels, kind="stable")
    rank = np.arange(len(order)) - np.searchsorted(source.labels[order], source.labels[order])
    return order[np.argsort(rank, kind="stable")][:count]


def input_size(args: argparse.Namespace, models: list[LoadedModel], photographs: bool) -> tuple[int, int]:
    """(height, width) of the models' input, a multiple of every patch size.

    photographs: the images are whole photographs, of which a model of small images needs to see more than its own size.
    """
    patches = [m.model.patch_size for m in models if isinstance(getattr(m.model, "patch_size", None), int)]
    step = int(np.lcm.reduce(patches)) if patches else 1
    if args.image_size is None:
        native = max(options.input_side(m.config) for m in models)
        size = [480 if native >= 96 else 6 * native if photographs else native] * 2
        return tuple(max(step, s // step * step) for s in size)
    options.check_side(args, "image_size")
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
    maps_of = {title: attention.attention_maps(loaded.model, images) for title, loaded in models.items()}
    top = None if args.normalize == "image" else attention.common_top([maps.mean(1) for maps in maps_of.values()])
    for title, maps in maps_of.items():  # (B, heads, h, w)
        prefix = "" if len(models) == 1 else f"{slug(title)}-"
        if maps[0, 0].numel() == 1:
            say(
                f"{title} sees {size[0]} x {size[1]} pixels as one cell, so its map is flat: give a larger --image_size"
            )
        for stem, image, heads in zip(stems, images, maps, strict=True):
            shown = attention.pictures(image, heads.mean(0), args.threshold, smooth, top=top)
            save_png(shown.pop("image"), folder / f"{stem}-image.png")
            for kind, picture in shown.items():
                save_png(picture, folder / f"{stem}-{prefix}{kind}.png")
            if len(heads) > 1:
                for number, one in enumerate(heads, start=1):
                    picture = attention.pictures(image, one, None, smooth, top=top)["map"]
                    save_png(picture, folder / f"{stem}-{prefix}head{number}.png")
    path = figure_of_maps(
        maps_of, images, folder / "grid.png", threshold=args.threshold, smooth=smooth, per_head=args.per_head,
        normalize=args.normalize,
    )  # fmt: skip
    say(f"{len(images)} image(s), {len(models)} model(s): single pictures in {folder}, all together in {path}")
    if args.masks:
        for title, loaded in models.items():
            name = "masks.png" if len(models) == 1 else f"{slug(title)}-masks.png"
            say(f"masks: {mask_figure(loaded.model, images, folder / name, args.mask_ratio, args.show_max, args.seed)}")


def write_video(
    models: dict[str, LoadedModel], source: ImageSource, indices: np.ndarray, size: tuple[int, int],
    args: argparse.Namespace, folder: Path,
) -> None:  # fmt: skip
    """video/frame-00000.png ... (the image, then the overlay of every model) and video.gif."""
    frames = folder / "video"
    frames.mkdir(exist_ok=True)
    shown = saved_frames(video_frames(models, source, indices, size, args), frames)
    count = film.write_gif(shown, folder / "video.gif", args.fps)
    say(f"{count} frames in {frames}, and {folder / 'video.gif'}")


def saved_frames(pictures: Iterator[np.ndarray], folder: Path) -> Iterator[np.ndarray]:
    """The pictures, each written to frame-NNNNN.png on its way."""
    for number, picture in enumerate(pictures):
        save_png(picture, folder / f"frame-{number:05d}.png")
        yield picture


def video_frames(
    models: dict[str, LoadedModel], source: ImageSource, indices: np.ndarray, size: tuple[int, int],
    args: argparse.Namespace,
) -> Iterator[np.ndarray]:  # fmt: skip
    """One picture per frame, a few frames in memory at a time; the first ones set the scale of all."""
    kind = "overlay" if args.threshold is None else "mask"
    smooth, top = args.interpolation == "bicubic", None
    starts = range(0, len(indices), VIDEO_BATCH)
    for start in progress(starts, len(starts), "frames"):
        images = load_batch(source, indices[start : start + VIDEO_BATCH], size)
        maps = [attention.attention_maps(loaded.model, images).mean(1) for loaded in models.values()]
        if start == 0 and args.normalize == "common":
            top = attention.common_top(maps)
        for b, image in enumerate(images):
            shown = [attention.pictures(image, m[b], args.threshold, smooth, top=top)[kind] for m in maps]
            yield np.concatenate([attention.displayable(image), *shown], axis=1)


def unique_stems(source: ImageSource, indices: np.ndarray) -> list[str]:
    """A file name for each image, from its own; numbered if two agree."""
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
