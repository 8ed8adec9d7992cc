"""What lies beside an exported file: MODEL_CARD.md, the same text as README.md, and config.json.

Together with model.safetensors this is the layout of the Hugging Face Hub. Nothing that somebody else wrote is
replaced: a README.md or config.json that is not an export's stays, and so does a card that has been edited.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation import options
from evaluation.models import LoadedModel
from runtime.checkpoint import write_json_atomic, write_text_atomic
from runtime.guards import InputError
from runtime.reproduce import get_sha
from runtime.terminal import say

CONFIG, CARD, README = "config.json", "MODEL_CARD.md", "README.md"
HUB_WEIGHTS = "model.safetensors"  # the file that the Hub's readers look for
_WRITER = "simpool-dino export"
_TRAINING = ("recipe", "epochs", "global_batch_size", "batch_size_per_gpu", "lr", "weight_decay", "seed", "data_path")
_OURS_FOR_TIMM = """
import timm_models  # a file of the code that wrote this one; it registers the name
"""
_LOADING = {
    "safetensors": """```python
import portable  # a file of the code that wrote this one

model = portable.load("{file}")  # in eval mode; model(images) -> (B, {width})
```

Without that code, `safetensors.torch.load_file("{file}")` gives the weights, and the file's header the settings as
JSON under `config`.""",
    "torch": """```python
import portable  # a file of the code that wrote this one

model = portable.load("{file}")  # in eval mode; model(images) -> (B, {width})
```

Without that code, `torch.load("{file}", weights_only=True)` gives the weights under `state_dict` and the settings under
`config`.""",
    "onnx": """```python
import onnxruntime

session = onnxruntime.InferenceSession("{file}")
{outputs} = session.run(None, {{"images": images}})  # images float32 (B, {channels}, {height}, {width_px}), any B
```""",
    "timm": """```python
import timm
{imports}
model = {call}.eval()
```

{width} features per image, or logits if `num_classes` is not 0.""",
    "torchscript": """```python
import torch

model = torch.jit.load("{file}")
{outputs} = model(images)  # images float32 (B, {channels}, {height}, {width_px}), any B
```

A file of this format can run code when it is loaded; take it only from people you trust.""",
    "torch_export": """```python
import torch

model = torch.export.load("{file}").module()
{outputs} = model(images)  # images float32 (B, {channels}, {height}, {width_px}), any B
```

A file of this format can run code when it is loaded; take it only from people you trust.""",
}


def read_ours(folder: Path) -> dict[str, Any] | None:
    """config.json of earlier exports into this folder, None if there is none or it is somebody else's."""
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and content.get("written_by") == _WRITER else None


def check_folder(folder: Path, sha256: str, overwrite: bool) -> None:
    """Raise InputError if the folder holds the export of another checkpoint, which this one's card would replace."""
    ours = read_ours(folder)
    if ours is not None and ours.get("checkpoint_sha256") != sha256 and not overwrite:
        raise InputError(
            f"--output: {folder / CONFIG} belongs to the export of another checkpoint ({ours.get('checkpoint')}); "
            "choose another folder, or replace it with --overwrite"
        )


def write_beside(
    output: Path,
    entry: dict[str, Any],
    loaded: LoadedModel,
    settings: Mapping[str, Any],
    content: Mapping[str, Any],
    mean_std: Sequence[Sequence[float]],
) -> None:
    """Write or renew the three files.

    Args:
        entry: what `output` is: its format, size and options.
        settings: the checkpoint's; those of one file may differ, by the size it was made for.
        content: the checkpoint's, for how it was trained.
        mean_std: mean and standard deviation of the normalisation.
    """
    folder, before = output.parent, read_ours(output.parent) or {}
    files = before.get("files", {}) if before.get("checkpoint_sha256") == loaded.sha256 else {}
    files = {name: known for name, known in files.items() if (folder / name).is_file()}
    files[output.name] = entry
    size = settings.get("img_size") or 224
    config = {
        "written_by": _WRITER,
        "architecture": settings["arch"],  # or the name by which the Hub's reader of these weights knows it
        "num_features": loaded.model.num_features,
        "settings": dict(settings),
        "preprocessing": {"img_size": size, "mean": list(mean_std[0]), "std": list(mean_std[1]), "range": "0 to 1"},
        "epoch": loaded.epoch,
        "checkpoint": Path(loaded.path).name,
        "checkpoint_sha256": loaded.sha256,
        "files": files,
        **files.get(HUB_WEIGHTS, {}).get("hub", {}),
    }
    text = card(config, content, evaluations(Path(loaded.path).parent, loaded.sha256))
    digest = hashlib.sha256(text.encode()).hexdigest()
    foreign = (folder / CONFIG).exists() and not before
    if foreign:
        say(f"{folder / CONFIG} is not an export's and stays; for the Hub's layout give --output a folder of its own")
    written = {}
    for name in (CARD, README):
        path = folder / name
        if path.exists() and _digest(path) not in before.get("cards", {}).values():
            say(f"{path} was not written by an export, or has been edited since, and stays as it is")
            continue
        write_text_atomic(path, text)
        written[name] = digest
    if not foreign:
        write_json_atomic(folder / CONFIG, {**config, "cards": written})


def _digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def evaluations(folder: Path, sha256: str | None) -> list[dict[str, Any]]:
    """What the evaluation programs left beside the checkpoint about exactly these weights."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        model = content.get("model") if isinstance(content, dict) else None
        if isinstance(model, dict) and "evaluation" in content and model.get("checkpoint_sha256") == sha256:
            found.append(content)
    return found


# ---- the text -------------------------------------------------------------------------------------------------------


def card(config: Mapping[str, Any], content: Mapping[str, Any], measured: Sequence[Mapping[str, Any]]) -> str:
    """The card's text, beginning with the metadata that the Hub reads."""
    settings, mode = config["settings"], config["settings"].get("mode", "official")
    head = [
        "---",
        "# license: fill in before you publish, for example apache-2.0",
        "pipeline_tag: image-feature-extraction",
        "tags:",
        "- image-feature-extraction",
        f"- {settings['arch']}",
        *([f"- {mode}"] if mode != "official" else []),
        "---",
    ]
    size = config["preprocessing"]["img_size"]
    what = [
        f"# {settings['arch']}, pooled by {'its own pooling' if mode == 'official' else mode}",
        f"An image backbone: photographs in, one vector of {config['num_features']} numbers each. "
        f"Its own image size is {size}; pixels from 0 to 1 are normalised by mean {_numbers(config, 'mean')} and "
        f"standard deviation {_numbers(config, 'std')}.",
        _rows(("setting", "value"), [(key, value) for key, value in settings.items() if key != "format"]),
    ]
    training = ["## Training", _rows(("", ""), _trained(config, content))]
    results = ["## Measured", *(_measured(one) for one in measured)]
    if not measured:
        results.append("Nothing: no evaluation of this checkpoint lay beside it when it was exported.")
    loading = ["## How to load it"]
    for name, entry in config["files"].items():
        loading += [f"`{name}` ({entry['format']}{', weights in float16' if entry['half'] else ''}):"]
        loading.append(_how(name, entry, config))
    licence = ["## Licence", "To be filled in by whoever publishes these weights, here and at the top of this file."]
    return "\n".join(head) + "\n\n" + "\n\n".join([*what, *training, *results, *loading, *licence]) + "\n"


def _trained(config: Mapping[str, Any], content: Mapping[str, Any]) -> list[tuple[str, Any]]:
    recorded = content.get("config") if isinstance(content.get("config"), dict) else {}
    args = content.get("args") if isinstance(content.get("args"), dict) else {}
    unknown = "not recorded in the checkpoint"
    rows = [("method", recorded.get("method", "dino" if "student" in content else unknown))]
    rows += [(key, args[key]) for key in _TRAINING if args.get(key) is not None]
    rows += [("epochs done", unknown if config["epoch"] is None else config["epoch"])]
    rows += [("data fingerprint", recorded.get("data", unknown))]
    rows += [("checkpoint", f"{config['checkpoint']}, SHA-256 {config['checkpoint_sha256']}")]
    rows += [("code that exported it", get_sha())]
    return rows


def _measured(one: Mapping[str, Any]) -> str:
    data = one.get("data") if isinstance(one.get("data"), dict) else {}
    rows = list(_flat(one.get("results")))
    return f"`{one['evaluation']}` on {data.get('data_path', 'unnamed data')}:\n\n{_rows(('measure', 'value'), rows)}"


def _flat(value: Any, name: str = "") -> Any:
    """(dotted name, number or text) of everything in nested results."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _flat(item, f"{name}.{number}")
    elif value is not None:
        yield name, f"{value:.4g}" if isinstance(value, float) else value


def _how(name: str, entry: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    size = entry["img_size"]
    height, width = (size, size) if isinstance(size, int) else size
    outputs = entry.get("outputs") or ["features", *(["attention"] if entry["with_attention"] else [])]
    return _LOADING[entry["format"]].format(
        file=name, width=config["num_features"], height=height, width_px=width,
        channels=options.channels(config["settings"]),
        outputs=", ".join(outputs) if len(outputs) > 1 else "(features,)",
        call=entry.get("call"), imports=_OURS_FOR_TIMM if "simpool_" in entry.get("call", "") else "",
    )  # fmt: skip


def _numbers(config: Mapping[str, Any], key: str) -> str:
    return " ".join(f"{number:g}" for number in config["preprocessing"][key])


def _rows(header: tuple[str, str], rows: Sequence[tuple[str, Any]]) -> str:
    """A table in Markdown, safe against what a cell may hold."""
    cells = [tuple(" ".join(str(cell).split()).replace("|", "\\|") for cell in row) for row in rows]
    return "\n".join(f"| {a} | {b} |" for a, b in [header, ("---", "---"), *cells])
