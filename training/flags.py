"""The flags common to all training programs. A program adds its own through `new_parser`."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from backbones import MODES, STEMS
from optim.optimizers import OPTIMIZERS
from pooled_backbone import POSITIONS
from runtime import hardware
from runtime.cli import HelpFormatter, add_flag, add_launcher_flags, bool_flag, gamma_flag, path_flag

# Flags that were added later, with what a checkpoint from before they existed means.
FORMER_DEFAULTS = {
    "use_beta": None, "pool_position": None, "pool_depth": 0, "pooling_args": None, "stem": "standard",
    "global_crops_number": 2, "blur_prob": (1.0, 0.1, 0.5), "solarize_prob": 0.2, "jitter": (0.4, 0.4, 0.2, 0.1),
    "jitter_prob": 0.8, "gray_prob": 0.2, "momentum_teacher_end": 1.0, "head_layers": 3, "head_hidden_dim": 2048,
    "bottleneck_dim": 256, "freeze_backbone_epochs": 0,
}  # fmt: skip


def new_parser(
    name: str,
    add_method_flags: Callable[[argparse._ArgumentGroup], None],
    add_view_flags: Callable[[argparse._ArgumentGroup], None],
    lr_help: str = "peak learning rate for a global batch of 256; scaled linearly with it",
) -> argparse.ArgumentParser:
    """A parser with all common flags, and the method's own in the two groups that it fills.

    lr_help: what --lr means in this method.
    Flags set by recipes have no default here; `arguments.resolve` fills them in.
    """
    parser = argparse.ArgumentParser(name, add_help=False, formatter_class=HelpFormatter)
    _add_model_flags(parser.add_argument_group("model"))
    add_method_flags(parser.add_argument_group("method (defaults by recipe)"))
    _add_training_flags(parser.add_argument_group("training (defaults by recipe if it has one)"), lr_help)
    data = parser.add_argument_group("data and augmentation")
    _add_data_flags(data)
    add_view_flags(data)
    _add_run_flags(parser.add_argument_group("run"))
    add_launcher_flags(parser.add_argument_group("launcher"))
    return parser


def _add_model_flags(group: argparse._ArgumentGroup) -> None:
    add_flag(group, "--arch", default="vit_small", help="vit_tiny|small|base (deit_*), resnet18..152, "
             "convnext_tiny..xlarge, or any timm name")  # fmt: skip
    add_flag(group, "--mode", default="official", choices=MODES, metavar="NAME",
             help=f"the pooling: official is the architecture's own; {', '.join(MODES[1:])}")  # fmt: skip
    add_flag(group, "--gamma", type=gamma_flag, default="auto",
             help="SimPool's exponent; None for a weighted mean; auto: 1.25 for tokens, 2.0 for maps")  # fmt: skip
    add_flag(group, "--use_beta", type=bool_flag,
             help="SimPool's learned scalar (default: if tokens are pooled before the final norm)")  # fmt: skip
    add_flag(group, "--pooling_args", nargs="+", metavar="KEY=VALUE",
             help="settings of another pooling, such as p=2 learn=false for gem (default: none)")  # fmt: skip
    add_flag(group, "--pool_position", choices=POSITIONS,
             help="pool before or after the final norm (default: as published for the method)")  # fmt: skip
    add_flag(group, "--pool_depth", type=int, default=0,
             help="leave out this many blocks at the end and pool that much earlier; 0 for none")  # fmt: skip
    add_flag(group, "--stem", default="auto", choices=("auto", *STEMS),
             help="convolutional stem: small has no stride or pooling; auto: small below 64 pixels")  # fmt: skip
    add_flag(group, "--patch_size", type=int, default=16, help="side of a ViT's patches, in pixels")
    add_flag(group, "--embed_dim", type=int, help="width of a ViT, in place of the architecture's")
    add_flag(group, "--depth", type=int, help="number of a ViT's blocks, in place of the architecture's")
    add_flag(group, "--num_heads", type=int, help="attention heads of a ViT, in place of the architecture's")
    add_flag(group, "--img_size", type=int, default=224, help="side of the global crops, in pixels")
    add_flag(group, "--in_chans", type=int, default=3, help="channels of the images")
    add_flag(group, "--drop_path_rate", type=float, help="stochastic depth of the student; 0 for none (by recipe)")
    add_flag(group, "--pos_embed_policy", default="exact", choices=("exact", "reference"),
             help="how a SimPool ViT resamples position embeddings; reference: as the published weights")  # fmt: skip
    add_flag(group, "--value_min", default="image", choices=("image", "batch"),
             help="take SimPool's minimum over the image (paper) or the batch (published code)")  # fmt: skip
    add_flag(group, "--init_from", type=path_flag,
             help="checkpoint, ours or a published one, from whose backbone a new run starts")  # fmt: skip


def _add_training_flags(group: argparse._ArgumentGroup, lr_help: str) -> None:
    add_flag(group, "--recipe", default="auto", help="a set of defaults; auto: the published one for the architecture")
    add_flag(group, "--optimizer", choices=OPTIMIZERS, help="optimizer")
    add_flag(group, "--lr", type=float, help=lr_help)
    add_flag(group, "--min_lr", type=float, help="learning rate at the end")
    add_flag(group, "--warmup_epochs", type=int, help="epochs of linear learning-rate warm-up; 0 for none")
    add_flag(group, "--weight_decay", type=float, help="weight decay at the start")
    add_flag(group, "--weight_decay_end", type=float, help="weight decay at the end; default by recipe, or as at start")
    add_flag(group, "--clip_grad", type=float, help="largest norm of each parameter's gradient; 0 for no clipping")
    add_flag(group, "--batch_size_per_gpu", type=int, help="images per process in one forward")
    add_flag(group, "--global_batch_size", type=int,
             help="images per step over all processes, however many there are: sets the batch per process, and "
                  "accumulates gradients if that exceeds --batch_size_per_gpu")  # fmt: skip
    add_flag(group, "--grad_accum", type=int, help="forwards per step; default 1, or as --global_batch_size needs")
    add_flag(group, "--epochs", type=int, default=100, help="passes over the data")
    add_flag(group, "--max_steps", type=int, help="stop after this many steps; the schedules still follow --epochs")
    add_flag(group, "--grad_checkpointing", type=bool_flag, default=False,
             help="recompute the student's activations in backward: less memory, about a third more time")  # fmt: skip
    add_flag(group, "--fsdp", type=bool_flag, default=False,
             help="shard the models over the processes (FSDP2) instead of copying them to each, for models that "
                  "outgrow one device")  # fmt: skip
    add_flag(group, "--compile", type=bool_flag, default=False,
             help="torch.compile the backbones; takes minutes, and saves 6 %% per step of a ViT on a CPU")  # fmt: skip
    add_flag(group, "--amp", default="auto", choices=hardware.AMP_CHOICES,
             help="autocast; auto: bf16 on CUDA (fp16 if it lacks bf16), none elsewhere")  # fmt: skip
    add_flag(group, "--use_fp16", type=bool_flag, help="DINO's flag: true is --amp fp16, false is --amp none")
    add_flag(group, "--matmul_precision", default="auto", choices=hardware.PRECISION_CHOICES,
             help="float32 products; auto: the fastest that keeps float32's accuracy (TF32 on CUDA)")  # fmt: skip


def _add_data_flags(group: argparse._ArgumentGroup) -> None:
    add_flag(
        group,
        "--data_path",
        type=path_flag,
        help="root with train/ (and val/), folder of images, list, tar shards, or demo",
    )
    add_flag(group, "--val_fraction", type=float, default=0.0,
             help="fraction of each class to hold out for evaluation, if the data has no val/; 0 for none")  # fmt: skip
    add_flag(group, "--subset", type=int, default=-1, help="use only the first images of each class; -1 for all")
    add_flag(group, "--num_workers", type=int, help="loader processes per training process; default: cores, at most 10")
    add_flag(group, "--on_bad_image", default="substitute", choices=("substitute", "raise"),
             help="what to do with a file that can't be decoded")  # fmt: skip
    add_flag(group, "--max_bad_fraction", type=float, default=0.01,
             help="stop if a larger fraction of an epoch's files can't be decoded")  # fmt: skip


def _add_run_flags(group: argparse._ArgumentGroup) -> None:
    add_flag(group, "--output_dir", type=path_flag, default=".",
             help="folder for checkpoints and logs; a run found there is continued")  # fmt: skip
    add_flag(
        group, "--config", type=path_flag, help="JSON or YAML file with values of flags; a run's config.json is one"
    )
    add_flag(group, "--resume", type=path_flag,
             help="continue this checkpoint's run, with its arguments, in a new --output_dir")  # fmt: skip
    add_flag(group, "--seed", type=int, default=0, help="seed for everything random, 0 or more")
    add_flag(group, "--saveckp_freq", type=int, default=20, help="epochs between checkpoints kept for good; 0 for none")
    add_flag(group, "--checkpoint_every_steps", type=int, default=0, help="steps between saves; 0: at epochs only")
    add_flag(group, "--checkpoint_every_minutes", type=float, default=0, help="minutes between saves; 0: epochs only")
    add_flag(group, "--keep_checkpoints", type=int, default=2, help="number of the newest saves to keep as a fallback")
    add_flag(group, "--keep_best", type=bool_flag, default=False,
             help="keep the checkpoint with the best evaluation as best.pth: top-1 of k-NN with the first k, or of the "
                  "average in supervised training")  # fmt: skip
    add_flag(group, "--max_failed_saves", type=int, default=5, help="consecutive failed saves before the run stops")
    add_flag(group, "--max_bad_steps", type=int, default=5, help="consecutive refused steps before the run stops")
    add_flag(group, "--allow_changed_args", type=bool_flag, default=False,
             help="continue a run with arguments that change its mathematics")  # fmt: skip
    add_flag(group, "--eval_every", type=int, default=5, help="epochs between evaluations; 0 for none")
    add_flag(group, "--timeout", type=float, default=1800, help="seconds to wait for another process before giving up")
    add_flag(group, "--deterministic", type=bool_flag, default=False,
             help="bit-exact on a GPU too, but slower (runs on a CPU always are bit-exact)")  # fmt: skip
    add_flag(group, "--report", type=bool_flag, default=True, help="write report.html and pictures")
    add_flag(group, "--replay", type=path_flag,
             help="repeat the refused step of a replay_step*.pth file, then stop")  # fmt: skip
    add_flag(group, "--requeue", type=bool_flag, default=False,
             help="when preempted in a SLURM job, put the job back into the queue")  # fmt: skip
    add_flag(group, "--dry_run", action="store_true", help="print the resolved configuration, then stop")


def add_knn_flags(group: argparse._ArgumentGroup) -> None:
    """The flags of the k-NN that watches a self-supervised run."""
    add_flag(group, "--nb_knn", type=int, nargs="+", default=[10, 20, 100, 200],
             help="values of k for the evaluation's k-NN")  # fmt: skip
    add_flag(group, "--temperature", type=float, default=0.07, help="temperature of the evaluation's k-NN")
