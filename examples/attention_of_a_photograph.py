"""The attention map of one photograph of yours, as a picture next to it.

    python -m examples.attention_of_a_photograph photo.jpg --pretrained_weights runs/demo_vit_small/checkpoint.pth

Without a photograph it takes the built-in cat; without a checkpoint the network is untrained. The map shows attention
as a multiple of uniform attention; `visualize_attention.py` does this for many images and models at once.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from data.decode import BadImage, Picture
from data.demo import read_photograph
from evaluation import attention
from evaluation.attention_figure import save_png
from evaluation.models import load_checkpoint_model
from evaluation.options import channels
from runtime.cli import parse_described
from runtime.guards import InputError, input_errors, run_program

SMALL_VIT = {"arch": "vit_tiny", "mode": "simpool", "img_size": 32, "patch_size": 4, "depth": 4}


def main(argv: list[str] | None = None) -> None:
    """Write the photograph, its map, and the map over the photograph, side by side."""
    parser = argparse.ArgumentParser("attention_of_a_photograph", add_help=False)
    parser.add_argument("photograph", nargs="?", default=None, help="an image file; without one, the built-in cat")
    parser.add_argument("--pretrained_weights", default="", help="a checkpoint or an exported file")
    parser.add_argument("--size", type=int, default=192, help="side of the square the model sees, in pixels")
    parser.add_argument("--output", default="attention_map.png", help="picture to write")
    args = parse_described(parser, __doc__, argv)
    torch.manual_seed(0)
    loaded = load_checkpoint_model(args.pretrained_weights, **({} if args.pretrained_weights else SMALL_VIT))
    if channels(loaded.config) != 3:
        raise InputError(f"{loaded.path} takes images of {channels(loaded.config)} channels; this example is for 3")
    pixels = read_photograph("cat") if args.photograph is None else read_file(args.photograph)
    if not 1 <= args.size <= 4096:
        raise InputError(f"--size {args.size}: give a side from 1 to 4096 pixels")
    image = attention.fit(pixels, (args.size, args.size))  # (3, size, size) uint8
    with input_errors(f"--size {args.size}"):  # not divisible by the patch size, or a model without a map
        maps = attention.attention_maps(loaded.model, image[None])[0]  # (heads, h, w)
    heads_mean = maps.mean(0)
    shown = attention.pictures(image, heads_mean)
    save_png(np.concatenate([shown["image"], shown["map"], shown["overlay"]], axis=1), Path(args.output))
    print(f"largest attention: {attention.relative(heads_mean).max().item():.1f} times uniform; see {args.output}")


def read_file(path: str) -> np.ndarray:
    """(H, W, 3) uint8. Raises InputError if the file cannot be read as an image."""
    try:
        return Picture(Path(path).read_bytes()).pixels()
    except OSError as error:
        raise InputError(f"{path} cannot be opened ({error}); give an image file") from error
    except BadImage as error:
        raise InputError(f"{path} {error}") from error


if __name__ == "__main__":
    run_program(main)
