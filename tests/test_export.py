"""export.py from the command line: what it writes, read by others, gives the checkpoint's numbers."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import backbones
import export
import hubconf
import portable
import pretrained
from evaluation.models import load_checkpoint_model
from poolings.base import WITH_ATTENTION
from poolings.choose import POOLINGS
from runtime.checkpoint import save_checkpoint
from runtime.guards import InputError, RunStopped
from tests.small_images import labelled_checkpoint, tiny_checkpoint

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


def checkpoint_of(path: Path, **settings) -> Path:
    """A checkpoint of any backbone with random weights, and statistics that are not the initial ones."""
    torch.manual_seed(1)
    model = backbones.build_backbone(**settings)
    for name, value in model.state_dict().items():
        if name.endswith(("running_mean", "running_var")):
            value.add_(torch.rand_like(value))
    save_checkpoint({"teacher": {f"backbone.{n}": v for n, v in model.state_dict().items()}, "config": settings}, path)
    return path


def run(checkpoint: Path, kind: str, output: Path, *flags: str) -> Path:
    """Export, and return the file."""
    arguments = ["--pretrained_weights", str(checkpoint), "--format", kind, "--output", str(output), *flags]
    assert export.main(arguments) == 0
    return output


@pytest.fixture(scope="module")
def photographs(imagenet_sample):
    """A function: three real photographs as a model of some size sees them, (3, 3, S, S)."""
    from PIL import Image

    def at(size: int) -> torch.Tensor:
        loaded = load_checkpoint_model("", arch="resnet18", img_size=size)
        return torch.cat([loaded.preprocess(Image.open(path)) for path in sorted(imagenet_sample.iterdir())[:3]])

    return at


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
@pytest.mark.parametrize(
    "settings",
    [
        {"arch": "vit_small", **SMALL},
        {"arch": "vit_small", "mode": "simpool", "gamma": 1.5, "pos_embed_policy": "reference", **SMALL},
        {"arch": "vit_small", "mode": "gem", "pooling_args": {"p": 2.0, "learn": False}, **SMALL},
        {"arch": "resnet18", "mode": "simpool", "gamma": 2.0, "img_size": 32},
    ],
    ids=["official", "simpool", "gem", "resnet18"],
)
def test_load_gives_the_checkpoints_features(tmp_path, photographs, kind, settings):
    """export.load and portable.load build the model from the file alone; its features are the same bits."""
    checkpoint = checkpoint_of(tmp_path / "c.pth", **settings)
    file = run(checkpoint, kind, tmp_path / "out" / f"model.{kind}")
    with torch.no_grad():
        expected = load_checkpoint_model(checkpoint).model(photographs(32))
        for load in (export.load, portable.load):
            model = load(file)
            assert not model.training
            assert torch.equal(model(photographs(32)), expected)


def test_safetensors_without_this_code(tmp_path, photographs):
    """The plain package reads weights and settings, and timm's own ViT takes an official model's weights strictly."""
    import timm
    from safetensors import safe_open
    from safetensors.torch import load_file

    checkpoint = checkpoint_of(tmp_path / "c.pth", arch="vit_small", **SMALL)
    file = run(checkpoint, "safetensors", tmp_path / "out" / "model.safetensors")
    with safe_open(file, "pt") as opened:
        config = json.loads(opened.metadata()["config"])
    assert {key: config[key] for key in SMALL} == SMALL
    other = timm.models.vision_transformer.VisionTransformer(num_classes=0, class_token=True, **SMALL).eval()
    other.load_state_dict(load_file(file), strict=True)
    with torch.no_grad():
        expected = portable.load(file)(photographs(32))
        assert torch.allclose(other(photographs(32)), expected, atol=1e-5)  # other kernels, sums in another order


def test_every_reader_takes_an_export(tmp_path):
    """torch.hub's entry points and the evaluations read safetensors as they read a checkpoint."""
    checkpoint = tiny_checkpoint(tmp_path / "c.pth")
    file = run(checkpoint, "safetensors", tmp_path / "out" / "model.safetensors")
    expected = pretrained.open_pretrained(checkpoint)
    for weights in (hubconf.vit_small_simpool(pretrained=str(file)), load_checkpoint_model(file).model):
        assert all(torch.equal(value, expected.weights[name]) for name, value in weights.state_dict().items())
    assert load_checkpoint_model(file).epoch == 3


def test_half_stores_float16_and_computes_in_float32(tmp_path, photographs):
    """--half halves the tensors; the loaded model is float32 with every weight rounded, and says what that changed."""
    from safetensors.torch import load_file

    checkpoint = tiny_checkpoint(tmp_path / "c.pth")
    file = run(checkpoint, "safetensors", tmp_path / "half" / "model.safetensors", "--half")
    assert {value.dtype for value in load_file(file).values()} == {torch.float16}
    exact, rounded = portable.load(checkpoint), portable.load(file)
    for name, value in exact.state_dict().items():
        assert torch.equal(rounded.state_dict()[name], value.half().float())
    with torch.no_grad():
        difference = (exact(photographs(32)) - rounded(photographs(32))).abs().max()
    assert 0 < difference < 0.05  # weights keep 11 bits, features are of order one


@pytest.mark.parametrize(
    "settings",
    [{}, {"mode": "simpool", "pos_embed_policy": "exact"}, {"mode": "simpool", "pos_embed_policy": "reference"}],
    ids=["official", "exact", "reference"],
)
def test_positions_are_baked_for_another_size(tmp_path, photographs, settings):
    """--img_size makes that size the model's own: the same features there, and no resampling is left."""
    checkpoint = checkpoint_of(tmp_path / "c.pth", arch="vit_small", **SMALL, **settings)
    file = run(checkpoint, "safetensors", tmp_path / "out" / "m.safetensors", "--img_size", "64")
    model, original = portable.load(file), load_checkpoint_model(checkpoint).model
    assert model.settings["img_size"] == 64
    with torch.no_grad():
        assert torch.equal(model(photographs(64)), original(photographs(64)))
        assert model.interpolate_pos_encoding(torch.empty(0), 64, 64) is model.pos_embed


def test_the_card_tells_what_is_known(tmp_path):
    """Training, evaluations of exactly these weights, loading, an empty licence; config.json lists the files."""
    checkpoint = tiny_checkpoint(tmp_path / "run" / "c.pth")
    content = pretrained.read(checkpoint)
    content |= {"args": {"recipe": "simpool", "epochs": 100, "lr": 0.002}}
    content["config"] |= {"method": "dino", "data": "f1e2d3"}
    save_checkpoint(content, checkpoint)
    sha = load_checkpoint_model(checkpoint).sha256
    for name, of, top1 in (("eval_knn", sha, 61.25), ("eval_linear", "another", 99.0)):
        found = {"evaluation": name, "model": {"checkpoint_sha256": of}, "data": {"data_path": "cats"},
                 "results": {"10": {"top1": top1}}}  # fmt: skip
        (tmp_path / "run" / f"{name}.json").write_text(json.dumps(found))
    run(checkpoint, "safetensors", tmp_path / "hub" / "model.safetensors")
    run(checkpoint, "torch", tmp_path / "hub" / "model.pt")
    card = (tmp_path / "hub" / "MODEL_CARD.md").read_text()
    assert card == (tmp_path / "hub" / "README.md").read_text()
    for text in ("| recipe | simpool |", "| epochs | 100 |", "f1e2d3", sha, "| 10.top1 | 61.25 |", "cats", "sha: "):
        assert text in card
    assert "99" not in card.split("## Measured")[1].split("## How")[0]
    assert 'portable.load("model.safetensors")' in card
    assert 'portable.load("model.pt")' in card
    assert card.startswith("---\n# license: fill in")
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert set(config["files"]) == {"model.safetensors", "model.pt"}
    assert config["settings"]["embed_dim"] == config["num_features"] == 24


def test_files_of_others_stay(tmp_path, capsys):
    """A run's config.json, a README of the user's and a card with the licence filled in are never replaced."""
    checkpoint = tiny_checkpoint(tmp_path / "run" / "c.pth")
    (tmp_path / "run" / "config.json").write_text('{"lr": 1}')
    (tmp_path / "run" / "README.md").write_text("mine")
    run(checkpoint, "safetensors", tmp_path / "run" / "model.safetensors")
    assert (tmp_path / "run" / "config.json").read_text() == '{"lr": 1}'
    assert (tmp_path / "run" / "README.md").read_text() == "mine"
    assert "stays" in capsys.readouterr().out
    run(checkpoint, "safetensors", tmp_path / "hub" / "model.safetensors")
    card = tmp_path / "hub" / "MODEL_CARD.md"
    card.write_text(card.read_text().replace("# license: fill in", "license: mit #"))
    run(checkpoint, "torch", tmp_path / "hub" / "model.safetensors", "--overwrite")
    assert "license: mit" in card.read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--format", "onnxx"], "onnxx"),
        (["--img_size", "33"], "33x33 is not divisible.*32x32"),
        (["--img_size", "0"], "img_size 0"),
        (
            ["--with_attention"],
            "--with_attention is for --format onnx, torchscript or torch_export, not for safe",
        ),
        (["--opset", "18"], "--opset is for --format onnx, not for safetensors"),
        (
            ["--half", "--format", "torch_export"],
            "--half is for --format safetensors, torch, timm or onnx, not",
        ),
        (["--pretrained_weights", "/nowhere.pth"], "nowhere.pth"),
        (["--pretrained_weights", ""], "pretrained_weights is empty"),
        (["--checkpoint_key", "student"], "no weights under 'student'; --checkpoint_key can be: teacher"),
        (["--output", "/dev/null/model.safetensors"], "cannot be written"),
        (["--output", "."], "is a folder"),
        (["--output", "config.json"], "the card takes this name"),
        (["--with_head"], "--with_head: .*c.pth holds no linear classifier of 24 features"),
        (["--with_head", "maybe"], "'maybe' is not a boolean"),
        (["--mode", "official"], "--mode official but the checkpoint says simpool"),
    ],
)
def test_bad_input_is_one_line_that_shows_the_value(tmp_path, flags, message):
    """Every wrong flag is an InputError of one line that names it, and no file is left."""
    checkpoint = tiny_checkpoint(tmp_path / "c.pth")
    first = ["--pretrained_weights", str(checkpoint), "--format", "safetensors", "--output", str(tmp_path / "m.st")]
    with pytest.raises(InputError, match=message) as caught:
        export.main([*first, *flags])
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["c.pth"]


def test_a_file_that_exists_is_replaced_only_with_overwrite(tmp_path):
    """Nor is the checkpoint itself, nor, without the flag, the card of another checkpoint."""
    one, two = tiny_checkpoint(tmp_path / "one.pth"), tiny_checkpoint(tmp_path / "two.pth", seed=1)
    file = run(one, "torch", tmp_path / "hub" / "model.pt")
    before = file.read_bytes()
    with pytest.raises(InputError, match=r"model.pt exists.*--overwrite"):
        run(one, "torch", file)
    with pytest.raises(InputError, match="belongs to the export of another checkpoint"):
        run(two, "torch", tmp_path / "hub" / "second.pt")
    assert file.read_bytes() == before
    with pytest.raises(InputError, match="is the checkpoint itself"):
        run(one, "torch", one, "--overwrite")
    run(two, "torch", file, "--overwrite")
    assert json.loads((tmp_path / "hub" / "config.json").read_text())["checkpoint"] == "two.pth"


def test_damage_is_found(tmp_path):
    """A safetensors file that is cut short, or has one bit of a weight flipped, is a ValueError that names it."""
    file = run(tiny_checkpoint(tmp_path / "c.pth"), "safetensors", tmp_path / "out" / "model.safetensors")
    whole = file.read_bytes()
    for damaged in (whole[:-10], whole[:20], b"", whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model.safetensors is damaged") as caught:
            export.load(file)
        assert "\n" not in str(caught.value)
        with pytest.raises(InputError, match="is damaged"):
            export.main(
                ["--pretrained_weights", str(file), "--format", "torch", "--output", str(tmp_path / "x" / "y.pt")]
            )


def test_missing_packages_are_named(tmp_path, monkeypatch):
    """Without its packages a format is an error that shows the pip command."""
    checkpoint = tiny_checkpoint(tmp_path / "c.pth")
    find = export.importlib.util.find_spec
    monkeypatch.setattr(
        export.importlib.util, "find_spec", lambda name, *rest: None if name.startswith("onnx") else find(name, *rest)
    )
    with pytest.raises(InputError, match=r"--format onnx needs onnx, .*: pip install onnx onnxruntime onnxscript"):
        run(checkpoint, "onnx", tmp_path / "m.onnx")


def test_a_checkpoint_without_a_teacher_is_read_by_its_student(tmp_path, capsys):
    """Training with labels has no teacher; the program says which network it took."""
    checkpoint = tiny_checkpoint(tmp_path / "c.pth")
    content = pretrained.read(checkpoint)
    content["student"] = {f"module.{name}": value for name, value in content.pop("teacher").items()}
    save_checkpoint(content, checkpoint)
    run(checkpoint, "safetensors", tmp_path / "out" / "model.safetensors")
    assert "has no teacher; its student is used" in capsys.readouterr().out


def test_a_file_that_reads_back_differently_is_not_kept(tmp_path, monkeypatch):
    """The comparison on photographs decides: the program ends with code 1, and nothing lies under the name."""
    checkpoint = tiny_checkpoint(tmp_path / "c.pth")
    other = portable.load(tiny_checkpoint(tmp_path / "d.pth", seed=1))
    monkeypatch.setattr(export, "load", lambda path, classifier: other)
    with pytest.raises(RunStopped, match="nothing was written") as caught:
        run(checkpoint, "torch", tmp_path / "out" / "model.pt")
    assert caught.value.exit_code == 1
    assert not list((tmp_path / "out").iterdir())


# ---- ONNX -----------------------------------------------------------------------------------------------------------

GRAPHS = {
    "vit_official": {"arch": "vit_small", **SMALL},
    "vit_simpool": {"arch": "vit_small", "mode": "simpool", "pos_embed_policy": "reference", **SMALL},
    "resnet_official": {"arch": "resnet18", "img_size": 32},
    "resnet_simpool": {"arch": "resnet18", "mode": "simpool", "gamma": 2.0, "img_size": 32},
    "convnext_official": {"arch": "convnext_tiny", "img_size": 32},
    "convnext_simpool": {"arch": "convnext_tiny", "mode": "simpool", "gamma": 2.0, "img_size": 32},
    **{mode: {"arch": "vit_small", "mode": mode, **SMALL} for mode in POOLINGS if mode != "simpool"},
    "resnet_cbam": {"arch": "resnet18", "mode": "cbam", "img_size": 64},
    "convnext_otk": {"arch": "convnext_tiny", "mode": "otk", "img_size": 64},
    "timm_convnext": {"arch": "convnext_atto", "mode": "simpool", "img_size": 64},
    "timm_resnet": {"arch": "resnet10t", "img_size": 32},
    "timm_vit": {"arch": "test_vit", "mode": "simpool", "img_size": 160},
}
WITH_MAP = ("vit_official", "vit_simpool", "resnet_simpool", "convnext_simpool", "convnext_otk", *WITH_ATTENTION)


@pytest.fixture
def onnx_packages():
    """Skips where the optional packages are not installed."""
    for name in export.FORMATS["onnx"]:
        pytest.importorskip(name)
    import onnxruntime

    return onnxruntime


@pytest.mark.parametrize(
    "name", [name if name == "vit_simpool" else pytest.param(name, marks=pytest.mark.full) for name in GRAPHS]
)
def test_a_graph_gives_the_checkpoints_numbers(onnx_packages, tmp_path, photographs, name):
    """onnxruntime gives features and maps of real images within 1e-4, for one image and for three."""
    settings = GRAPHS[name]
    checkpoint = checkpoint_of(tmp_path / "c.pth", **settings)
    with_map = name in WITH_MAP
    file = run(checkpoint, "onnx", tmp_path / "m.onnx", *(["--with_attention"] if with_map else []))
    session = onnx_packages.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert [entry.name for entry in session.get_outputs()] == ["features", "attention"][: 1 + with_map]
    model, images = load_checkpoint_model(checkpoint).model, photographs(settings["img_size"])
    for batch in (images[:1], images):
        found = session.run(None, {"images": batch.numpy()})
        with torch.no_grad():
            expected = (model(batch), model.get_attention_map(batch)) if with_map else (model(batch),)
        for there, here in zip(found, expected, strict=True):
            assert there.shape == here.shape
            assert (torch.from_numpy(there) - here).abs().max() <= 1e-4


LOADED = {
    "torch_export": "torch.export.load(path).module()",
    "torchscript": "torch.jit.load(path)",
}


@pytest.mark.parametrize("kind", LOADED)
@pytest.mark.parametrize("name", [n if n == "vit_simpool" else pytest.param(n, marks=pytest.mark.full) for n in GRAPHS])
def test_a_graph_of_torchs_own_gives_the_checkpoints_numbers(tmp_path, photographs, name, kind):
    """torch alone runs it, without this code, on any number of images at the exported size."""
    settings = GRAPHS[name]
    checkpoint = checkpoint_of(tmp_path / "c.pth", **settings)
    with_map = name in WITH_MAP
    file = run(checkpoint, kind, tmp_path / "m.pt2", *(["--with_attention"] if with_map else []))
    code = (
        "import sys, torch; images, path, out = sys.argv[1:]\n"
        f"model = {LOADED[kind]}\n"
        "found = model(torch.load(images)); model(torch.load(images)[:1])\n"
        "assert 'vision_transformer' not in sys.modules\n"
        "torch.save([x.detach() for x in found], out)"
    )
    images = photographs(settings["img_size"])
    torch.save(images, tmp_path / "images.pt")
    paths = [str(tmp_path / part) for part in ("images.pt", file.name, "out.pt")]
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, *paths], cwd=tmp_path, check=True)
    found, model = torch.load(tmp_path / "out.pt"), load_checkpoint_model(checkpoint).model
    with torch.no_grad():
        expected = (model(images), model.get_attention_map(images)) if with_map else (model(images),)
    for there, here in zip(found, expected, strict=True):
        assert there.shape == here.shape
        assert (there - here).abs().max() <= 1e-4


@pytest.mark.parametrize("kind", [*LOADED, pytest.param("onnx", marks=pytest.mark.full)])
def test_logits_of_a_graph(request, tmp_path, photographs, kind):
    """--with_head adds the classifier's output under its name, next to the map if that is asked for."""
    labelled = labelled_checkpoint(tmp_path / "c.pth")
    more = ["--with_attention"] if kind == "torchscript" else []
    onnxruntime = request.getfixturevalue("onnx_packages") if kind == "onnx" else None
    file = run(labelled, kind, tmp_path / "out" / "m", "--with_head", *more)
    if kind == "onnx":
        session = onnxruntime.InferenceSession(file)
        found = [torch.from_numpy(f) for f in session.run(["features", "logits"], {"images": photographs(32).numpy()})]
    else:
        load = {"torchscript": torch.jit.load, "torch_export": lambda path: torch.export.load(path).module()}[kind]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, on its own formats
            found = load(file)(photographs(32))
    expected = [portable.load(labelled, classifier=classifier)(photographs(32)) for classifier in (False, True)]
    assert len(found) == 2 + len(more)
    assert torch.allclose(found[0], expected[0], atol=1e-4)
    assert torch.allclose(found[-1], expected[1], atol=1e-4)
    named = {"torchscript": "features, attention, logits = model", "torch_export": "features, logits = model"}
    assert named.get(kind, "features, logits = session") in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_a_classifier_lies_with_the_weights(tmp_path, photographs, kind):
    """--with_head keeps it; the backbone is loaded alone unless the classifier is asked for."""
    labelled = labelled_checkpoint(tmp_path / "c.pth", arch="resnet18", img_size=32)
    file = run(labelled, kind, tmp_path / "out" / f"model.{kind}", "--with_head")
    with torch.no_grad():
        for classifier in (False, True):
            expected = portable.load(labelled, classifier=classifier)(photographs(32))
            assert torch.equal(portable.load(file, classifier=classifier)(photographs(32)), expected)
    assert "fc.weight" in pretrained.read(file)["state_dict"]
    file = run(labelled, kind, tmp_path / "out" / f"bare.{kind}")
    with pytest.raises(ValueError, match="holds no linear classifier"):
        portable.load(file, classifier=True)


@pytest.mark.full
def test_a_graph_for_another_size_in_half(onnx_packages, tmp_path, photographs):
    """--img_size bakes the positions of that size; with --half the file shrinks, and computes with rounded weights."""
    import onnx

    checkpoint = checkpoint_of(tmp_path / "c.pth", **GRAPHS["vit_simpool"])
    whole = run(checkpoint, "onnx", tmp_path / "a" / "m.onnx", "--img_size", "64")
    half = run(checkpoint, "onnx", tmp_path / "b" / "m.onnx", "--img_size", "64", "--half", "--opset", "20")
    operations = {node.op_type for node in onnx.load(whole).graph.node}
    assert "Resize" not in operations
    texts = {entry.key: json.loads(entry.value) for entry in onnx.load(half).metadata_props}
    assert texts["config"]["img_size"] == 64
    weights = [w.data_type for w in onnx.load(half).graph.initializer if len(w.dims) == 2]
    assert set(weights) == {onnx.TensorProto.FLOAT16}
    model = load_checkpoint_model(checkpoint).model
    for file, most in ((whole, 1e-4), (half, 0.05)):  # rounded weights keep 11 bits, features are of order one
        (found,) = onnx_packages.InferenceSession(file).run(None, {"images": photographs(64).numpy()})
        with torch.no_grad():
            assert (torch.from_numpy(found) - model(photographs(64))).abs().max() <= most


def test_what_no_graph_takes(onnx_packages, tmp_path, monkeypatch):
    """An opset too old and a map that the model lacks are named, and nothing is written."""
    official = checkpoint_of(tmp_path / "r.pth", arch="resnet18", img_size=32)
    for flags, message in (
        (["--opset", "9"], r"--opset 9: .*takes 18 to"),
        (["--with_attention"], r"--with_attention: .*no attention map"),
    ):
        with pytest.raises(InputError, match=message):
            run(official, "onnx", tmp_path / "out" / "m.onnx", *flags)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("kind", [*LOADED, pytest.param("onnx", marks=pytest.mark.full)])
def test_a_model_that_no_graph_follows_is_one_line(request, tmp_path, monkeypatch, kind):
    """Whatever the exporter met inside the model is an error that names the model and another format."""
    if kind == "onnx":
        request.getfixturevalue("onnx_packages")

    def forward(self, images):
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            raise IndexError("of the model's own\nin two lines")
        return (self.model(images),)

    monkeypatch.setattr(export.graph.Outputs, "forward", forward)
    checkpoint = tiny_checkpoint(tmp_path / "c.pth")
    with pytest.raises(
        InputError, match=rf"--format {kind}: .*vit_small, mode simpool.* cannot be written as a graph"
    ) as caught:
        run(checkpoint, kind, tmp_path / "out" / "m.onnx")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.full
def test_a_graph_that_differs_is_not_kept(onnx_packages, tmp_path, monkeypatch):
    """Above the tolerance the program ends with code 1, and nothing lies under the name."""
    checkpoint = tiny_checkpoint(tmp_path / "c.pth")
    monkeypatch.setattr(export.graph, "LARGEST_DIFFERENCE", -1.0)
    with pytest.raises(RunStopped, match=r"differ by .* from torch's.*nothing was written") as caught:
        run(checkpoint, "onnx", tmp_path / "out" / "m.onnx")
    assert caught.value.exit_code == 1
    assert not list((tmp_path / "out").iterdir())
