"""How much a model's predictions rest on the background: ImageNet-9's variants.

    python eval_background.py --pretrained_weights supervised.pth --data_path bg_challenge/
    python eval_background.py --pretrained_weights dino.pth --data_path bg_challenge/ --linear_weights best.pth.tar
    python eval_background.py --pretrained_weights dino.pth --data_path bg_challenge/ --classifier knn

The classifier is the checkpoint's own 1000-way head, or a linear head of eval_linear.py on ImageNet (--linear_weights).
Without one, k-NN or logistic regression on original/train take its place. Prints top-1 on each variant and BG-gap,
the difference between mixed_same and mixed_rand, and writes eval_background.json to the checkpoint's folder, or to
--output_dir. The protocol: evaluation/imagenet9.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pretrained
from data.source import ImageSource
from evaluation import features, heads, identity, imagenet9, knn, options, records, report
from evaluation.forms import default_forms, form_widths, probe_features
from evaluation.imagenet9 import IMAGENET_CLASSES, VARIANTS
from evaluation.logistic import chosen_classifier
from evaluation.models import LoadedModel, load_checkpoint_model
from runtime.cli import add_flag, parse_program
from runtime.distributed import init_distributed_mode, leave
from runtime.guards import EXIT_DONE, InputError, input_errors, run_program
from runtime.reproduce import fix_random_seeds
from runtime.terminal import say

CLASSIFIERS = ("auto", "head", "knn", "probe")
Score = Callable[[ImageSource, str], tuple[float, int]]  # a variant -> percent of right answers, number of images


def get_args_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = options.evaluation_parser("eval_background")
    group = parser.add_argument_group("classifier")
    add_flag(group, "--classifier", choices=CLASSIFIERS, default="auto",
             help="head: a 1000-way one; knn, probe: on original/train; auto: head, else knn")  # fmt: skip
    add_flag(group, "--linear_weights", default=None, metavar="FILE",
             help="a linear head on this backbone, of ImageNet-1k, as eval_linear.py saves it")  # fmt: skip
    add_flag(group, "--nb_knn", type=int, default=20, help="number of neighbours, k")
    add_flag(group, "--temperature", type=float, default=0.07, help="temperature of their votes")
    add_flag(group, "--seed", type=int, default=0, help="seed of the probe's held-out part, and of random weights")
    options.add_checkpoint_flags(parser)
    options.add_run_flags(parser, data="the folder with ImageNet-9's variants: original/, mixed_same/ ...")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    args = parse_program("eval_background.py", get_args_parser(), __doc__, argv)
    options.check_run(args)
    options.check_positive(args, "nb_knn")
    options.check_above_zero(args, "temperature")
    if args.linear_weights and args.classifier in ("knn", "probe"):
        raise InputError(
            f"--linear_weights is a head, but --classifier {args.classifier} trains its own: leave one out"
        )
    folder = records.output_folder(args.output_dir, args.pretrained_weights)
    init_distributed_mode(args)
    try:
        evaluate(args, folder)
    finally:
        leave()
    return EXIT_DONE


def evaluate(args: argparse.Namespace, folder: Path) -> None:
    """Top-1 on every variant that is there: table and eval_background.json."""
    flags = options.model_flags(args)
    fix_random_seeds(args.seed)
    loaded = load_checkpoint_model(
        args.pretrained_weights, checkpoint_key=args.checkpoint_key, device=args.torch_device, **flags
    )
    channels = options.channels(loaded.config)
    variants = imagenet9.open_variants(args.data_path, channels)
    missing = [name for name in VARIANTS if name not in variants]
    if missing:
        say(f"not there, and left out: {', '.join(missing)}")
    score, classifier = make_classifier(args, loaded, channels)
    results: dict[str, Any] = {}
    for name, source in variants.items():
        top1, images = score(source, name)
        results[name] = {"top1": top1, "images": images}
    if {"mixed_same", "mixed_rand"} <= set(results):
        results["bg_gap"] = results["mixed_same"]["top1"] - results["mixed_rand"]["top1"]
    rows = [[f"{name} ({VARIANTS[name]})", results[name]["top1"], results[name]["images"]] for name in variants]
    rows += [["BG-gap (MS - MR)", results["bg_gap"], ""]] if "bg_gap" in results else []
    say(records.table(["ImageNet-9", "top-1", "images"], rows))
    data = {"data_path": str(args.data_path), "fingerprints": {n: s.fingerprint() for n, s in variants.items()}}
    settings = {**classifier, **options.numerics(args, loaded.config), **sizes(loaded), "seed": args.seed}
    records.write_evaluation(folder, "eval_background", options.describe(loaded, args), data, settings, results)
    report.refresh_report(args.pretrained_weights)


# ---- classifiers ----------------------------------------------------------------------------------------------------


def make_classifier(args: argparse.Namespace, loaded: LoadedModel, channels: int) -> tuple[Score, dict[str, Any]]:
    """What scores a variant, and its settings. Raises InputError if there is neither a head nor a train part."""
    head = find_head(args, loaded, channels) if args.classifier in ("auto", "head") else None
    if head is not None:
        return head
    without = "no 1000-way head: neither the checkpoint nor --linear_weights gives one"
    if args.classifier == "head":
        raise InputError(f"{without}; train one with eval_linear.py on ImageNet, or take --classifier knn")
    train = imagenet9.open_train(args.data_path, channels)
    if train is None or train.labels is None:
        raise InputError(
            (f"{without}, and " if args.classifier == "auto" else "")
            + f"{args.data_path}/original/train with class folders is not there, which k-NN and a probe need: give "
            "--linear_weights of eval_linear.py on ImageNet, or add ImageNet-9's train part"
        )
    if args.classifier == "auto":
        say(f"{without}: k-NN on {train.where} instead")
    return trained_classifier(args, loaded, train)


def find_head(args: argparse.Namespace, loaded: LoadedModel, channels: int) -> tuple[Score, dict[str, Any]] | None:
    """The head of --linear_weights, or the one in the checkpoint; None if there is neither."""
    model, form = loaded.model, default_forms(loaded.model)[0]
    if args.linear_weights:
        saved = heads.read_head(Path(args.linear_weights))
        check_belongs(saved, args, loaded)
        weight, bias, form = saved.weight, saved.bias, saved.form or form
        with input_errors():
            width = form_widths(model, [form], options.input_side(loaded.config), channels, args.torch_device)[0]

        def features_of(images: Tensor) -> Tensor:
            return probe_features(model, images, [form])[0]

    else:
        content = pretrained.read(loaded.path) if loaded.path else {}
        width = model.num_features
        found = pretrained.find_classifier(content, args.checkpoint_key, loaded.path, width) if content else None
        if found is None:
            return None
        weight, bias = found
        features_of = model
    where = args.linear_weights or loaded.path
    if weight.shape[1] != width:
        raise InputError(f"{where} is a head on {weight.shape[1]} features, but the model gives {width} ({form.name})")
    outputs = len(weight)
    if outputs not in (IMAGENET_CLASSES, len(imagenet9.CLASSES)):
        if args.linear_weights:
            raise InputError(f"{where} is a head of {outputs} classes: ImageNet-9 needs one of 1000, or of its nine")
        say(f"the checkpoint's head has {outputs} classes, not 1000, and is not used")
        return None
    weight, bias = weight.to(args.torch_device), bias.to(args.torch_device)

    def predict(images: Tensor) -> Tensor:
        x = features_of(images).float()
        with torch.autocast(x.device.type, enabled=False):  # the head in float32, as eval_linear.py has it
            largest, answer = F.linear(x, weight, bias).max(1)
        return torch.stack([answer.float(), largest], dim=1)  # what is not finite is found in the second column

    def score(source: ImageSource, name: str) -> tuple[float, int]:
        rows, index = extract(args, loaded, source, name, forward=predict)
        labels = source.labels[index.numpy()]
        return imagenet9.hits(rows[:, 0].long(), labels, source.classes, source.where, outputs), len(rows)

    return score, {"classifier": "head", "head": str(where), "outputs": outputs}


def check_belongs(head: heads.SavedHead, args: argparse.Namespace, loaded: LoadedModel) -> None:
    """Raise InputError for a head of ours that was trained on another backbone's features."""
    if head.identity is None:
        return
    mine = identity.of_model(loaded, args.checkpoint_key)
    identity.require_same(
        head.identity, mine, identity.recorded(head.identity, mine, args.linear_weights),
        f"{args.linear_weights} was trained on other features", "Give the checkpoint and settings that it belongs to",
    )  # fmt: skip


def trained_classifier(
    args: argparse.Namespace, loaded: LoadedModel, train: ImageSource
) -> tuple[Score, dict[str, Any]]:
    """k-NN or logistic regression on the features of `train`; every rank holds all of them."""
    x, index = extract(args, loaded, train, "training")
    y = torch.from_numpy(train.labels[index.numpy()])
    probe = args.classifier == "probe"
    settings: dict[str, Any] = {"train_images": len(x), "train_fingerprint": train.fingerprint()}
    if probe:
        fitted = chosen_classifier(x.to(args.torch_device), y, len(train.classes), seed=args.seed)
        settings |= {"classifier": "probe", "penalty": fitted.penalty}
    else:
        x = features.normalize_rows_(x).to(args.torch_device)
        settings |= {"classifier": "knn", "nb_knn": args.nb_knn, "temperature": args.temperature}

    def score(source: ImageSource, name: str) -> tuple[float, int]:
        if source.classes != train.classes:
            raise InputError(f"{source.where} and {train.where} have different class folders: both need the same nine")
        test, test_index = extract(args, loaded, source, name)
        labels = torch.from_numpy(source.labels[test_index.numpy()])
        test = test.to(args.torch_device)
        if probe:
            return 100.0 * (fitted.logits(test).argmax(1).cpu() == labels).double().mean().item(), len(test)
        with input_errors():
            found = knn.knn_accuracies(
                x, y, features.normalize_rows_(test), labels, [args.nb_knn], [args.temperature], len(train.classes)
            )
        return next(iter(found.values()))[0], len(test)

    return score, settings


def extract(
    args: argparse.Namespace, loaded: LoadedModel, source: ImageSource, name: str, **settings: Any
) -> tuple[Tensor, Tensor]:
    """Rows of whole images, nothing cropped, and the images' indices; each image on one rank."""
    settings = {**options.extraction(args, loaded.config), **sizes(loaded), **settings}
    return features.extract(loaded.model, source, desc=f"{name} features", **settings)


def sizes(loaded: LoadedModel) -> dict[str, int]:
    """The images' side, without the margin that other evaluations crop."""
    side = options.input_side(loaded.config)
    return {"img_size": side, "resize": side}


if __name__ == "__main__":
    run_program(main)
