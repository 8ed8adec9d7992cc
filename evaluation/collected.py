"""The features that k-NN classifies: extracted from a checkpoint's images, or read from files and checked.

Every function takes eval_knn.py's arguments.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.sampler import shard_for_eval
from evaluation import features, identity, labelled, options, records, stored_features
from evaluation.models import LoadedModel, load_checkpoint_model
from runtime.distributed import get_rank, get_world_size, is_main_process
from runtime.guards import input_errors
from runtime.reproduce import fix_random_seeds
from runtime.terminal import say


@dataclass
class Collected:
    """Normalised features and labels of train and val, and what the JSON says of their origin."""

    features: stored_features.FeatureSet
    complete: bool  # whether this rank holds the whole training set, or only its share
    model: dict[str, Any]
    data: dict[str, Any]
    numerics: dict[str, Any]  # settings that change the features

    def training_share(self) -> tuple[Tensor, Tensor]:
        """This rank's part of the training features and labels."""
        train, labels = self.features.train_features, self.features.train_labels
        if self.complete:
            share = shard_for_eval(len(train), get_rank(), get_world_size())
            mine = slice(share[0], share[-1] + 1) if len(share) else slice(0)
            train, labels = train[mine], labels[mine]
        return train, labels


def load(args: argparse.Namespace) -> LoadedModel:
    """The model of --pretrained_weights on this process's device."""
    flags = options.model_flags(args)
    fix_random_seeds(args.seed)  # so a model without a checkpoint is the same in every program
    return load_checkpoint_model(
        args.pretrained_weights, checkpoint_key=args.checkpoint_key, device=args.torch_device, **flags
    )


def numerics(args: argparse.Namespace, loaded: LoadedModel) -> dict[str, Any]:
    """The settings that change the features, as they are recorded."""
    return options.numerics(args, loaded.config) | {"features_dtype": args.features_dtype or "fp32"}


def collect(args: argparse.Namespace) -> Collected:
    """Features from --load_features, or extracted; complete on every rank if a later step needs them so."""
    if args.load_features:
        return collect_saved(args)
    loaded = load(args)
    in_chans = options.channels(loaded.config)
    train, val = labelled.open_labelled(args.data_path, args.subset, in_chans, args.val_fraction)
    settings = options.extraction(args, loaded.config)
    share = features.extract_shard(loaded.model, train, desc="training features", **settings)
    if args.on_bad_image == "skip":
        features.report_skipped(train, share.bad, "training")
    test, test_index = features.extract(loaded.model, val, desc="validation features", **settings)
    train_features, index = share.features, share.index
    complete = get_world_size() == 1 or bool(args.dump_features or args.low_shot)
    if complete:
        train_features, index = features.gather_shards(train_features), features.gather_shards(index)
    made_by = {
        **options.describe(loaded, args),
        **identity.of_data(train, val),
        **numerics(args, loaded),
        "classes": train.classes,
    }
    found = stored_features.FeatureSet(
        features.normalize_rows_(train_features),
        features.normalize_rows_(test),
        torch.from_numpy(train.labels)[index],
        torch.from_numpy(val.labels)[test_index],
        made_by,
    )
    if args.dump_features and is_main_process():
        with input_errors("--dump_features"):
            stored_features.dump_features(args.dump_features, found)
        say(f"features written to {args.dump_features}")
    data = records.describe_data(args.data_path, train, val)
    return Collected(found, complete, options.describe(loaded, args), data, numerics(args, loaded))


def collect_saved(args: argparse.Namespace) -> Collected:
    """Features of --load_features, checked against all that the command line says of what should have made them.

    What it does not say is taken from the description that lies with the features, and recorded as it stands there.
    """
    expected: dict[str, Any] = {}
    data: dict[str, Any] = {"load_features": str(args.load_features)}
    in_chans = args.in_chans or 3
    if args.pretrained_weights:
        loaded = load(argparse.Namespace(**{**vars(args), "torch_device": torch.device("cpu")}))
        expected |= identity.of_model(loaded, args.checkpoint_key)
        expected |= {key: numerics(args, loaded)[key] for key in ("img_size", "resize")}
        in_chans = options.channels(loaded.config)
    for key in ("amp", "features_dtype"):
        if getattr(args, key) is not None:
            expected[key] = getattr(args, key)
    if args.data_path != options.NO_DATA:
        train, val = labelled.open_labelled(args.data_path, args.subset, in_chans, args.val_fraction)
        expected |= identity.of_data(train, val)
        data |= records.describe_data(args.data_path, train, val)
    saved = stored_features.load_features(args.load_features, expected)
    made_by = saved.description
    if not args.pretrained_weights and made_by:
        check_model_flags(args, made_by)
    model = {key: made_by.get(key) for key in ("checkpoint", "checkpoint_sha256", "checkpoint_key", "epoch", "config")}
    settings = {key: made_by.get(key) for key in (*identity.EXTRACTION, "features_dtype")}
    return Collected(saved, True, model, data, settings)


def check_model_flags(args: argparse.Namespace, made_by: dict[str, Any]) -> None:
    """Raise InputError if a flag of the model contradicts the description of stored features."""
    config = made_by.get("config") if isinstance(made_by.get("config"), dict) else {}
    given = {key: value for key, value in options.model_flags(args).items() if value not in (None, "auto")}
    identity.require_same(
        config, given, [key for key in given if key in config],
        f"the features in {args.load_features} were made by another model", "Leave the flag or --load_features out",
    )  # fmt: skip
