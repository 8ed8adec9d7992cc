"""A model as an ONNX graph: written by torch's exporter, and run at once by onnxruntime on photographs."""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from runtime.guards import InputError

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
OLDEST_OPSET = 18  # torch's exporter writes this one; its conversion to 17 fails on SimPool's sums
LARGEST_DIFFERENCE = 1e-4


class Outputs(nn.Module):
    """What the graph computes: features (B, D), and with attention also maps (B, heads, h, w)."""

    def __init__(self, model: nn.Module, grid: tuple[int, int] | None) -> None:
        super().__init__()
        self.model, self.grid = model, grid

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if self.grid is None:
            return (self.model(images),)
        feature, _, attention = self.model.forward_dense(images)
        return feature, attention.unflatten(-1, self.grid)


def outputs_of(model: nn.Module, images: Tensor, with_attention: bool) -> Outputs:
    """The module to export. Raises InputError if attention is asked of a model without a map."""
    if not with_attention:
        return Outputs(model, None).eval()
    try:
        with torch.no_grad():
            maps = model.get_attention_map(images[:1])
    except (AttributeError, ValueError) as error:
        raise InputError(f"--with_attention: {error}; or leave the flag out") from error
    return Outputs(model, tuple(maps.shape[-2:])).eval()


def check_opset(opset: int) -> None:
    """Raise InputError for an opset that cannot be written."""
    from onnx.defs import onnx_opset_version

    newest = onnx_opset_version()
    if not OLDEST_OPSET <= opset <= newest:
        raise InputError(f"--opset {opset}: this version of onnx takes {OLDEST_OPSET} to {newest}; choose one of them")


def build(module: Outputs, images: Tensor, opset: int, half: bool, texts: Mapping[str, Any]) -> bytes:
    """The graph as a file's bytes: input `images` with any batch size; outputs `features`, and `attention`.

    half: weights that float16 holds exactly are stored in it, and cast back before they are used.

    Raises InputError if the model has an operation that ONNX lacks, or the opset one that the graph needs.
    """
    names = ["features"] if module.grid is None else ["features", "attention"]
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                module, (images[:2],), dynamo=True, verbose=False, opset_version=opset, input_names=["images"],
                output_names=names, dynamic_shapes=({0: torch.export.Dim("batch")},),
            )  # fmt: skip
    except torch.onnx.OnnxExporterError as error:
        raise InputError(
            f"--format onnx: this model ({texts['config']['arch']}, mode {texts['config'].get('mode', 'official')}) "
            f"cannot be written as a graph ({_cause(error)}); export it as safetensors or torch"
        ) from error
    proto = program.model_proto
    written = next(entry.version for entry in proto.opset_import if entry.domain == "")
    if written != opset:
        raise InputError(f"--opset {opset}: this graph could only be written in opset {written}; choose that one")
    if half:
        _store_half(proto)
    for key, value in texts.items():
        proto.metadata_props.add(key=key, value=json.dumps(value))
    return proto.SerializeToString()


def largest_difference(graph: bytes, module: Outputs, images: Tensor) -> float:
    """Between onnxruntime's and torch's numbers, over all outputs, for one photograph and for all of them at once."""
    import onnxruntime

    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    differences = []
    for batch in (images[:1], images):
        with torch.no_grad():
            expected = module(batch)
        found = session.run(None, {"images": batch.numpy()})
        for here, there in zip(expected, found, strict=True):
            if tuple(here.shape) != there.shape:
                return float("inf")
            differences.append(float(np.abs(here.numpy() - there).max()))
    return float(np.max(differences))  # NaN if one is


def _store_half(proto: Any) -> None:
    """Store every float32 weight that float16 holds exactly as float16, with a cast behind it."""
    import onnx

    casts = []
    for weight in proto.graph.initializer:
        if weight.data_type != onnx.TensorProto.FLOAT:
            continue
        values = onnx.numpy_helper.to_array(weight)
        if values.size < 2 or not np.array_equal(values.astype(np.float16).astype(np.float32), values):
            continue
        name = weight.name
        weight.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float16), f"{name}.half"))
        casts.append(onnx.helper.make_node("Cast", [f"{name}.half"], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's notes on its own work stay out of the terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _cause(error: BaseException) -> str:
    """The first line of the error that the exporter met first."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
