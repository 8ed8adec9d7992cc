"""What every way of running eval_linear needs: the model, its images, and how its features are made and recorded."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from data.parts import Part
from data.source import ImageSource
from evaluation import cached, features, identity, labelled, options, records, report
from evaluation.forms import Form, default_forms, form_widths
from evaluation.models import LoadedModel, load_checkpoint_model
from runtime.guards import InputError, input_errors
from runtime.reproduce import fix_random_seeds


@dataclass
class Task:
    """What every way of running this program needs."""

    args: argparse.Namespace
    folder: Path
    loaded: LoadedModel
    train: ImageSource
    val: ImageSource
    extraction: dict[str, Any]  # settings of features.extract

    @property
    def device(self) -> torch.device:
        return self.args.torch_device

    @property
    def model(self) -> nn.Module:
        return self.loaded.model

    def forms(self) -> list[Form]:
        """The forms of features that the flags ask for, checked on the model."""
        args, default = self.args, default_forms(self.model)[0]
        depths = args.n_last_blocks or [default.n]
        pools = args.avgpool_patchtokens if args.avgpool_patchtokens is not None else [default.avgpool]
        forms = [Form(n, pool) for n in dict.fromkeys(depths) for pool in dict.fromkeys(pools)]
        self.widths(forms)
        return forms

    def widths(self, forms: list[Form]) -> list[int]:
        """Width of each form's features."""
        channels = options.channels(self.loaded.config)
        with input_errors():
            return form_widths(self.model, forms, self.extraction["img_size"], channels, self.device)

    def identity(self, forms: list[Form]) -> dict[str, Any]:
        """All that changes a head's input and labels; see evaluation.identity."""
        return {
            **identity.of_model(self.loaded, self.args.checkpoint_key),
            **options.numerics(self.args, self.loaded.config),
            "classes": identity.of_classes(self.train),
            "forms": [list(form) for form in forms],
        }

    def cache(
        self, source: ImageSource, forms: list[Form], desc: str, indices: np.ndarray | None = None
    ) -> cached.Cached:
        """This rank's share of the features of a source, or of its `indices`, for every form."""
        return cached.cache(self.model, source, forms, self.widths(forms), self.extraction, desc, indices)

    def write(self, name: str, settings: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
        """The evaluation's JSON; returns the results."""
        common = {key: getattr(self.args, key) for key in ("subset", "seed", "val_fraction")}
        common |= options.numerics(self.args, self.loaded.config)
        data = records.describe_data(self.args.data_path, self.train, self.val)
        records.write_evaluation(
            self.folder, name, options.describe(self.loaded, self.args), data, common | settings, results
        )
        report.refresh_report(self.args.pretrained_weights)
        return results


def prepare(args: argparse.Namespace, folder: Path) -> Task:
    """Load the model and open the labelled images."""
    flags = options.model_flags(args)
    fix_random_seeds(args.seed)  # so a model without a checkpoint is the same in every program
    loaded = load_checkpoint_model(
        args.pretrained_weights, checkpoint_key=args.checkpoint_key, device=args.torch_device, **flags
    )
    for parameter in loaded.model.parameters():
        parameter.requires_grad_(False)
    channels = options.channels(loaded.config)
    train, val = labelled.open_labelled(args.data_path, args.subset, channels, args.val_fraction)
    if args.on_bad_image == "skip":  # a probe reads each image in every epoch: it must know beforehand which count
        readable = features.readable(train, args.num_workers)
        left_out = np.setdiff1d(np.arange(len(train)), readable).tolist()
        train = Part(train, readable, f"without {left_out}") if left_out else train
    if args.num_labels is not None and args.num_labels < len(train.classes):
        raise InputError(
            f"--num_labels {args.num_labels}, but the images have {len(train.classes)} classes; leave it out"
        )
    return Task(args, folder, loaded, train, val, options.extraction(args, loaded.config))
