"""A trained backbone as a file for other software: safetensors, torch's format, or a graph (ONNX, torch.export).

    python export.py --pretrained_weights output/checkpoint.pth --format safetensors --output hub/model.safetensors
    python export.py --pretrained_weights output/checkpoint.pth --format onnx --output hub/model.onnx --with_attention
    python -c "import export; model = export.load('hub/model.safetensors')"

The file is read back at once and compared with the checkpoint's model on photographs. Beside it MODEL_CARD.md (also as
README.md) says what the model is, how it was trained, what was measured and how to load it, and config.json holds its
settings: with model.safetensors this is the layout of the Hugging Face Hub. Nothing is sent or fetched.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.colour import channel_statistics
from evaluation import options
from evaluation.models import LoadedModel, load_checkpoint_model
from exporting import card, graph, prepare
from portable import load
from pretrained import MODEL_KEYS, NEWEST_FORMAT, POLICY_KEYS
from runtime.checkpoint import check_writable, read_checkpoint, save_checkpoint, write_atomic
from runtime.cli import add_flag, parse_program
from runtime.guards import EXIT_DONE, InputError, RunStopped, input_errors, run_program
from runtime.terminal import say
from torchfile import safe
from vision_transformer import VisionTransformer

__all__ = ["get_args_parser", "load", "main"]

FORMATS = {
    "safetensors": ("safetensors",),
    "torch": (),
    "onnx": graph.PACKAGES,
    "torch_export": (),
}  # and what each needs
GRAPHS = ("onnx", "torch_export")


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
    trained = content.get("args") if isinstance(content.get("args"), dict) else {}
    mean_std = channel_statistics(options.channels(loaded.config), trained.get("mean"), trained.get("std"))
    images = prepare.photographs(loaded, size, mean_std)
    if side is not None and size != native:
        check_resizable(loaded, args.format)
    checkpoint, settings = prepare.features(loaded, images), settings_of(loaded)
    if args.half:
        prepare.round_to_half(loaded.model)
    expected = prepare.features(loaded, images)
    if args.format in GRAPHS or size != native:
        prepare.bake_positions(loaded, size)
    if args.format in GRAPHS:
        difference = write_graph(loaded, images, expected, args, output, mean_std)
    else:
        difference = write_weights(loaded, images, expected, args, output)
    entry = {
        "format": args.format, "img_size": size[0] if size[0] == size[1] else list(size), "half": args.half,
        "with_attention": args.with_attention, "largest_difference": difference,
    }  # fmt: skip
    card.write_beside(output, entry, loaded, settings, content, mean_std)
    say(f"{output} written; on {len(images)} photographs its numbers differ by at most {difference:.1e} from torch's")
    if args.half:
        changed = (expected - checkpoint).abs().max().item()
        say(f"--half: rounding the weights changed the features by at most {changed:.1e}")
    return EXIT_DONE


# ---- checks before anything is computed -----------------------------------------------------------------------------


def check_arguments(args: argparse.Namespace, output: Path) -> None:
    """Raise InputError for flags that exclude each other, missing packages, and a file that must not be written."""
    missing = [name for name in FORMATS[args.format] if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"--format {args.format} needs {', '.join(missing)}: pip install {' '.join(missing)}")
    if not args.pretrained_weights:
        raise InputError("--pretrained_weights is empty: give the checkpoint to export")
    serves = {"with_attention": GRAPHS, "opset": ("onnx",), "half": ("safetensors", "torch", "onnx")}
    for flag, formats in serves.items():
        if getattr(args, flag) and args.format not in formats:
            raise InputError(f"--{flag} is for --format {' or '.join(formats)}, not for {args.format}: leave it out")
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


def write_weights(
    loaded: LoadedModel, images: Tensor, expected: Tensor, args: argparse.Namespace, output: Path
) -> float:
    """Write weights and settings, and read them back; returns the largest difference of features, which must be 0.

    Raises RunStopped, and leaves no file, if the model read back gives other features.
    """
    weights = loaded.model.state_dict()
    if args.half:
        weights = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
    config = settings_of(loaded)
    differences: list[float] = []

    def write(temporary: Path) -> None:
        if args.format == "safetensors":
            safe.write(temporary, weights, config, loaded.epoch)
        else:
            save_checkpoint({"state_dict": weights, "config": config, "epoch": loaded.epoch}, temporary)
        with torch.no_grad():
            differences.append((load(temporary)(images) - expected).abs().max().item())
        # Read back, the weights are the same bits; resampled positions alone may be added in another order.
        if not differences[-1] <= graph.LARGEST_DIFFERENCE:
            raise RunStopped(f"{output}: the model read back differs by {differences[-1]:.1e}; nothing was written")

    with input_errors():
        write_atomic(output, write)
    return differences[-1]


def write_graph(
    loaded: LoadedModel, images: Tensor, expected: Tensor, args: argparse.Namespace, output: Path, mean_std: Any
) -> float:
    """Write the graph once it has been run (ONNX by onnxruntime); returns the largest difference.

    `expected` are the features before the positions were baked. Raises RunStopped, and leaves no file, if a difference
    is above 1e-4.
    """
    module = graph.outputs_of(loaded.model, images, args.with_attention)
    texts = {"config": settings_of(loaded), "mean": mean_std[0], "std": mean_std[1]}
    if args.format == "onnx":
        data = graph.build_onnx(module, images, args.opset, args.half, texts)
        runner = graph.run_onnx(data)
    else:
        data = graph.build_program(module, images, texts)
        runner = graph.run_program(data)
    baked = (prepare.features(loaded, images) - expected).abs().max().item()
    for difference in (baked, graph.largest_difference(runner, module, images)):
        if not difference <= graph.LARGEST_DIFFERENCE:  # NaN is refused too
            raise RunStopped(
                f"{output}: the graph's numbers differ by {difference:.1e} from torch's, more than "
                f"{graph.LARGEST_DIFFERENCE:g}; nothing was written"
            )
    with input_errors():
        write_atomic(output, lambda temporary: temporary.write_bytes(data) and None)
    return difference


def settings_of(loaded: LoadedModel) -> dict[str, Any]:
    """What a reader needs to build the model again."""
    known = {key: loaded.config[key] for key in (*MODEL_KEYS, *POLICY_KEYS) if key in loaded.config}
    return {**known, "format": NEWEST_FORMAT}


if __name__ == "__main__":
    run_program(main)
