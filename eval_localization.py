"""Where a checkpoint looks, measured: MaxBoxAccV2, DINO-seg, LOST, and a summary of its maps without boxes.

    python eval_localization.py --pretrained_weights checkpoint.pth --data_path voc/ --protocol maxboxacc
    python eval_localization.py --pretrained_weights checkpoint.pth --data_path voc.tar --protocol lost
    python eval_localization.py --pretrained_weights checkpoint.pth --data_path train2014/ --protocol dino_seg \\
        --annotations instances_train2014.json --image_list coco20k.txt
    python eval_localization.py --pretrained_weights checkpoint.pth --data_path photos/ --protocol summary

Works for every model with an attention map: SimPool and the attentive poolings on any backbone, and official ViTs; LOST
and, with --map norm, MaxBoxAcc also work for models without one. Boxes: PASCAL VOC (folder or tar), COCO,
wsolevaluation's metadata, CSV. Writes eval_localization_PROTOCOL.json, a curve, and pictures of 16 images each (best,
worst, random) to --output_dir (default: the checkpoint's folder). The protocols: evaluation/localization.py and
evaluation/discovery.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.boxes import BoxedImages, open_boxes
from data.datasets import has_val, open_images
from data.loader import normalize
from evaluation import box_results, features, options, records, report
from evaluation.box_results import Kind, Outcome, View
from evaluation.crops import resize_bilinear
from evaluation.discover import Finder, dino_seg_finder, discover, lost_finder
from evaluation.level_search import search_levels
from evaluation.localization import score_map
from evaluation.map_summary import COLUMNS, MASS, UNIFORM, summarise
from evaluation.models import LoadedModel, load_checkpoint_model
from evaluation.object_maps import DINO_SEG_HEAD, choose_head, norm_map, one_map
from evaluation.whole_images import bounded, whole_pixels
from runtime.cli import add_flag, bool_flag, parse_program
from runtime.distributed import init_distributed_mode, is_main_process, leave
from runtime.guards import EXIT_DONE, InputError, input_errors, run_program
from runtime.reproduce import fix_random_seeds
from runtime.terminal import say

PROTOCOLS = ("maxboxacc", "dino_seg", "lost", "summary")
TITLES = {"maxboxacc": "MaxBoxAcc", "dino_seg": "CorLoc of DINO-seg", "lost": "CorLoc of LOST"}


def get_args_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = options.evaluation_parser("eval_localization")
    group = parser.add_argument_group("protocol")
    add_flag(group, "--protocol", choices=PROTOCOLS, required=True,
             help="maxboxacc: boxes of the map's contours; dino_seg, lost: one per image; summary: none")  # fmt: skip
    add_flag(group, "--head", type=int, default=None,
             help="the map of one head, from 0 (default: the mean; dino_seg on [CLS] attention: 4)")  # fmt: skip
    add_flag(group, "--map", choices=("attention", "norm"), default="attention",
             help="maxboxacc: norm: lengths of the last features, for models without attention")  # fmt: skip
    add_flag(group, "--image_size", type=int, default=None,
             help="maxboxacc: side in pixels that images are squashed to (default: the model's)")  # fmt: skip
    add_flag(group, "--multi_contour", type=bool_flag, nargs="?", const=True, default=True,
             help="maxboxacc: true: every contour, MaxBoxAccV2; false: the largest one, V1")  # fmt: skip
    add_flag(group, "--mass", type=float, default=MASS, help="dino_seg: part of the attention that the mask holds")
    add_flag(group, "--published_components", type=bool_flag, nargs="?", const=True, default=False,
             help="dino_seg: the published code's choice of a component, which misses the last one")  # fmt: skip
    add_flag(group, "--max_side", type=int, default=0,
             help="dino_seg, lost: resize images whose longer side has more pixels; 0: never")  # fmt: skip
    group = parser.add_argument_group("boxes")
    add_flag(group, "--annotations", default=None,
             help="VOC folder or tar, COCO .json, wsolevaluation's folder, .csv (default: in --data_path)")  # fmt: skip
    add_flag(group, "--image_list", default=None, metavar="FILE", help="names of the images to take, one per line")
    add_flag(group, "--save_boxes", type=bool_flag, nargs="?", const=True, default=False,
             help="write every image's box and IoU into the JSON")  # fmt: skip
    add_flag(group, "--seed", type=int, default=0, help="seed of random weights, if there is no checkpoint")
    options.add_checkpoint_flags(parser)
    options.add_run_flags(
        parser,
        batch_size=64,
        data="images with boxes: a VOC folder or tar, or a folder or tar shards for --annotations",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    args = parse_program("eval_localization.py", get_args_parser(), __doc__, argv)
    check(args)
    folder = records.output_folder(args.output_dir, args.pretrained_weights)
    init_distributed_mode(args)
    try:
        loaded = load(args)
        summary(args, loaded, folder) if args.protocol == "summary" else localise(args, loaded, folder)
    finally:
        leave()
    return EXIT_DONE


def check(args: argparse.Namespace) -> None:
    """Raise InputError for values that make no sense, and for flags that the protocol does not use."""
    options.check_run(args)
    if args.head is not None and args.head < 0:
        raise InputError(f"--head {args.head}: heads count from 0")
    if not 0 < args.mass < 1:
        raise InputError(f"--mass {args.mass:g}: give a part of the attention, above 0 and below 1")
    if args.max_side < 0:
        raise InputError(f"--max_side {args.max_side}: give pixels, or 0 for no limit")
    options.check_side(args, "max_side")
    options.check_side(args, "image_size")
    if args.image_size is not None:
        options.check_positive(args, "image_size")
    used = {
        "map": ("maxboxacc",), "image_size": ("maxboxacc",), "multi_contour": ("maxboxacc",),
        "mass": ("dino_seg",), "published_components": ("dino_seg",),
        "max_side": ("dino_seg", "lost"), "head": ("maxboxacc", "dino_seg", "summary"),
        "annotations": PROTOCOLS[:3], "image_list": PROTOCOLS[:3], "save_boxes": PROTOCOLS[:3],
    }  # fmt: skip
    if args.map == "norm" and args.head is not None:
        raise InputError(
            f"--head {args.head} with --map norm: lengths of features have no heads; leave one of them out"
        )
    parser = get_args_parser()
    for name, protocols in used.items():
        if getattr(args, name) != parser.get_default(name) and args.protocol not in protocols:
            raise InputError(f"--{name} is for --protocol {', '.join(protocols)}, not {args.protocol}: leave it out")


# ---- model and maps -------------------------------------------------------------------------------------------------


def load(args: argparse.Namespace) -> LoadedModel:
    """The model of --pretrained_weights on this process's device."""
    flags = options.model_flags(args)
    fix_random_seeds(args.seed)
    return load_checkpoint_model(
        args.pretrained_weights, checkpoint_key=args.checkpoint_key, device=args.torch_device, **flags
    )


def chosen_head(args: argparse.Namespace, loaded: LoadedModel) -> int | None:
    """The head whose map counts, None for the mean. Raises InputError for a model without a map."""
    side, channels = options.input_side(loaded.config), options.channels(loaded.config)
    black = torch.zeros(1, channels, side, side, device=args.torch_device)
    with input_errors(), torch.no_grad():
        heads = loaded.model.get_attention_map(black).shape[1]
    default = DINO_SEG_HEAD if args.protocol == "dino_seg" else None
    head = choose_head(loaded.model, heads, args.head, default)
    if heads > 1:
        say(f"the map is {'the mean of' if head is None else f'head {head} of'} {heads} heads")
    return head


def maps_of(args: argparse.Namespace, loaded: LoadedModel, head: int | None, images: Tensor) -> Tensor:
    """Maps (B, h, w) of normalised images (B, C, H, W)."""
    dtype = options.AMP_DTYPES[args.amp or "none"]
    with torch.no_grad(), torch.autocast(images.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        if args.map == "norm":
            return norm_map(loaded.model, images)
        return one_map(loaded.model.get_attention_map(images), head)


# ---- protocols with boxes -------------------------------------------------------------------------------------------


def localise(args: argparse.Namespace, loaded: LoadedModel, folder: Path) -> None:
    """One of the protocols that compare boxes: tables, curve, pictures and JSON."""
    head = None if args.protocol == "lost" or args.map == "norm" else chosen_head(args, loaded)
    channels = options.channels(loaded.config)
    images = open_boxes(
        args.data_path, args.annotations, args.image_list, channels, args.num_workers, args.on_bad_image
    )
    say(f"{len(images)} images with {len(images.corners)} boxes")
    measure = max_box_acc if args.protocol == "maxboxacc" else corloc
    outcome, view, settings, kind = measure(args, loaded, images, head)
    results = outcome.results
    if results["not_finite"]:
        say(f"warning: {results['not_finite']} of {results['images']} maps are empty or hold values that are not "
            "finite, and count as zeros: look for a checkpoint before the model diverged")  # fmt: skip
    if results.get("flat"):
        say(f"warning: {results['flat']} of {results['images']} maps are the same everywhere and count as zeros: the "
            "model attends to nothing in particular")  # fmt: skip
    for title, part in box_results.parts(results):
        say(title)
        say(records.table(*kind.table(part)))
    if args.save_boxes:
        results["boxes"] = outcome.each()
    if is_main_process():
        kind.draw(results, TITLES[args.protocol], file_of(args, folder))
        for path in box_results.write_galleries(
            outcome, view, TITLES[args.protocol], lambda which: file_of(args, folder, f"_{which}")
        ):
            say(f"pictures: {path}")
    settings |= {"amp": args.amp or "none", "on_bad_image": args.on_bad_image}
    if args.protocol != "lost" and args.map == "attention":
        settings["head"] = "mean" if head is None else head
    data = {"data_path": str(args.data_path), "image_list": args.image_list, **outcome.data()}
    write(args, loaded, folder, data, settings, results)


def max_box_acc(
    args: argparse.Namespace, loaded: LoadedModel, images: BoxedImages, head: int | None
) -> tuple[Outcome, View, dict[str, Any], Kind]:
    """MaxBoxAccV2, or V1 if only the largest contour counts."""
    side, channels = args.image_size or options.input_side(loaded.config), options.channels(loaded.config)
    with input_errors(f"--image_size {side}"):  # a size that the model can't take
        maps_of(args, loaded, head, torch.zeros(1, channels, side, side, device=args.torch_device))
    found = search_levels(
        images, lambda x: maps_of(args, loaded, head, x), side=side, device=args.torch_device,
        batch_size=args.batch_size_per_gpu, num_workers=args.num_workers, multi_contour=args.multi_contour,
        on_bad_image=args.on_bad_image,
    )  # fmt: skip

    def view(i: int) -> tuple[Tensor, Tensor]:
        pixels = whole_pixels(images.source, i)
        squashed = normalize(resize_bilinear(pixels, side).to(args.torch_device))
        return pixels, torch.from_numpy(score_map(maps_of(args, loaded, head, squashed)[0]))

    settings = {"map": args.map, "multi_contour": args.multi_contour, "img_size": side, "resize": "squashed, bilinear"}
    return box_results.max_box_outcome(found), view, settings, box_results.MAX_BOX


def corloc(
    args: argparse.Namespace, loaded: LoadedModel, images: BoxedImages, head: int | None
) -> tuple[Outcome, View, dict[str, Any], Kind]:
    """CorLoc of DINO-seg or LOST."""
    find, settings = make_finder(args, loaded, head)
    with input_errors(f"--protocol {args.protocol}"):
        found = discover(
            images, find, device=args.torch_device, max_side=args.max_side, num_workers=args.num_workers,
            on_bad_image=args.on_bad_image, desc=args.protocol,
        )  # fmt: skip

    def view(i: int) -> tuple[Tensor, Tensor]:
        pixels = whole_pixels(images.source, i)
        seen = bounded(pixels, args.max_side)
        return pixels, find(normalize(seen.to(args.torch_device))).over(*seen.shape[-2:])

    settings |= {"max_side": args.max_side, "padding": "zeros, right and below"}
    return box_results.corloc_outcome(images, found), view, settings, box_results.CORLOC


def make_finder(args: argparse.Namespace, loaded: LoadedModel, head: int | None) -> tuple[Finder, dict[str, Any]]:
    """The chosen method on this model, and its settings."""
    sizes = options.input_side(loaded.config), options.channels(loaded.config)
    amp_dtype = options.AMP_DTYPES[args.amp or "none"]
    with input_errors(f"--protocol {args.protocol}"):
        if args.protocol == "lost":
            return lost_finder(loaded.model, *sizes, amp_dtype), {}
        settings = {"mass": args.mass, "published_components": args.published_components}
        return dino_seg_finder(loaded.model, head, *sizes, amp_dtype, **settings), settings


# ---- without boxes --------------------------------------------------------------------------------------------------


def summary(args: argparse.Namespace, loaded: LoadedModel, folder: Path) -> None:
    """How spread out, central and connected the maps of any images are."""
    head = chosen_head(args, loaded)
    split = "val" if has_val(args.data_path) else "train"
    source = open_images(args.data_path, split, -1, options.channels(loaded.config))

    def measured(images: Tensor) -> Tensor:
        values = torch.stack([summarise(map) for map in one_map(loaded.model.get_attention_map(images), head).cpu()])
        return torch.cat([values.nan_to_num(0), values.isfinite().all(1, keepdim=True)], dim=1)

    rows, _ = features.extract(
        loaded.model, source, forward=measured, desc="maps", **options.extraction(args, loaded.config)
    )
    results = summary_results(rows.double())
    if results["not_finite"]:
        say(f"warning: {results['not_finite']} of {len(rows)} maps are empty or not finite, and are left out")
    cells = [[name, *(f"{value:.4f}" for value in (*results[name].values(), UNIFORM[name]))] for name in COLUMNS]
    say(f"{len(rows)} images")
    say(records.table(["map", "mean", "std", "uniform map"], cells))
    settings = {**options.numerics(args, loaded.config), "head": "mean" if head is None else head, "mass": MASS}
    data = {"data_path": str(args.data_path), "split": split, "images": len(rows), "fingerprint": source.fingerprint()}
    write(args, loaded, folder, data, settings, results)


def summary_results(rows: Tensor) -> dict[str, Any]:
    """Mean and standard deviation of each measure from rows (N, 4), whose last column says which maps count."""
    good = rows[rows[:, -1] > 0]
    if not len(good):
        raise InputError(f"none of {len(rows)} maps is finite: the model has diverged; take an earlier checkpoint")
    spread = good.std(0) if len(good) > 1 else torch.zeros(good.shape[1])
    measures = {name: {"mean": good[:, k].mean().item(), "std": spread[k].item()} for k, name in enumerate(COLUMNS)}
    return {"images": len(rows), "not_finite": len(rows) - len(good), **measures}


# ---- files ----------------------------------------------------------------------------------------------------------


def file_of(args: argparse.Namespace, folder: Path, suffix: str = "") -> Path:
    """A picture of this protocol's results."""
    return folder / f"eval_localization_{args.protocol}{suffix}.png"


def write(
    args: argparse.Namespace, loaded: LoadedModel, folder: Path, data: dict[str, Any], settings: dict[str, Any],
    results: dict[str, Any],
) -> None:  # fmt: skip
    """The JSON, and the report of the checkpoint's run if there is one."""
    records.write_evaluation(
        folder, f"eval_localization_{args.protocol}", options.describe(loaded, args), data,
        {"protocol": args.protocol, **settings}, results,
    )  # fmt: skip
    report.refresh_report(args.pretrained_weights)


if __name__ == "__main__":
    run_program(main)
