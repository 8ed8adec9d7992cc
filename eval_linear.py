"""Linear probing of a checkpoint's frozen features: many heads in one pass of the backbone.

    python eval_linear.py --pretrained_weights output/checkpoint.pth --data_path /path/to/imagenet
    torchrun --nproc_per_node 8 eval_linear.py --pretrained_weights ... --data_path ... --lr 0.001 0.01 0.1
    python eval_linear.py --pretrained_weights ... --data_path ... --evaluate          # a saved head
    python eval_linear.py --pretrained_weights ... --data_path ... --logistic          # an answer in seconds

Without --lr ten learning rates are tried, from 1e-4 to 3 per 256 images: enough for ViTs and ResNets alike. The best
head is chosen on a tenth of train held out for it (--select_on val chooses on val, as the published numbers did, and
trains on all of train); one head alone needs no choice. Writes to --output_dir, beside the checkpoint by default:
eval_linear.json, eval_linear.png, eval_linear_log.txt, checkpoint.pth.tar (to resume) and best.pth.tar, which hold the
chosen head under the published names. The protocol: evaluation/linear.py.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from data.datasets import open_images
from data.loader import normalize
from data.sampler import TrainSampler, shard_for_eval
from data.source import ImageSource
from evaluation import features, linear, options, report
from evaluation.crops import build_probe_loader
from evaluation.knn import accuracy
from evaluation.linear import Form, LinearClassifier, Probe
from runtime.checkpoint import read_checkpoint, save_on_master
from runtime.cli import add_flag, bool_flag, parse_program
from runtime.distributed import barrier, get_rank, get_world_size, init_distributed_mode, is_main_process, leave
from runtime.guards import EXIT_DONE, InputError, input_errors, run_program
from runtime.json_log import JsonLog, cut_json_lines
from runtime.meters import MetricLogger
from runtime.progress import progress
from runtime.reproduce import fix_random_seeds
from runtime.terminal import say
from utils import LoadedModel, load_checkpoint_model

__all__ = ["LinearClassifier", "eval_linear", "train", "validate_network"]


def get_args_parser() -> argparse.ArgumentParser:
    """The flags; those of the published program keep their names and meaning."""
    parser = options.evaluation_parser("eval_linear")
    group = parser.add_argument_group("heads")
    default_lrs = " ".join(f"{lr:g}" for lr in linear.DEFAULT_LRS)
    add_flag(group, "--lr", type=float, nargs="+", default=None,
             help=f"base learning rates per 256 images, one or many (default: {default_lrs})")  # fmt: skip
    add_flag(group, "--n_last_blocks", type=int, nargs="+", default=None,
             help="official ViT: [CLS] of the last n blocks, one or many (default: 4, ViT-B 1, others 1)")  # fmt: skip
    add_flag(group, "--avgpool_patchtokens", type=bool_flag, nargs="+", default=None,
             help="official ViT: also the mean patch token; 'false true' tries both (default: ViT-B only)")  # fmt: skip
    add_flag(group, "--select_on", choices=("train", "val"), default="train",
             help="choose the best head on a held-out tenth of train, or on val itself")  # fmt: skip
    add_flag(group, "--num_labels", type=int, default=None, help="number of outputs (default: the number of classes)")
    group = parser.add_argument_group("training")
    add_flag(group, "--epochs", type=int, default=100, help="passes over the training images")
    add_flag(group, "--val_freq", type=int, default=1, help="epochs between validations")
    add_flag(group, "--subset", type=int, default=-1, help="first images of each training class to use; -1: all")
    add_flag(
        group, "--seed", type=int, default=0, help="seed of the crops, their order, the heads and the held-out part"
    )
    group = parser.add_argument_group("instead of training")
    add_flag(group, "--evaluate", action="store_true", help="only validate a saved head")
    add_flag(group, "--linear_weights", default=None, metavar="FILE",
             help="the head of --evaluate, ours or published (default: best.pth.tar of --output_dir)")  # fmt: skip
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
    args = options.complete(args, get_args_parser())
    options.check_positive(args, "epochs", "val_freq", "batch_size_per_gpu")
    for name in ("lr", "n_last_blocks", "avgpool_patchtokens"):
        value = getattr(args, name)
        setattr(args, name, value if value is None or isinstance(value, list) else [value])
    if args.lr is not None and min(args.lr) <= 0:
        raise InputError(f"--lr {min(args.lr):g}: give learning rates above 0")
    folder = report.output_folder(args.output_dir, args.pretrained_weights)
    init_distributed_mode(args)
    task = prepare(args, folder)
    if args.logistic:
        return run_logistic(task)
    return run_saved(task) if args.evaluate else run_sweep(task)


# ---- model and data -------------------------------------------------------------------------------------------------


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
        args, default = self.args, linear.default_forms(self.model)[0]
        depths = args.n_last_blocks or [default.n]
        pools = args.avgpool_patchtokens if args.avgpool_patchtokens is not None else [default.avgpool]
        forms = [Form(n, pool) for n in dict.fromkeys(depths) for pool in dict.fromkeys(pools)]
        options.check_positive(argparse.Namespace(n_last_blocks=depths), "n_last_blocks")
        self.widths(forms)
        return forms

    def widths(self, forms: list[Form]) -> list[int]:
        """Width of each form's features."""
        side = self.extraction["img_size"]
        blank = torch.zeros(2, options.channels(self.loaded.config), side, side, device=self.device)
        with input_errors("--n_last_blocks, --avgpool_patchtokens"), torch.no_grad():
            return [x.shape[1] for x in linear.probe_features(self.model, blank, forms)]

    def write(self, name: str, settings: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
        """The evaluation's JSON; returns the results."""
        common = {key: getattr(self.args, key) for key in ("subset", "seed", "amp")}
        common |= {key: self.extraction[key] for key in ("img_size", "resize")}
        data = report.describe_data(self.args.data_path, self.train, self.val)
        report.write_evaluation(
            self.folder, name, options.describe(self.loaded, self.args), data, common | settings, results
        )
        return results


def prepare(args: argparse.Namespace, folder: Path) -> Task:
    """Load the model and open the labelled images."""
    fix_random_seeds(args.seed)  # a model without a checkpoint is the same in every program
    loaded = load_checkpoint_model(
        args.pretrained_weights,
        checkpoint_key=args.checkpoint_key,
        device=args.torch_device,
        **options.model_flags(args),
    )
    for parameter in loaded.model.parameters():
        parameter.requires_grad_(False)
    channels = options.channels(loaded.config)
    train = open_images(args.data_path, "train", args.subset, channels)
    val = open_images(args.data_path, "val", -1, channels)
    features.require_labels(train, val)
    if args.num_labels is not None and args.num_labels < len(train.classes):
        raise InputError(
            f"--num_labels {args.num_labels}, but the images have {len(train.classes)} classes; leave it out"
        )
    return Task(args, folder, loaded, train, val, options.extraction(args, loaded.config))


@dataclass
class Cached:
    """Features of images that are seen without augmentation, computed once; this rank's share of them."""

    features: list[Tensor]  # one (N_r, D) per form
    labels: Tensor  # (N_r,)

    def count(self, probe: Probe) -> Tensor:
        """Per head, percent of hits at top-1 and top-5 and mean loss over all ranks' shares: (heads, 3)."""
        device = probe.groups[0].weight.device
        total = torch.zeros(len(probe.heads), 3, dtype=torch.float64)
        rows = max(1, (256 << 20) // (4 * probe.num_classes * len(probe.groups[0].lrs)))
        for start in range(0, len(self.labels), rows):
            chunk = [x[start : start + rows].to(device) for x in self.features]
            total += probe.count(chunk, self.labels[start : start + rows].to(device)).cpu()
        everything = torch.cat([total.flatten(), torch.tensor([float(len(self.labels))], dtype=torch.float64)])
        everything = everything.float().to(device)  # counts of images: exact up to 16 million
        if get_world_size() > 1:
            dist.all_reduce(everything)
        everything = everything.double().cpu()
        mean = everything[:-1].view_as(total) / everything[-1]
        mean[:, :2] *= 100.0
        mean[~mean[:, 2].isfinite(), :2] = 0.0  # a head that has diverged predicts nothing
        return mean


def cache(task: Task, source: ImageSource, indices: np.ndarray | None, forms: list[Form], desc: str) -> Cached:
    """This rank's share of the features of `indices` (all: None) of a source, for every form."""
    indices = np.arange(len(source)) if indices is None else indices
    mine = indices[shard_for_eval(len(indices), get_rank(), get_world_size())]
    widths = task.widths(forms)
    joined, _ = features.extract_shard(
        task.model, source, indices=mine, desc=desc,
        forward=lambda images: torch.cat(linear.probe_features(task.model, images, forms), dim=1),
        **task.extraction,
    )  # fmt: skip
    parts = joined.split(widths, dim=1) if len(joined) else [joined.new_empty(0, width) for width in widths]
    return Cached([part.contiguous() for part in parts], torch.from_numpy(source.labels[mine]))


# ---- the sweep ------------------------------------------------------------------------------------------------------


def run_sweep(task: Task) -> dict[str, Any]:
    """Train all heads, choose the best, write everything."""
    args = task.args
    forms = task.forms()
    lrs = list(dict.fromkeys(args.lr or linear.DEFAULT_LRS))
    num_labels = args.num_labels or len(task.train.classes)
    choose = len(forms) * len(lrs) > 1 and args.select_on == "train"
    kept, held_out = linear.split_train(task.train.labels, args.seed) if choose else (np.arange(len(task.train)), None)
    sampler = TrainSampler(
        len(kept), args.batch_size_per_gpu, seed=args.seed, rank=get_rank(), world_size=get_world_size()
    )
    probe = Probe(task.widths(forms), forms, lrs, num_labels, sampler.global_batch, task.device, args.seed)
    loader = build_probe_loader(
        task.train, kept, sampler, task.extraction["img_size"], args.num_workers, args.seed, task.device.type == "cuda"
    )
    describe_sweep(task, probe, len(kept), sampler.global_batch, held_out)
    sweep = Sweep(task, probe, forms, run_identity(task, forms, lrs, sampler.global_batch, len(kept)))
    first_epoch = sweep.resume()
    val = cache(task, task.val, None, forms, "val features")
    selection = cache(task, task.train, held_out, forms, "held-out features") if choose else val

    for epoch in range(first_epoch, args.epochs):
        sampler.set_position(epoch)
        losses = train_epoch(task, probe, loader, forms, linear.cosine_factor(epoch, args.epochs), epoch)
        if (epoch + 1) % args.val_freq == 0 or epoch + 1 == args.epochs:
            val_counts = val.count(probe)
            sweep.validated(epoch, losses, val_counts, selection.count(probe) if choose else val_counts)
        sweep.save(epoch + 1)
    return sweep.finish("held-out train" if choose else "val")


def describe_sweep(task: Task, probe: Probe, images: int, global_batch: int, held_out: np.ndarray | None) -> None:
    """Say what is about to be trained, and how the choice will be made."""
    lrs = sorted({head.lr for head in probe.heads})
    names = ", ".join(dict.fromkeys(head.form.name for head in probe.heads))
    rates = f"lr {', '.join(f'{lr:g}' for lr in lrs)} per 256 images"
    say(f"{len(probe.heads)} head(s) on {names}; {rates}; global batch {global_batch}")
    choice = f"; {len(held_out)} held out to choose the head by" if held_out is not None else ""
    say(f"training on {images} images of {len(task.train.classes)} classes{choice}")


def run_identity(task: Task, forms: list[Form], lrs: list[float], global_batch: int, images: int) -> dict[str, Any]:
    """What must agree for a saved run to be continued, and what a saved head is told apart by."""
    args = task.args
    return {
        "checkpoint_sha256": task.loaded.sha256,
        "checkpoint_key": args.checkpoint_key,
        "train_data": task.train.fingerprint(),
        "training_images": images,
        "forms": [list(form) for form in forms],
        "lrs": lrs,
        "epochs": args.epochs,
        "global_batch": global_batch,
        "seed": args.seed,
        "select_on": args.select_on,
    }


def train_epoch(
    task: Task, probe: Probe, loader: Iterable, forms: list[Form], lr_scale: float, epoch: int
) -> list[float]:
    """One pass over the training images; returns each head's mean loss."""
    amp = task.extraction["amp_dtype"]
    device = task.device
    total, steps = torch.zeros(len(probe.heads), device=device), 0
    for images, target in progress(loader, len(loader), f"epoch {epoch}"):
        with torch.no_grad():
            with torch.autocast(device.type, dtype=amp or torch.bfloat16, enabled=amp is not None):
                batch = linear.probe_features(task.model, normalize(images.to(device, non_blocking=True)), forms)
            batch, target = gather_batch([x.float() for x in batch], target.to(device, non_blocking=True))
            total += probe.step(batch, target, lr_scale)
        steps += 1
    return (total / steps).tolist()


def gather_batch(batch: list[Tensor], target: Tensor) -> tuple[list[Tensor], Tensor]:
    """The global batch on every rank, in the order of ranks: features per form and labels."""
    world = get_world_size()
    if world == 1:
        return batch, target
    widths = [x.shape[1] for x in batch]
    joined = torch.cat(batch, dim=1)
    pieces = [torch.empty_like(joined) for _ in range(world)]
    dist.all_gather(pieces, joined)
    targets = [torch.empty_like(target) for _ in range(world)]
    dist.all_gather(targets, target)
    return [part.contiguous() for part in torch.cat(pieces).split(widths, dim=1)], torch.cat(targets)


class Sweep:
    """A sweep's record: the best head so far, the numbers of the last validation, and the files."""

    def __init__(self, task: Task, probe: Probe, forms: list[Form], identity: dict[str, Any]):
        self.task, self.probe, self.forms, self.identity = task, probe, forms, identity
        self.best: dict[str, Any] = {"selection_top1": -1.0}
        self.rows: list[dict[str, Any]] = []
        self.last_path, self.best_path = task.folder / "checkpoint.pth.tar", task.folder / "best.pth.tar"
        self.log_path = task.folder / "eval_linear_log.txt"
        self.log = JsonLog(self.log_path)
        self.started = time.monotonic()

    def resume(self) -> int:
        """Continue from checkpoint.pth.tar where there is one; returns the first epoch to train."""
        if not self.last_path.is_file():
            return 0
        saved = read_checkpoint(self.last_path)
        theirs = saved.get("config")
        if theirs is None:
            raise InputError(
                f"{self.last_path} is a published head, which cannot be resumed here: give another --output_dir, or "
                "validate it with --evaluate"
            )
        for key, value in self.identity.items():
            if theirs.get(key) != value:
                raise InputError(
                    f"{self.last_path} was made with {key} {theirs.get(key)!r}, this run has {value!r}: give another "
                    "--output_dir, or remove the file to start anew"
                )
        with input_errors(str(self.last_path)):
            self.probe.load(saved["optimizer"]["heads"])
        self.best, self.rows = saved["best"], saved["rows"]
        if is_main_process():
            cut_json_lines(self.log_path, saved["epoch"])
        say(f"resuming from {self.last_path} at epoch {saved['epoch']}")
        return saved["epoch"]

    def validated(self, epoch: int, losses: list[float], val: Tensor, selection: Tensor) -> None:
        """Note a validation: the rows of the table, the log line, and the best head so far."""
        self.rows = [
            {
                "head": head.name,
                "n_last_blocks": head.form.n,
                "avgpool_patchtokens": head.form.avgpool,
                "lr": head.lr,
                "train_loss": loss,
                "val_loss": v[2],
                "selection_top1": s[0],
                "val_top1": v[0],
                "val_top5": v[1],
            }
            for head, loss, v, s in zip(self.probe.heads, losses, val.tolist(), selection.tolist(), strict=True)
        ]
        leader = max(range(len(self.rows)), key=lambda i: self.rows[i]["selection_top1"])
        row = self.rows[leader]
        if row["selection_top1"] > self.best["selection_top1"]:
            self.best = {**row, "epoch": epoch, "number": leader}
            save_on_master(self._content(epoch + 1, leader), self.best_path)
        if is_main_process():
            self.log.append({"epoch": epoch, "heads": self.rows})
        say(
            f"epoch {epoch}: best head {row['head']}: selection {row['selection_top1']:.2f}, val top-1 "
            f"{row['val_top1']:.2f}, top-5 {row['val_top5']:.2f}"
        )

    def _content(self, epoch: int, head: int) -> dict[str, Any]:
        """One head under the published names, and what made it."""
        return {
            "epoch": epoch,
            "state_dict": self.probe.classifier(head),
            "best_acc": self.best.get("val_top1", 0.0),
            "head": {"form": list(self.probe.heads[head].form), "lr": self.probe.heads[head].lr},
            "config": self.identity,
        }

    def save(self, epoch: int) -> None:
        """checkpoint.pth.tar: the leading head as it is now, and all that is needed to continue."""
        content = self._content(epoch, self.best.get("number", 0))
        content |= {
            "optimizer": {"heads": self.probe.state()},
            "scheduler": {"last_epoch": epoch},
            "best": self.best,
            "rows": self.rows,
        }
        save_on_master(content, self.last_path)
        barrier()

    def finish(self, selected_on: str) -> dict[str, Any]:
        """Table, plot and JSON."""
        header = ["head", "train loss", selected_on, "val top-1", "val top-5"]
        keys = ("head", "train_loss", "selection_top1", "val_top1", "val_top5")
        say(report.table(header, [[row[key] for key in keys] for row in self.rows]))
        best = self.best
        say(
            f"selected on {selected_on}: {best['head']} at epoch {best['epoch']}: "
            f"val top-1 {best['val_top1']:.2f}, top-5 {best['val_top5']:.2f}"
        )
        if is_main_process() and len(self.rows) > 1:
            report.plot_heads(self.rows, best, selected_on, self.task.folder / "eval_linear.png")
        settings = {
            **self.identity,
            "selected_on": selected_on,
            "batch_size_per_gpu": self.task.args.batch_size_per_gpu,
        }
        results = {"selected": best, "heads": self.rows, "seconds": round(time.monotonic() - self.started, 1)}
        return self.task.write("eval_linear", settings, results)


# ---- instead of training --------------------------------------------------------------------------------------------


def run_saved(task: Task) -> dict[str, Any]:
    """Validate a saved head, ours or the published format."""
    args = task.args
    candidates = (
        [args.linear_weights]
        if args.linear_weights
        else [task.folder / n for n in ("best.pth.tar", "checkpoint.pth.tar")]
    )
    path = next((Path(c) for c in candidates if Path(c).is_file()), None)
    if path is None:
        raise InputError(
            f"--evaluate needs a saved head, but {' and '.join(map(str, candidates))} do not exist; train one first, "
            "or name the file with --linear_weights"
        )
    saved = read_checkpoint(path)
    state = {name.removeprefix("module."): value for name, value in saved.get("state_dict", saved).items()}
    if "linear.weight" not in state or "linear.bias" not in state:
        raise InputError(f"{path} holds no linear head: no linear.weight and linear.bias under state_dict")
    made_for = (saved.get("config") or {}).get("checkpoint_sha256")
    if made_for is not None and made_for != task.loaded.sha256:
        raise InputError(
            f"{path} was trained on the checkpoint with sha256 {made_for}, but {args.pretrained_weights or 'this'} "
            f"has {task.loaded.sha256}: give the checkpoint it belongs to"
        )
    form = Form(*saved["head"]["form"]) if "head" in saved else task.forms()[0]
    weight = state["linear.weight"]
    width = task.widths([form])[0]
    if weight.shape[1] != width or weight.shape[0] < len(task.train.classes):
        raise InputError(
            f"{path} is a head of {weight.shape[1]} inputs and {weight.shape[0]} outputs; the model gives {width} with "
            f"{form.name} and the images have {len(task.train.classes)} classes: check --n_last_blocks, "
            "--avgpool_patchtokens, --arch and --data_path"
        )
    probe = Probe([width], [form], [1.0], weight.shape[0], 256, task.device)
    probe.groups[0].weight.copy_(weight[None])
    probe.groups[0].bias.copy_(state["linear.bias"][None])
    top1, top5, loss = cache(task, task.val, None, [form], "val features").count(probe)[0].tolist()
    say(report.table(["head", "val top-1", "val top-5"], [[str(path), top1, top5]]))
    return task.write(
        "eval_linear_saved",
        {"linear_weights": str(path), "n_last_blocks": form.n, "avgpool_patchtokens": form.avgpool},
        {"val_top1": top1, "val_top5": top5, "val_loss": loss},
    )


def run_logistic(task: Task) -> dict[str, Any]:
    """Logistic regression on features of uncropped images."""
    form = task.forms()[0]
    forward = {"forward": lambda images: linear.probe_features(task.model, images, [form])[0]}
    train = features.extract(task.model, task.train, desc="train features", **forward, **task.extraction)
    val = features.extract(task.model, task.val, desc="val features", **forward, **task.extraction)
    results: dict[str, Any] = {}
    if is_main_process():
        started = time.monotonic()
        results = linear.logistic_regression(
            train.to(task.device), torch.from_numpy(task.train.labels), val, torch.from_numpy(task.val.labels),
            num_classes=task.args.num_labels, seed=task.args.seed,
        )  # fmt: skip
        results["seconds"] = round(time.monotonic() - started, 1)
        cells = [f"{results['penalty']:g}", results["top1"], results["top5"]]
        say(report.table(["logistic regression", "penalty", "val top-1", "val top-5"], [[form.name, *cells]]))
    barrier()
    return task.write("eval_logistic", {"n_last_blocks": form.n, "avgpool_patchtokens": form.avgpool}, results)


# ---- DINO's names ---------------------------------------------------------------------------------------------------


def train(
    model: nn.Module,
    linear_classifier: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: Iterable,
    epoch: int,
    n: int,
    avgpool: bool,
) -> dict[str, float]:
    """One epoch of one head with a torch optimiser (DINO's function): {"lr", "loss"}, means over the ranks."""
    device = next(model.parameters()).device
    linear_classifier.train()
    metric_logger = MetricLogger(delimiter="  ")
    for images, target in metric_logger.log_every(loader, 20, f"Epoch: [{epoch}]"):
        with torch.no_grad():
            output = linear.probe_features(model, images.to(device, non_blocking=True), [Form(n, bool(avgpool))])[0]
        loss = F.cross_entropy(linear_classifier(output), target.to(device, non_blocking=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        metric_logger.update(loss=loss.item(), lr=optimizer.param_groups[0]["lr"])
    metric_logger.synchronize_between_processes()
    return {name: meter.global_avg for name, meter in metric_logger.meters.items()}


@torch.no_grad()
def validate_network(
    val_loader: Iterable, model: nn.Module, linear_classifier: nn.Module, n: int, avgpool: bool
) -> dict[str, float]:
    """Validate one head (DINO's function): {"loss", "acc1", "acc5"}, in percent, means over the ranks."""
    device = next(model.parameters()).device
    linear_classifier.eval()
    metric_logger = MetricLogger(delimiter="  ")
    for images, target in metric_logger.log_every(val_loader, 20, "Test:"):
        images, target = images.to(device, non_blocking=True), target.to(device, non_blocking=True)
        output = linear_classifier(linear.probe_features(model, images, [Form(n, bool(avgpool))])[0])
        acc1, acc5 = accuracy(output, target, topk=(1, 5))
        metric_logger.update(loss=F.cross_entropy(output, target).item())
        metric_logger.meters["acc1"].update(acc1.item(), n=len(images))
        metric_logger.meters["acc5"].update(acc5.item(), n=len(images))
    metric_logger.synchronize_between_processes()
    return {name: meter.global_avg for name, meter in metric_logger.meters.items()}


if __name__ == "__main__":
    run_program(main)
