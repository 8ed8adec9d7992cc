"""Features of many images, and for some of them the nearest others, as one picture.

    python -m examples.nearest_images --pretrained_weights runs/demo_vit_small/checkpoint.pth

Each row is a patch of a built-in photograph, then the five training patches whose features have the largest cosine
similarity, taken from another part of the photographs. Without a checkpoint the network is untrained.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from data.datasets import open_images
from evaluation.attention_figure import save_png
from evaluation.features import extract, normalize_rows_
from evaluation.models import load_checkpoint_model
from evaluation.options import channels, input_side
from runtime.cli import parse_described
from runtime.guards import run_program

QUERIES, NEAREST = 8, 5
SMALL_VIT = {"arch": "vit_tiny", "mode": "simpool", "img_size": 32, "patch_size": 8, "depth": 4}


def main(argv: list[str] | None = None) -> None:
    """Compute the features, print how many neighbours are of the query's photograph, and write the picture."""
    parser = argparse.ArgumentParser("nearest_images", add_help=False)
    parser.add_argument("--pretrained_weights", default="", help="a checkpoint or an exported file")
    parser.add_argument("--data_path", default="demo", help="labelled images with a train and a val set")
    parser.add_argument("--output", default="nearest.png", help="picture to write")
    args = parse_described(parser, __doc__, argv)
    torch.manual_seed(0)
    loaded = load_checkpoint_model(args.pretrained_weights, **({} if args.pretrained_weights else SMALL_VIT))
    sources = [open_images(args.data_path, split, in_chans=channels(loaded.config)) for split in ("train", "val")]
    side = input_side(loaded.config)
    train, val = (
        normalize_rows_(extract(loaded.model, source, img_size=side, num_workers=0)[0]) for source in sources
    )  # (N, D) of unit length, so that their products are cosines
    queries = torch.linspace(0, len(val) - 1, QUERIES).long()
    nearest = (val[queries] @ train.T).topk(NEAREST).indices  # (QUERIES, NEAREST)
    rows = [
        np.concatenate([shown(sources[1], query), *(shown(sources[0], i) for i in found)], axis=1)
        for query, found in zip(queries.tolist(), nearest.tolist(), strict=True)
    ]
    save_png(np.concatenate(rows), Path(args.output))
    if sources[0].labels is not None and sources[1].labels is not None:
        right = sources[0].labels[nearest.numpy()] == sources[1].labels[queries.numpy()][:, None]
        print(f"{right.sum()} of {right.size} neighbours are of the query's class")
    print(f"picture written to {args.output}")


def shown(source, i: int, side: int = 96) -> np.ndarray:
    """Image i as a square picture (side, side, 3) uint8."""
    from PIL import Image

    picture = Image.fromarray(source.load(i)).convert("RGB")
    return np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC))


if __name__ == "__main__":
    run_program(main)
