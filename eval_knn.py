"""Weighted k-NN classification of a checkpoint's frozen features, low-shot k-NN, and features as files.

    python eval_knn.py --pretrained_weights output/checkpoint.pth --data_path /path/to/imagenet
    python eval_knn.py --pretrained_weights output/checkpoint.pth --data_path demo --low_shot
    python eval_knn.py --pretrained_weights output/checkpoint.pth --data_path photos/ --embed photos.npz --plot tsne
    python eval_knn.py --pretrained_weights output/checkpoint.pth --data_path photos/ --embed patches/ --tokens patches

The checkpoint may be ours or the published code's; what model it holds is read from it. Prints a table, and writes
eval_knn.json to the checkpoint's folder (or to --output_dir). The flags are the published program's. The protocol, and
how it departs from the published code: evaluation/knn.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.datasets import open_images
from evaluation import (
    collected,
    embedding,
    feature_map,
    features,
    knn,
    labelled,
    layers,
    low_shot,
    options,
    records,
    report,
)
from evaluation.knn import knn_classifier
from evaluation.retrieval import multi_scale
from runtime.checkpoint import check_writable
from runtime.cli import add_flag, bool_flag, parse_program
from runtime.distributed import (
    all_gather_objects,
    choose_device,
    get_world_size,
    init_distributed_mode,
    is_main_process,
    leave,
)
from runtime.guards import EXIT_DONE, InputError, input_errors, run_program
from runtime.meters import MetricLogger
from runtime.terminal import say

__all__ = ["ReturnIndexDataset", "extract_feature_pipeline", "extract_features", "knn_classifier"]

# What papers on frozen features search; the best of it is chosen on val, and named so.
GRID_KS = (5, 10, 15, 20, 50, 100, 200)
GRID_TEMPERATURES = (0.07, 0.1, 0.2)
AS_THEY_ARE = "as the model gives them (not normalised)"


def get_args_parser() -> argparse.ArgumentParser:
    """The flags; those of the published program keep their names and meaning."""
    parser = options.evaluation_parser("eval_knn")
    group = parser.add_argument_group("k-NN")
    add_flag(group, "--nb_knn", type=int, nargs="+", default=[10, 20, 100, 200], help="numbers of neighbours, k")
    add_flag(
        group, "--temperature", type=float, nargs="+", default=[0.07], help="temperature of the votes, one or many"
    )
    add_flag(group, "--grid", action="store_true",
             help="all of the usual grid in one pass, and which is best: "
             f"k {' '.join(map(str, GRID_KS))}, T {' '.join(f'{t:g}' for t in GRID_TEMPERATURES)}")  # fmt: skip
    add_flag(group, "--use_cuda", type=bool_flag, default=True, help="classify on the GPU; false: on the CPU")
    add_flag(group, "--low_shot", type=int, nargs="*", default=None, metavar="NU",
             help="also low-shot k-NN with NU images per class (no value: 1 5 10 20)")  # fmt: skip
    add_flag(group, "--low_shot_draw", choices=("files", "random"), default="files",
             help="which images: the published protocol's, by file order, or five seeded draws")  # fmt: skip
    add_flag(group, "--subset", type=int, default=-1, help="first images of each training class to use; -1: all")
    add_flag(group, "--seed", type=int, default=0, help="seed of --low_shot_draw random")
    group = parser.add_argument_group("features as files")
    add_flag(group, "--dump_features", default=None, help="folder to save the features to")
    add_flag(group, "--load_features", default=None, help="folder of saved features to use instead of extracting")
    add_flag(group, "--embed", default=None, metavar="FILE",
             help="only write features and names of all images, train and val, to .npz, to .npy and .csv, or as parts "
             "to a folder (a name without a suffix), for sets that do not fit into memory")  # fmt: skip
    add_flag(group, "--tokens", choices=layers.TOKENS, default="pooled",
             help="what --embed writes: the feature of each image, or those of all its patches")  # fmt: skip
    add_flag(group, "--layer", type=int, default=-1,
             help="block after which --embed takes features: 0 is the first, -1 the last")  # fmt: skip
    add_flag(group, "--part_images", type=int, default=None,
             help="images in each part of a folder (default: as many as make 256 MB)")  # fmt: skip
    add_flag(group, "--plot", choices=feature_map.METHODS, default=None,
             help="also draw the features of --embed in two dimensions, coloured by class, as PNG")  # fmt: skip
    add_flag(group, "--features_dtype", choices=("fp32", "fp16"), default=None,
             help="how features are stored (default: fp32)")  # fmt: skip
    options.add_checkpoint_flags(parser)
    options.add_run_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    args = parse_program("eval_knn.py", get_args_parser(), __doc__, argv)
    options.check_run(args)
    options.check_positive(args, "nb_knn")
    options.check_above_zero(args, "temperature")
    if args.grid:
        use_grid(args)
    if args.low_shot is not None:
        args.low_shot = args.low_shot or [1, 5, 10, 20]
        options.check_positive(args, "low_shot")
    check_embed_flags(args)
    if args.embed:
        embedding.check_path(args.embed)
    elif args.dump_features:
        check_writable(Path(args.dump_features), "--dump_features")
    folder = None if args.embed else records.output_folder(args.output_dir, args.pretrained_weights)
    init_distributed_mode(args)
    try:
        return embed(args) if args.embed else evaluate(args, folder)
    finally:
        leave()


def use_grid(args: argparse.Namespace) -> None:
    """Put the grid's numbers of neighbours and temperatures in place. Raises InputError if the user gave others."""
    parser = get_args_parser()
    given = [f"--{name}" for name in ("nb_knn", "temperature") if getattr(args, name) != parser.get_default(name)]
    if given:
        raise InputError(f"--grid has its own values: leave out {' and '.join(given)}, or leave out --grid")
    args.nb_knn, args.temperature = list(GRID_KS), list(GRID_TEMPERATURES)


def check_embed_flags(args: argparse.Namespace) -> None:
    """Raise InputError for flags of --embed without it, or that do not go together."""
    if not args.embed:
        parser = get_args_parser()
        for name in ("tokens", "layer", "part_images", "plot"):
            if getattr(args, name) != parser.get_default(name):
                raise InputError(f"--{name} {getattr(args, name)} is a setting of --embed: give --embed FILE, too")
        return
    if args.part_images is not None:
        options.check_positive(args, "part_images")
        if not embedding.is_folder(args.embed):
            raise InputError(f"--part_images: {args.embed} is one file; give --embed a folder, a name without a suffix")
    if args.plot:
        if args.tokens != "pooled":
            raise InputError(f"--plot {args.plot} draws one point per image: leave out --tokens {args.tokens}")
        if embedding.is_folder(args.embed):
            raise InputError(f"--plot {args.plot} draws the features of one file: give --embed FILE.npz, not a folder")
        feature_map.check_method(args.plot)


# ---- the evaluation -------------------------------------------------------------------------------------------------


def evaluate(args: argparse.Namespace, folder: Path) -> int:
    """k-NN, and low-shot k-NN if asked for: table and eval_knn.json."""
    found = collected.collect(args)
    device = args.torch_device if args.use_cuda else torch.device("cpu")
    test = found.features.test_features.to(device)
    with input_errors():
        accuracies = knn.knn_accuracies(
            *found.training_share(), test, found.features.test_labels, args.nb_knn, args.temperature, sharded=True
        )
    rows = [
        {"k": k, "temperature": temperature, "top1": top1, "top5": top5}
        for (k, temperature), (top1, top5) in accuracies.items()
    ]
    cells = [[str(row["k"]), f"{row['temperature']:g}", row["top1"], row["top5"]] for row in rows]
    say(records.table(["k-NN", "temperature", "top-1", "top-5"], cells))
    results: dict[str, Any] = {"knn": rows}
    if args.grid:
        best = max(rows, key=lambda row: row["top1"])
        results["best_on_val"] = best
        say(
            f"best of the {len(rows)}, chosen on val itself: k = {best['k']}, T = {best['temperature']:g}, "
            f"top-1 {best['top1']:.2f}, top-5 {best['top5']:.2f}"
        )
    if args.low_shot:
        results["low_shot"] = classify_low_shot(args, found, test)
    names = ("nb_knn", "temperature", "grid", "low_shot", "low_shot_draw", "subset", "seed", "val_fraction")
    settings = {name: getattr(args, name) for name in names} | found.numerics
    records.write_evaluation(folder, "eval_knn", found.model, found.data, settings, results)
    report.refresh_report(args.pretrained_weights)
    return EXIT_DONE


def classify_low_shot(args: argparse.Namespace, found: collected.Collected, test: Tensor) -> dict[int, dict]:
    """Low-shot k-NN, each rank with its share of the queries and all training features: table and results.

    The results of the first temperature stand under each number of images, and those of any others under
    `by_temperature` in it.
    """
    train = found.features.train_features.to(test.device)
    cells, results = [], {}
    for temperature in args.temperature:
        found_here = low_shot.low_shot_knn(
            train, found.features.train_labels, test, found.features.test_labels, args.low_shot, temperature,
            args.low_shot_draw, seed=args.seed, classes=found.features.description.get("classes"), sharded=True,
        )  # fmt: skip
        for nu, row in found_here.items():
            if nu not in results:
                results[nu] = {**row, "temperature": temperature}
            else:
                results[nu].setdefault("by_temperature", {})[f"{temperature:g}"] = row
            cells.append([str(nu), str(row["k"]), f"{temperature:g}", row["mean"], row["std"], str(len(row["runs"]))])
    say(records.table(["images per class", "k", "temperature", "top-1", "std", "runs"], cells))
    return results


def embed(args: argparse.Namespace) -> int:
    """Features and file names of every image at --data_path, labelled or not, as files; a picture if asked for."""
    loaded = collected.load(args)
    settings = options.extraction(args, loaded.config)
    with input_errors("--layer"):
        forward = layers.feature_function(loaded.model, args.tokens, args.layer)
        shape = embedding.shape_of(loaded.model, forward, options.channels(loaded.config), settings)
    source = labelled.open_all(args.data_path, args.subset, options.channels(loaded.config))
    description = options.describe(loaded, args) | {"data_path": args.data_path, "data": source.fingerprint()}
    description |= options.numerics(args, loaded.config) | {"tokens": args.tokens, "layer": args.layer}
    width = " x ".join(map(str, shape))
    if embedding.is_folder(args.embed):
        index = embedding.write_parts(
            args.embed, loaded.model, forward, source, shape, description, settings, args.part_images
        )
        say(f"wrote {index}: {len(source)} images, features of width {width}, {AS_THEY_ARE}")
        return EXIT_DONE
    array, index = features.extract(loaded.model, source, forward=forward, **settings)
    array = array.view(len(array), *shape)
    if is_main_process():
        with input_errors("--embed"):
            for path in embedding.write_file(args.embed, array, source, description, index):
                say(f"wrote {path}")
        say(f"{len(array)} features of width {width}, {AS_THEY_ARE}")
        if args.plot:
            labels = None if source.labels is None else source.labels[index.numpy()]
            picture = Path(args.embed).with_suffix(f".{args.plot}.png")
            say(f"wrote {feature_map.plot_features(array.numpy(), labels, source.classes, args.plot, picture)}")
    return EXIT_DONE


# ---- DINO's names ---------------------------------------------------------------------------------------------------


def extract_feature_pipeline(args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(train features, test features, train labels, test labels), normalised and complete, on every rank.

    Takes DINO's arguments; what the script's namespace lacks gets this program's default.
    """
    args = options.with_defaults(args, get_args_parser())
    if not hasattr(args, "torch_device"):
        args.torch_device = choose_device(args.device)
    found = collected.collect(args)
    saved = found.features
    if not found.complete:
        saved.train_features = features.gather_shards(saved.train_features)
        saved.train_labels = features.gather_shards(saved.train_labels)
    return saved.train_features, saved.test_features, saved.train_labels, saved.test_labels


@torch.no_grad()
def extract_features(model: nn.Module, data_loader: Any, use_cuda: bool = True, multiscale: bool = False) -> Tensor:
    """Features (N, D) of a loader of (images, index) over a data set of N images, complete on every rank.

    Takes loaders of DINO's scripts, also those whose sampler repeats images to fill the ranks. The model is used in the
    mode it is in, on its own device; use_cuda keeps the result on the GPU if there is one.
    """
    device = next(model.parameters()).device
    forward = (lambda images: multi_scale(images, model)) if multiscale else model
    rows, positions = [], []
    for images, index in MetricLogger(delimiter="  ").log_every(data_loader, 10):
        rows.append(forward(images.to(device, non_blocking=True)).flatten(1).cpu())
        positions.append(index)
    share, position = torch.cat(rows), torch.cat(positions)
    shares, everywhere = [share], [position]
    if get_world_size() > 1:
        gathered = all_gather_objects((share, position))
        shares, everywhere = [g[0] for g in gathered], [g[1] for g in gathered]
    full = torch.zeros(len(data_loader.dataset), share.shape[1], dtype=share.dtype)
    for rows_of_rank, index_of_rank in zip(shares, everywhere, strict=True):
        full[index_of_rank] = rows_of_rank
    return full.to(device) if use_cuda and device.type == "cuda" else full


class ReturnIndexDataset(torch.utils.data.Dataset):
    """An image folder that gives (transformed image, index): DINO's class, without torchvision.

    `samples` holds (path, class number), `classes` the names; without class folders every class number is 0.
    """

    def __init__(self, root: str | Path, transform: Callable[[Any], Any] | None = None):
        self.source = open_images(root, "train")
        self.transform = transform
        labels = self.source.labels if self.source.labels is not None else [0] * len(self.source)
        self.samples = [(self.source.name(i), int(labels[i])) for i in range(len(self.source))]
        self.imgs, self.targets = self.samples, [label for _, label in self.samples]
        self.classes = self.source.classes or [""]
        self.class_to_idx = {name: i for i, name in enumerate(self.classes)}

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        image = Image.fromarray(self.source.load(index))
        return (self.transform(image) if self.transform else image), index


if __name__ == "__main__":
    run_program(main)
