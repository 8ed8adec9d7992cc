"""A trained backbone as a file for other software: weights (safetensors, torch, timm) or a graph (ONNX and others).

    python export.py --pretrained_weights output/checkpoint.pth --format safetensors --output hub/model.safetensors
    python export.py --pretrained_weights output/checkpoint.pth --format onnx --output hub/model.onnx --with_attention
    python export.py --pretrained_weights output/checkpoint.pth --format timm --output hub/timm.safetensors
    python -c "from portable import load; model = load('hub/model.safetensors')"

The file is read back at once and compared with the checkpoint's model on photographs. Beside it MODEL_CARD.md (also as
README.md) says what the model is, how it was trained, what was measured and how to load it, and config.json holds its
settings: with model.safetensors this is the layout of the Hugging Face Hub. Nothing is sent or fetched.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.colour import channel_statistics
from evaluation import options
from evaluation.models import LoadedModel, load_checkpoint_model
from exporting import card, for_timm, graph, prepare
from portable import load
from pretrained import MODEL_KEYS, NEWEST_FORMAT, POLICY_KEYS
from resnet_simpool import ResNet
from runtime.checkpoint import check_writable, read_checkpoint, save_checkpoint, write_atomic
from runtime.cli import add_flag, bool_flag, parse_program
from runtime.guards import EXIT_DONE, InputError, RunStopped, input_errors, run_program
from runtime.terminal import say
from torchfile import safe
from vision_transformer import VisionTransformer

__all__ = ["get_args_parser", "load", "main"]

FORMATS = {
    "safetensors": ("safetensors",),
    "torch": (),
    "timm": (),
    "onnx": graph.PACKAGES,
    "torchscript": (),
    "torch_export": (),
}  # and what each needs
GRAPHS = ("onnx", "torchscript", "torch_export")


def get_args_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = options.evaluation_parser("export")
    group = parser.add_argument_group("file")
    add_flag(group, "--format", choices=tuple(FORMATS), required=True, help="kind of file")
    add_flag(group, "--output", required=True, help="file to write, in a folder that may also take the card")
    add_flag(group, "--overwrite", action="store_true", help="replace the file if it exists")
    add_flag(group, "--half", action="store_true",
             help="store weights in float16, half the size; what loads them computes in float32")  # fmt: skip
    add_flag(group, "--with_attention", action="store_true",
             help="graphs: a second output, the attention map (B, heads, h, w)")  # fmt: skip
    add_flag(group, "--with_head", type=bool_flag, nargs="?", const=True, default=None,
             help="the classifier of a training with labels too: in weights under its name, in graphs as an output "
             "`logits` (default: for timm if there is one, for others not)")  # fmt: skip
    add_flag(group, "--opset", type=int, default=None, help=f"onnx: operator set (default: {graph.OLDEST_OPSET})")
    options.add_checkpoint_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    args = parse_program("export.py", get_args_parser(), __doc__, argv)
    output = Path(args.output)
    check_arguments(args, output)
    flags = options.model_flags(args)
    side = flags.pop("img_size")
    loaded = load_checkpoint_model(args.pretrained_weights, checkpoint_key=args.checkpoint_key, **flags)
    card.check_folder(output.parent, loaded.sha256, args.overwrite)
    native = prepare.size_of(loaded)
    size = native if side is None else (side, side)
    content = read_checkpoint(args.pretrained_weights)
    classifier = None
    if args.with_head or (args.with_head is None and args.format == "timm"):
        classifier = prepare.classifier_of(content, args.checkpoint_key, loaded, wanted=bool(args.with_head))
    trained = content.get("args") if isinstance(content.get("args"), dict) else {}
    mean_std = channel_statistics(options.channels(loaded.config), trained.get("mean"), trained.get("std"))
    images = prepare.photographs(loaded, size, mean_std)
    if side is not None and size != native:
        check_resizable(loaded, args.format)
    checkpoint, settings = prepare.features(loaded, images), settings_of(loaded)
    if args.half:
        prepare.round_to_half(loaded.model)
        classifier = classifier and classifier.rounded()
    expected = prepare.features(loaded, images)
    if args.format in (*GRAPHS, "timm") or size != native:
        prepare.bake_positions(loaded, size)
    what = Exported(loaded, classifier, images, expected, mean_std)
    write = write_graph if args.format in GRAPHS else write_timm if args.format == "timm" else write_weights
    difference, more = write(what, args, output)
    entry = {
        "format": args.format, "img_size": size[0] if size[0] == size[1] else list(size), "half": args.half,
        "with_attention": args.with_attention, "with_head": classifier is not None,
        "largest_difference": difference, **more,
    }  # fmt: skip
    card.write_beside(output, entry, loaded, settings, content, mean_std)
    say(f"{output} written; on {len(images)} photographs its numbers differ by at most {difference:.1e} from torch's")
    if "call" in more:
        say(f"to load it: {more['call']}")
    if args.half:
        changed = (expected - checkpoint).abs().max().item()
        say(f"--half: rounding the weights changed the features by at most {changed:.1e}")
    return EXIT_DONE


# ---- checks before anything is computed -----------------------------------------------------------------------------


def check_arguments(args: argparse.Namespace, output: Path) -> None:
    """Raise InputError for flags that exclude each other, missing packages, and a file that must not be written."""
    needed = FORMATS[args.format] or (("safetensors",) if _is_safetensors(args, output) else ())
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"--format {args.format} needs {', '.join(missing)}: pip install {' '.join(missing)}")
    if not args.pretrained_weights:
        raise InputError("--pretrained_weights is empty: give the checkpoint to export")
    serves = {"with_attention": GRAPHS, "opset": ("onnx",), "half": ("safetensors", "torch", "timm", "onnx")}
    for flag, formats in serves.items():
        if getattr(args, flag) and args.format not in formats:
            either = f"{', '.join(formats[:-1])} or {formats[-1]}" if len(formats) > 1 else formats[0]
            raise InputError(f"--{flag} is for --format {either}, not for {args.format}: leave it out")
    if args.format == "onnx":
        args.opset = graph.OLDEST_OPSET if args.opset is None else args.opset
        graph.check_opset(args.opset)
    if output.is_dir():
        raise InputError(f"--output {output} is a folder; give a file in it, such as {output / 'model.safetensors'}")
    if output.name in (card.CARD, card.README, card.CONFIG):
        raise InputError(f"--output {output}: the card takes this name; choose another one, such as model.safetensors")
    source = Path(args.pretrained_weights)
    if output.exists() and source.exists() and output.samefile(source):
        raise InputError(f"--output {output} is the checkpoint itself; choose another name")
    if output.exists() and not args.overwrite:
        raise InputError(f"--output {output} exists; choose another name, or replace it with --overwrite")
    check_writable(output.parent, "--output")


def check_resizable(loaded: LoadedModel, kind: str) -> None:
    """Raise InputError if weights cannot be written for another size of images than they were trained for."""
    if kind not in GRAPHS and not isinstance(loaded.model, VisionTransformer):
        raise InputError(
            f"--img_size: the weights of {loaded.config['arch']} are the same for every size; leave it out, or export "
            "a graph with --format onnx"
        )


# ---- writing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exported:
    """What is written, and what it is compared with."""

    loaded: LoadedModel
    classifier: prepare.Classifier | None
    images: Tensor  # the photographs, (4, C, H, W)
    expected: Tensor  # their features, before positions were baked, (4, D)
    mean_std: Sequence[Sequence[float]]

    def results(self) -> Tensor:
        """What the model gives for the photographs: with a classifier logits, else features."""
        return self.expected if self.classifier is None else self.classifier.logits(self.expected)


def write_weights(what: Exported, args: argparse.Namespace, output: Path) -> tuple[float, dict[str, Any]]:
    """Write weights and settings, and read them back; returns the largest difference of the results, which must be 0.

    Raises RunStopped, and leaves no file, if the model read back gives others.
    """
    loaded, weights = what.loaded, what.loaded.model.state_dict()
    if what.classifier is not None:
        name = "fc" if isinstance(loaded.model, ResNet) else "head"
        weights |= {f"{name}.{key}": value for key, value in what.classifier._asdict().items()}
    weights, config = _stored(weights, args.half), settings_of(loaded)
    differences: list[float] = []

    def write(temporary: Path) -> None:
        if args.format == "safetensors":
            safe.write(temporary, weights, config, loaded.epoch)
        else:
            save_checkpoint({"state_dict": weights, "config": config, "epoch": loaded.epoch}, temporary)
        with torch.no_grad():
            model = load(temporary, classifier=what.classifier is not None)
            differences.append((model(what.images) - what.results()).abs().max().item())
        # Read back, the weights are the same bits; resampled positions alone may be added in another order.
        _check_difference(differences[-1], output, "the model read back differs")

    with input_errors():
        write_atomic(output, write)
    return differences[-1], {}


def write_timm(what: Exported, args: argparse.Namespace, output: Path) -> tuple[float, dict[str, Any]]:
    """Write weights under timm's names and let timm read them; returns the largest difference, and timm's call.

    Raises InputError if timm has no such model, RunStopped, and leaves no file, if its numbers differ.
    """
    target = for_timm.target_of(what.loaded, what.classifier)
    weights = _stored(for_timm.weights_of(what.loaded.model, what.classifier), args.half)
    differences: list[float] = []

    def write(temporary: Path) -> None:
        named = temporary.rename(temporary.with_name(f"{temporary.name}{output.suffix}"))  # timm looks at the suffix
        try:
            for_timm.write(named, weights, _is_safetensors(args, output))
            differences.append(for_timm.difference(named, target, what.images, what.results()))
        finally:
            named.rename(temporary)
        _check_difference(differences[-1], output, "timm's numbers differ")

    with input_errors():
        write_atomic(output, write)
    config = target.hub_config(tuple(what.images.shape[-2:]), what.mean_std)
    return differences[-1], {"call": target.call(output.name), "hub": config}


def write_graph(what: Exported, args: argparse.Namespace, output: Path) -> tuple[float, dict[str, Any]]:
    """Write the graph once it has been run (ONNX by onnxruntime); returns the largest difference, and the outputs.

    Raises RunStopped, and leaves no file, if a difference is above 1e-4.
    """
    module = graph.outputs_of(what.loaded.model, what.images, args.with_attention, what.classifier)
    texts = {"config": settings_of(what.loaded), "mean": what.mean_std[0], "std": what.mean_std[1]}
    if args.format == "onnx":
        data = graph.build_onnx(module, what.images, args.opset, args.half, texts)
        runner = graph.run_onnx(data)
    elif args.format == "torchscript":
        data = graph.build_torchscript(module, what.images, texts)
        runner = graph.run_torchscript(data)
    else:
        data = graph.build_program(module, what.images, texts)
        runner = graph.run_program(data)
    baked = (prepare.features(what.loaded, what.images) - what.expected).abs().max().item()
    difference = graph.largest_difference(runner, module, what.images)
    for each in (baked, difference):
        _check_difference(each, output, "the graph's numbers differ")
    with input_errors():
        write_atomic(output, lambda temporary: temporary.write_bytes(data) and None)
    return difference, {"outputs": module.names}


def _check_difference(difference: float, output: Path, whose: str) -> None:
    """Raise RunStopped for a difference that is too large, or NaN."""
    if not difference <= graph.LARGEST_DIFFERENCE:
        raise RunStopped(
            f"{output}: {whose} by {difference:.1e} from torch's, more than {graph.LARGEST_DIFFERENCE:g}; nothing was "
            "written"
        )


def _stored(weights: Mapping[str, Tensor], half: bool) -> dict[str, Tensor]:
    """The weights as the file has them."""
    return {name: value.half() if half and value.is_floating_point() else value for name, value in weights.items()}


def _is_safetensors(args: argparse.Namespace, output: Path) -> bool:
    """Whether timm reads the file as safetensors, by its name."""
    return args.format == "timm" and output.suffix == safe.SUFFIX


def settings_of(loaded: LoadedModel) -> dict[str, Any]:
    """What a reader needs to build the model again."""
    known = {key: loaded.config[key] for key in (*MODEL_KEYS, *POLICY_KEYS) if key in loaded.config}
    return {**known, "format": NEWEST_FORMAT}


if __name__ == "__main__":
    run_program(main)
