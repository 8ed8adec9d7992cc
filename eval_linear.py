"""Linear and attentive probes of a frozen checkpoint: many heads in one pass of the backbone.

    python eval_linear.py --pretrained_weights output/checkpoint.pth --data_path /path/to/imagenet
    torchrun --nproc_per_node 8 eval_linear.py --pretrained_weights ... --data_path ... --lr 0.001 0.01 0.1
    python eval_linear.py --pretrained_weights ... --data_path ... --probes linear ep --probe_maps
    python eval_linear.py --pretrained_weights ... --data_path ... --evaluate          # a saved head
    python eval_linear.py ... --evaluate --mask_ratios 0.1 0.3 --mask_by dino.pth      # without what DINO attends to
    python eval_linear.py --pretrained_weights ... --data_path ... --logistic          # an answer in seconds

Without --lr twelve learning rates are tried, from 1e-4 to 30 per 256 images, which covers ViTs, ResNets and small
models on few images. The best head is chosen on a tenth of train held out for it (--select_on val chooses on val, as
the published numbers did, and trains on all of train); a single head needs no choice. Writes to --output_dir, by
default the checkpoint's folder: eval_linear.json, eval_linear.png, eval_linear_log.txt, checkpoint.pth.tar (to resume)
and best.pth.tar, which hold the chosen head under the published names. The protocol: evaluation/linear.py.

--probes trains attentive probes on the backbone's tokens as well, each with the same grid: evaluation/probes.py. The
best head of each is in best_NAME.pth.tar.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from data.sampler import TrainSampler
from evaluation import features, heads, identity, linear, logistic, options, records
from evaluation.crops import build_probe_loader
from evaluation.forms import Form, probe_features
from evaluation.linear import LinearClassifier, Probe
from evaluation.linear_task import Task, prepare
from evaluation.models import load_checkpoint_model
from evaluation.probe_cache import MemoryBudget, TrainingTokens
from evaluation.probe_plan import Plan, add_probe_flags, build_probe, describe, draw_maps, evaluation_set, read_plan
from evaluation.probe_sweep import ProbeSweep
from evaluation.probes import Probes
from evaluation.saved_head import run_saved
from evaluation.single_head import train, validate_network
from evaluation.sweep import Sweep, train_epoch
from runtime.cli import add_flag, bool_flag, parse_program
from runtime.distributed import barrier, get_rank, get_world_size, init_distributed_mode, is_main_process, leave
from runtime.guards import EXIT_DONE, InputError, run_program
from runtime.terminal import say

__all__ = ["LinearClassifier", "eval_linear", "load_checkpoint_model", "train", "validate_network"]


def get_args_parser() -> argparse.ArgumentParser:
    """The flags; those of the published program keep their names and meaning."""
    parser = options.evaluation_parser("eval_linear")
    group = parser.add_argument_group("heads")
    default_lrs = " ".join(f"{lr:g}" for lr in linear.DEFAULT_LRS)
    add_flag(group, "--lr", type=float, nargs="+", default=None,
             help=f"base learning rates per 256 images, one or many (default: {default_lrs}; "
                  "recipes ep and capi have others)")  # fmt: skip
    add_flag(group, "--n_last_blocks", type=int, nargs="+", default=None,
             help="official ViT: [CLS] of the last n blocks, one or many (default: 4, ViT-B 1, others 1)")  # fmt: skip
    add_flag(group, "--avgpool_patchtokens", type=bool_flag, nargs="+", default=None,
             help="official ViT: also the mean patch token; 'false true' tries both (default: ViT-B only)")  # fmt: skip
    add_flag(group, "--select_on", choices=("train", "val"), default="train",
             help="choose the best head on a held-out tenth of train, or on val itself")  # fmt: skip
    add_flag(group, "--num_labels", type=int, default=None, help="number of outputs (default: the number of classes)")
    add_probe_flags(parser)
    group = parser.add_argument_group("training")
    add_flag(group, "--epochs", type=int, default=None,
             help="passes over the training images (default: 100; recipe ep: 90)")  # fmt: skip
    add_flag(group, "--val_freq", type=int, default=1, help="epochs between validations")
    add_flag(group, "--subset", type=int, default=-1, help="first images of each training class to use; -1: all")
    add_flag(
        group, "--seed", type=int, default=0, help="seed of the crops, their order, the heads and the held-out part"
    )
    group = parser.add_argument_group("instead of training")
    add_flag(group, "--evaluate", action="store_true", help="only validate a saved head")
    add_flag(group, "--linear_weights", default=None, metavar="FILE",
             help="the head of --evaluate, ours or published (default: best.pth.tar of --output_dir)")  # fmt: skip
    add_flag(group, "--mask_ratios", type=float, nargs="+", default=None,
             help="with --evaluate: also with these parts of the patches black, the most attended ones")  # fmt: skip
    add_flag(group, "--mask_by", default=None, metavar="CHECKPOINT", help="the model whose attention decides on them")
    add_flag(group, "--logistic", action="store_true",
             help="logistic regression on features without augmentation, by L-BFGS")  # fmt: skip
    options.add_checkpoint_flags(parser)
    options.add_run_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    args = parse_program("eval_linear.py", get_args_parser(), __doc__, argv)
    try:
        eval_linear(args)
    finally:
        leave()
    return EXIT_DONE


def eval_linear(args: argparse.Namespace) -> dict[str, Any]:
    """The whole evaluation for parsed arguments (DINO's name); returns the results that the JSON holds."""
    args = options.with_defaults(args, get_args_parser())
    for name in ("lr", "n_last_blocks", "avgpool_patchtokens"):
        value = getattr(args, name)
        setattr(args, name, value if value is None or isinstance(value, list) else [value])
    options.check_run(args)
    plan = read_plan(args)
    options.check_positive(args, "epochs", "val_freq")
    for name, check in (("lr", options.check_above_zero), ("n_last_blocks", options.check_positive)):
        if getattr(args, name) is not None:
            check(args, name)
    check_masking(args)
    folder = records.output_folder(args.output_dir, args.pretrained_weights)
    init_distributed_mode(args)
    task = prepare(args, folder)
    if args.logistic:
        return run_logistic(task)
    return run_saved(task) if args.evaluate else run_sweep(task, plan)


def check_masking(args: argparse.Namespace) -> None:
    """Raise InputError for flags of masked images that don't go together."""
    if (args.mask_ratios is None) != (args.mask_by is None):
        raise InputError("--mask_ratios and --mask_by belong together: which parts to hide, and by whose attention")
    if args.mask_ratios is not None and not args.evaluate:
        raise InputError("--mask_ratios hides parts of validation images from a saved head: give --evaluate too")
    wrong = [ratio for ratio in args.mask_ratios or [] if not 0 <= ratio <= 1]
    if wrong:
        raise InputError(f"--mask_ratios {wrong[0]:g}: give parts of the patches from 0 to 1")


# ---- the sweep ------------------------------------------------------------------------------------------------------


def run_sweep(task: Task, plan: Plan) -> dict[str, Any]:
    """Train all heads of all probes, choose the best, write everything."""
    args = task.args
    forms = task.forms() if plan.has_linear else []
    num_labels = args.num_labels or len(task.train.classes)
    choose = plan.head_count(forms) > 1 and args.select_on == "train"
    kept, held_out = linear.split_train(task.train.labels, args.seed) if choose else (np.arange(len(task.train)), None)
    sampler = probe_sampler(args, len(kept))
    probe, tokens = build_probe(task, plan, forms, num_labels, sampler.global_batch)
    describe(plan, probe, tokens, sampler.global_batch)
    describe_images(task, len(kept), sampler.global_batch, held_out)
    made_by = run_identity(task, plan, forms, num_labels, sampler.global_batch, len(kept))
    sweep = (ProbeSweep if plan.names else Sweep)(task.folder, probe, made_by)
    first_epoch, budget = sweep.resume(), MemoryBudget(args.token_cache)
    loader = training_batches(task, probe, budget, kept, sampler)
    val = evaluation_set(task, probe, budget, task.val, "validation")
    selection = evaluation_set(task, probe, budget, task.train, "held-out", held_out) if choose else val

    for epoch in range(first_epoch, args.epochs):
        sampler.set_position(epoch)
        scales = plan.recipe.scales(epoch, args.epochs, sampler.steps_per_epoch)
        losses = train_epoch(
            task.model, probe, loader, scales, task.device, task.extraction["amp_dtype"], f"epoch {epoch}"
        )
        if (epoch + 1) % args.val_freq == 0 or epoch + 1 == args.epochs:
            val_counts = val.count(probe)
            sweep.validated(epoch, losses, val_counts, selection.count(probe) if choose else val_counts)
        sweep.save(epoch + 1)
    selected_on = "held-out train" if choose else "val"
    settings = {**sweep.identity, "selected_on": selected_on, "batch_size_per_gpu": args.batch_size_per_gpu}
    results = sweep.finish(selected_on)
    if args.probe_maps is not None:
        draw_maps(task, sweep.best_heads())
    return task.write("eval_linear", settings, results)


def training_batches(
    task: Task, probe: Probe | Probes, budget: MemoryBudget, kept: np.ndarray, sampler: TrainSampler
) -> Iterable:
    """Random crops of the images `kept`, new ones in every epoch; with --augment false their tokens, computed once."""
    args, side, pinned = task.args, task.extraction["img_size"], task.device.type == "cuda"
    if not args.augment:
        return TrainingTokens(task.model, task.train, probe, task.extraction, budget, kept, sampler)
    return build_probe_loader(task.train, kept, sampler, side, args.num_workers, args.seed, pinned)


def probe_sampler(args: argparse.Namespace, images: int) -> TrainSampler:
    """Which images make up which step. Raises InputError if they do not fill one."""
    global_batch = args.batch_size_per_gpu * get_world_size()
    if images < global_batch:
        raise InputError(
            f"{images} images to train on do not fill one batch of {global_batch} ({args.batch_size_per_gpu} per "
            f"process x {get_world_size()} process(es)): lower --batch_size_per_gpu to at most "
            f"{max(1, images // get_world_size())}"
        )
    return TrainSampler(images, args.batch_size_per_gpu, seed=args.seed, rank=get_rank(), world_size=get_world_size())


def describe_images(task: Task, images: int, global_batch: int, held_out: np.ndarray | None) -> None:
    """Say what is trained on, and how the choice will be made."""
    choice = f"; {len(held_out)} held out to choose the head by" if held_out is not None else ""
    say(f"training on {images} images of {len(task.train.classes)} classes{choice}")
    tail = images % global_batch
    if tail:
        say(f"each epoch leaves out {tail} of them, others each time: they do not fill a batch")


def run_identity(
    task: Task, plan: Plan, forms: list[Form], num_labels: int, global_batch: int, images: int
) -> dict[str, Any]:
    """What must agree for a saved run to be continued."""
    args = task.args
    return {
        **task.identity(forms),
        **identity.of_data(task.train, task.val),
        "training_images": images,
        "num_labels": num_labels,
        "crops": "bilinear" if args.augment else "central",  # earlier versions trained on bicubic ones
        "order": heads.ORDER,
        "lrs": plan.lrs,
        **plan.identity(),
        "epochs": args.epochs,
        "val_freq": args.val_freq,
        "global_batch": global_batch,
        "seed": args.seed,
        "select_on": args.select_on,
    }


# ---- logistic regression ---------------------------------------------------------------------------------------------


def run_logistic(task: Task) -> dict[str, Any]:
    """Logistic regression on features of uncropped images."""
    form = task.forms()[0]
    forward = {"forward": lambda images: probe_features(task.model, images, [form])[0]}
    train, index = features.extract(task.model, task.train, desc="training features", **forward, **task.extraction)
    val, val_index = features.extract(task.model, task.val, desc="validation features", **forward, **task.extraction)
    results: dict[str, Any] = {}
    if is_main_process():
        started = time.monotonic()
        results = logistic.logistic_regression(
            train.to(task.device), torch.from_numpy(task.train.labels)[index],
            val, torch.from_numpy(task.val.labels)[val_index],
            num_classes=task.args.num_labels or len(task.train.classes), seed=task.args.seed,
        )  # fmt: skip
        results["seconds"] = round(time.monotonic() - started, 1)
        cells = [f"{results['penalty']:g}", results["top1"], results["top5"]]
        say(records.table(["logistic regression", "penalty", "val top-1", "val top-5"], [[form.name, *cells]]))
    barrier()
    return task.write("eval_logistic", {"n_last_blocks": form.n, "avgpool_patchtokens": form.avgpool}, results)


if __name__ == "__main__":
    run_program(main)
