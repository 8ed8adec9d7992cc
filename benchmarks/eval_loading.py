"""Loading images for evaluation on one core: torchvision compared with our loader.

    python -m benchmarks.eval_loading --data_path FOLDER [--rounds 5]

Both start from the files and end with normalised float batches: Resize(256, bicubic), CenterCrop(224). The usual way is
Pillow, torchvision's transforms and stacking; ours is the evaluation loader and `normalize`. The sides run in turn.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from data.datasets import open_images
from data.eval_set import EvalSet
from data.loader import normalize
from data.source import ImageSource
from runtime.cli import parse_described
from runtime.guards import run_program
from runtime.hardware import keep_freed_memory
from runtime.terminal import say


def usual_batch(source: ImageSource, indices: list[int], transform) -> torch.Tensor:
    """Pillow and torchvision, image by image."""
    from PIL import Image

    images = []
    for i in indices:
        with open(source.name(i), "rb") as file:
            images.append(transform(Image.open(file).convert("RGB")))
    return torch.stack(images)


def usual_transform(img_size: int, resize: int):
    """Resize, central crop, to tensor, normalise, as evaluation scripts usually do."""
    from torchvision import transforms as T

    steps = [T.Resize(resize, interpolation=T.InterpolationMode.BICUBIC), T.CenterCrop(img_size), T.ToTensor()]
    return T.Compose([*steps, T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])


def measure(source: ImageSource, img_size: int, resize: int, images: int, batch: int, rounds: int):
    """Images per second of the usual way and of ours, and their ratio; medians over the rounds."""
    transform, ours = usual_transform(img_size, resize), EvalSet(source, img_size, resize)
    batches = [list(range(i, min(i + batch, images))) for i in range(0, images, batch)]
    rows = []
    for _ in range(rounds + 1):  # the first round warms up
        spent = [0.0, 0.0]
        for indices in batches:
            start = time.perf_counter()
            usual_batch(source, indices, transform)
            middle = time.perf_counter()
            normalize(ours.__getitems__(indices)[0])
            spent[0] += middle - start
            spent[1] += time.perf_counter() - middle
        rows.append((images / spent[0], images / spent[1], spent[0] / spent[1]))
    return tuple(statistics.median(column) for column in zip(*rows[1:], strict=True))


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("benchmarks.eval_loading", add_help=False)
    parser.add_argument("--data_path", required=True, help="a folder of images")
    parser.add_argument("--images", type=int, default=96, help="images per round")
    parser.add_argument("--batch_size", type=int, default=32, help="images per batch")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, each running both sides in turn")
    parser.add_argument("--img_size", type=int, default=224, help="side of the central crop, pixels")
    parser.add_argument("--resize", type=int, default=256, help="shorter side before it, pixels")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = parse_described(get_args_parser(), __doc__, argv)
    torch.set_num_threads(1)
    keep_freed_memory()  # for both sides, as the programs do on a CPU
    source = open_images(args.data_path)
    images = min(args.images, len(source))
    usual, ours, ratio = measure(source, args.img_size, args.resize, images, args.batch_size, args.rounds)
    say(f"evaluation loading, {args.img_size} px, images per second on one core:")
    say(f"  torchvision {usual:8.0f}")
    say(f"  ours        {ours:8.0f}   {ratio:.1f}x")
    return 0


if __name__ == "__main__":
    run_program(main)
