"""The images of a run: to train on, and to evaluate on while training."""

from __future__ import annotations

import argparse

from data.datasets import check_same_classes, open_images
from data.source import ImageSource
from runtime.guards import InputError
from training.method import Method


def open_data(args: argparse.Namespace, method: Method) -> tuple[ImageSource, ImageSource | None]:
    """Training images, and validation images if an evaluation is wanted and possible.

    Without labels a self-supervised run does without evaluation, and a note says so. Raises InputError if a labelled
    method, or --keep_best, lacks what it needs.
    """
    held_out = {"val_fraction": args.val_fraction}  # one division for training and evaluations, whatever --seed is
    train = open_images(args.data_path, "train", args.subset, args.in_chans, **held_out)
    if method.labelled and train.labels is None:
        raise InputError(
            f"--data_path {args.data_path} has no labels, which {method.name} training needs: put the images into one "
            "folder per class, or give a list with a label in each line"
        )
    if not args.eval_every:
        return train, None
    try:
        return train, _open_val(args, train)
    except InputError as error:
        if method.labelled:
            raise InputError(f"{error}; --eval_every 0 trains without evaluation") from error
        if args.keep_best:
            raise InputError(f"--keep_best true needs an evaluation while training: {error}") from error
        args.notes.append(f"no k-NN evaluation while training: {error}")
        return train, None


def _open_val(args: argparse.Namespace, train: ImageSource) -> ImageSource:
    """Validation images with the classes of the training images. Raises InputError."""
    if train.labels is None:
        raise InputError("the images have no labels")
    try:
        val = open_images(args.data_path, "val", in_chans=args.in_chans, val_fraction=args.val_fraction)
        check_same_classes(train, val)
        return val
    except InputError as error:
        advice = "" if args.val_fraction else "; --val_fraction 0.1 holds a tenth of each class out for it"
        raise InputError(f"{error}{advice}") from error
