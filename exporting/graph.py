"""A model as a graph (ONNX, TorchScript or torch.export's), written by torch and run at once on photographs."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from exporting.prepare import Classifier
from runtime.guards import InputError

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
OLDEST_OPSET = 18  # torch's exporter writes this one; its conversion to 17 fails on SimPool's sums
LARGEST_DIFFERENCE = 1e-4


class Outputs(nn.Module):
    """What the graph computes: features (B, D), on request maps (B, heads, h, w) and logits (B, C).

    Args:
        grid: (h, w) of the maps, None to leave them out.
        classifier: what makes logits of the features, None to leave them out.
    """

    def __init__(self, model: nn.Module, grid: tuple[int, int] | None, classifier: Classifier | None) -> None:
        super().__init__()
        self.model, self.grid, self.classifier = model, grid, None
        self.names = ["features"]
        if grid is not None:
            self.names.append("attention")
        if classifier is not None:
            self.names.append("logits")
            self.classifier = nn.Linear(*classifier.weight.shape[::-1])
            self.classifier.load_state_dict(classifier._asdict())

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...]
        if self.grid is None:
            found = (self.model(images),)
        else:
            feature, _, attention = self.model.forward_dense(images)
            found = (feature, attention.unflatten(-1, self.grid))
        return found if self.classifier is None else (*found, self.classifier(found[0]))


def outputs_of(model: nn.Module, images: Tensor, with_attention: bool, classifier: Classifier | None = None) -> Outputs:
    """The module to export. Raises InputError if attention is asked of a model without a map."""
    if not with_attention:
        return Outputs(model, None, classifier).eval()
    try:
        with torch.no_grad():
            maps = model.get_attention_map(images[:1])
    except (AttributeError, ValueError) as error:
        raise InputError(f"--with_attention: {error}; or leave the flag out") from error
    return Outputs(model, tuple(maps.shape[-2:]), classifier).eval()


def check_opset(opset: int) -> None:
    """Raise InputError for an opset that cannot be written."""
    from onnx.defs import onnx_opset_version

    newest = onnx_opset_version()
    if not OLDEST_OPSET <= opset <= newest:
        raise InputError(f"--opset {opset}: this version of onnx takes {OLDEST_OPSET} to {newest}; choose one of them")


def build_onnx(module: Outputs, images: Tensor, opset: int, half: bool, texts: Mapping[str, Any]) -> bytes:
    """An ONNX file's bytes: input `images` with any batch size; the outputs are named as `module.names`.

    half: weights that float16 holds exactly are stored in it, and cast back before they are used.
    texts: what the file's metadata says, as JSON; `config` is the model's settings.

    Raises InputError if the model has an operation that ONNX lacks, or the opset one that the graph needs.
    """
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                module, (images[:2],), dynamo=True, verbose=False, opset_version=opset, input_names=["images"],
                output_names=module.names, dynamic_shapes=_any_batch(),
            )  # fmt: skip
    except torch.onnx.OnnxExporterError as error:
        raise _no_graph("onnx", texts["config"], error) from error
    proto = program.model_proto
    written = next(entry.version for entry in proto.opset_import if entry.domain == "")
    if written != opset:
        raise InputError(f"--opset {opset}: this graph could only be written in opset {written}; choose that one")
    if half:
        _store_half(proto)
    for key, value in texts.items():
        proto.metadata_props.add(key=key, value=json.dumps(value))
    return proto.SerializeToString()


def build_program(module: Outputs, images: Tensor, texts: Mapping[str, Any]) -> bytes:
    """A file's bytes for torch.export.load: images with any batch size to a tuple, as `module.names` lists it.

    texts: extra files in it, as JSON. Raises InputError if torch.export does not follow the model.
    """
    buffer = io.BytesIO()
    try:
        with _quiet(), torch.no_grad():
            program = torch.export.export(module, (images[:2],), dynamic_shapes=_any_batch())
            torch.export.save(program, buffer, extra_files={key: json.dumps(value) for key, value in texts.items()})
    except Exception as error:  # whatever the exporter met inside the model
        raise _no_graph("torch_export", texts["config"], error) from error
    return buffer.getvalue()


def build_torchscript(module: Outputs, images: Tensor, texts: Mapping[str, Any]) -> bytes:
    """A file's bytes for torch.jit.load: images with any batch size to a tuple, as `module.names` lists it.

    torch calls its tracer deprecated in favour of torch.export, and still has it. texts: extra files in it, as JSON.
    Raises InputError if the tracer does not follow the model, or this torch has no tracer.
    """
    buffer = io.BytesIO()
    try:
        with _quiet(), torch.no_grad():
            traced = torch.jit.trace(module, (images[:2],), check_trace=False)  # it is checked on photographs
            torch.jit.save(traced, buffer, _extra_files={key: json.dumps(value) for key, value in texts.items()})
    except Exception as error:  # whatever the tracer met inside the model
        raise _no_graph("torchscript", texts["config"], error) from error
    return buffer.getvalue()


def run_onnx(data: bytes) -> Callable[[Tensor], Sequence[Tensor]]:
    """The graph in a file's bytes, run by onnxruntime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(found) for found in session.run(None, {"images": images.numpy()})]


def run_program(data: bytes) -> Callable[[Tensor], Sequence[Tensor]]:
    """The graph in a file's bytes, run by torch without the model's code."""
    with _quiet():
        return torch.export.load(io.BytesIO(data)).module()


def run_torchscript(data: bytes) -> Callable[[Tensor], Sequence[Tensor]]:
    """The graph in a file's bytes, run by torch without the model's code."""
    with _quiet():
        return torch.jit.load(io.BytesIO(data))


@torch.no_grad()
def largest_difference(graph: Callable[[Tensor], Sequence[Tensor]], module: Outputs, images: Tensor) -> float:
    """Between the graph's numbers and the model's, over all outputs, for one photograph and for all of them at once."""
    differences = []
    for batch in (images[:1], images):
        for here, there in zip(module(batch), graph(batch), strict=True):
            if here.shape != there.shape:
                return float("inf")
            differences.append((here - there).abs().max().item())
    return float(np.max(differences))  # NaN if one is


def _any_batch() -> tuple[dict[int, Any]]:
    """The shapes of the inputs that vary: the number of images."""
    return ({0: torch.export.Dim("batch")},)


def _no_graph(kind: str, config: Mapping[str, Any], error: BaseException) -> InputError:
    return InputError(
        f"--format {kind}: this model ({config['arch']}, mode {config.get('mode', 'official')}) cannot be written as a "
        f"graph ({_cause(error)}); export it as safetensors or torch"
    )


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
