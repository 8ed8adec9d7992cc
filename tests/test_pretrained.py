"""What a model's file tells: weights, settings, notes, and what it leaves open."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import backbones
import pretrained
from evaluation.models import load_checkpoint_model
from tests.reference import reference_checkpoint_path

TINY = {"arch": "vit_small", "patch_size": 8, "img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2}


def tiny(**settings) -> dict[str, torch.Tensor]:
    return backbones.build_backbone(**{**TINY, "mode": "simpool", **settings}).state_dict()


def told(content: dict) -> pretrained.Pretrained:
    return pretrained.interpret(content, "c.pth")


def test_the_published_checkpoint():
    """A file as the published code writes it: shapes tell the size, nothing tells the heads."""
    found = pretrained.open_pretrained(reference_checkpoint_path())
    assert found.settings == {
        "mode": "official", "arch": "vit_small", "embed_dim": 48, "depth": 2, "patch_size": 8, "in_chans": 3,
        "img_size": 64,
    }  # fmt: skip
    assert (found.unknown, found.epoch) == (("num_heads",), 7)


@pytest.mark.parametrize("name", ["vit_tiny", "vit_small", "vit_base", "resnet18", "resnet50", "convnext_tiny"])
def test_presets_are_recognised_by_their_shapes(name):
    """Bare weights of a preset need nothing else."""
    with torch.device("meta"):
        weights = backbones.build_backbone(name).state_dict()
    found = told(weights)
    assert (found.settings["arch"], found.unknown) == (name, ())


@pytest.mark.parametrize("stem", ["standard", "small"])
def test_the_stem_of_a_resnet(stem):
    """Recorded, or else read from the first kernel; a record that contradicts it is refused."""
    with torch.device("meta"):
        weights = backbones.build_backbone("resnet18", stem=stem).state_dict()
    other = "small" if stem == "standard" else "standard"
    for content in (weights, {"teacher": weights, "config": {"arch": "resnet18"}}, {"teacher": weights, "args": {}}):
        assert told(content).settings["stem"] == stem
    assert told({"teacher": weights, "config": {"arch": "resnet18", "stem": stem}}).settings["stem"] == stem
    with pytest.raises(ValueError, match=f"stem {other} but its weights have {stem}"):
        told({"teacher": weights, "config": {"arch": "resnet18", "stem": other}})
    with pytest.raises(ValueError, match="stem 'none', which is impossible"):
        told({"teacher": weights, "config": {"arch": "resnet18", "stem": "none"}})


@pytest.mark.parametrize("settings", [{}, {"embed_dim": 384, "depth": 2, "num_heads": 6}])
def test_heads_are_asked_for_where_nothing_tells_them(settings):
    """Bare weights of a width or depth of no preset leave the number of heads unknown; a recorded one does not."""
    weights = tiny(**settings)
    assert told(weights).unknown == ("num_heads",)
    assert told({"teacher": weights, "args": {"arch": "vit_small", "num_heads": 2}}).unknown == ()
    assert told({"teacher": weights, "config": {**TINY, **settings, "mode": "simpool"}}).unknown == ()


@pytest.mark.parametrize(
    ("args", "gamma"),
    [
        ({"gamma": 1.75}, 1.75),
        ({"gamma": "auto"}, 1.25),
        ({"gamma": "None"}, None),
        ({"gamma": None}, None),
        ({}, 1.25),
    ],
)  # fmt: skip
def test_gamma_of_a_file_without_our_config(args, gamma):
    """The arguments' value, which in a file of ours may be "auto"; a default comes with a note."""
    found = told({"teacher": tiny(), "args": {"arch": "vit_small", **args}})
    assert found.settings["gamma"] == gamma
    assert any("does not record gamma" in note for note in found.notes) == (not args)


def test_our_arguments_without_a_config_keep_their_policies():
    """Only what the published programs wrote means their position policy."""
    assert told({"teacher": tiny(), "args": {}}).settings["pos_embed_policy"] == "reference"
    ours = told({"teacher": tiny(), "args": {"pos_embed_policy": "exact", "value_min": "batch"}})
    assert (ours.settings["pos_embed_policy"], ours.settings["value_min"]) == ("exact", "batch")


def test_a_training_without_a_teacher_is_read_by_its_student():
    """And that is said."""
    found = told({"student": {f"module.backbone.{name}": value for name, value in tiny().items()}, "args": {}})
    assert found.weights.keys() == tiny().keys()
    assert "no teacher; its student is used" in found.notes[0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"depth": 100_000}, "depth 100000 but its weights have 2"), ({"embed_dim": 10**6}, "embed_dim 1000000"),
        ({"patch_size": -1}, "patch_size '-1', which is impossible"), ({"num_heads": "x"}, "num_heads"),
        ({"img_size": [1, 2, 3]}, "img_size"), ({"gamma": float("nan")}, "gamma"), ({"arch": "a\x1b[2J"}, "arch"),
        ({"in_chans": True}, "in_chans"), ({"mode": 3}, "mode"), ({"format": 3}, "newer version"),
        ({"value_min": []}, "value_min"), ({"pool_depth": -1}, "pool_depth"), ({"pooling_args": [1]}, "pooling_args"),
        ({"depth": 2, "pool_depth": 1}, "depth 1 but its weights have 2"), ({"use_beta": 1}, "use_beta"),
        ({"pooling_args": {"p": {}}}, "pooling_args"), ({"pooling_args": {"a b": 1}}, "pooling_args"),
        ({"pool_position": 1}, "pool_position"), ({"pooling_args": {"p": "\x1b"}}, "pooling_args"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(config, message):
    """Values of a wrong type or size, and those that the weights contradict, before anything is built."""
    with pytest.raises(ValueError, match=message):
        told({"teacher": tiny(), "config": {**TINY, "mode": "simpool", **config}})


@pytest.mark.parametrize("content", [{}, {"teacher": {}}, {"teacher": [1]}, {"state_dict": {"a": 1}}, {1: 2}])
def test_files_without_weights(content):
    """Each is an error that names the file."""
    with pytest.raises(ValueError, match=r"c\.pth"):
        told(content)


def test_odd_weights_are_refused_without_being_loaded():
    """Tensors of another rank, kind or shape in the places that tell the size."""
    for name, value in (
        ("patch_embed.proj.weight", torch.zeros(3)), ("pos_embed", torch.zeros(2, 2)),
        ("norm.weight", torch.zeros(24, dtype=torch.complex64)), ("norm.bias", torch.zeros(24, dtype=torch.int64)),
    ):  # fmt: skip
        model = backbones.build_backbone(**TINY, mode="simpool")
        weights = {**tiny(), name: value}
        told(weights)
        with pytest.raises(ValueError, match="does not fit the model"):
            pretrained.load_weights(model, weights, "c.pth")


def test_the_fit_is_checked_without_memory():
    """A model on the meta device is enough to compare."""
    with torch.device("meta"):
        outline = backbones.build_backbone("vit_base", img_size=16 * 4000)
    with pytest.raises(ValueError, match="does not fit the model"):
        pretrained.check_fit(outline, tiny(), Path("c.pth"))


def attmask_checkpoint() -> dict:
    """A file as AttMask's and iBOT's published code writes it: the student alone has masked_embed."""
    student, teacher = tiny(mode="official", masked_im_modeling=True), tiny(mode="official")
    head = {"head.last_layer.weight_g": torch.ones(8, 1), "head.last_layer2.weight_g": torch.ones(8, 1)}
    return {
        "student": {f"module.{name}": value for name, value in ({**_prefixed(student), **head}).items()},
        "teacher": {**_prefixed(teacher), **head},
        "epoch": 3,
        "args": {"arch": "vit_small", "patch_size": 8, "num_heads": 2, "use_masked_im_modeling": True},
        "ibot_loss": {"center": torch.zeros(1, 8), "center2": torch.zeros(1, 1, 8)},
    }


def _prefixed(state: dict) -> dict:
    return {f"backbone.{name}": value for name, value in state.items()}


@pytest.mark.parametrize("key", ["teacher", "student"])
def test_a_checkpoint_of_a_masked_model(key):
    """Its settings and weights are read; a model without masks leaves masked_embed out and says so."""
    found = pretrained.interpret(attmask_checkpoint(), "c.pth", key)
    assert (found.settings["mode"], found.settings["embed_dim"], found.unknown) == ("official", 24, ())
    notes = pretrained.load_weights(backbones.build_backbone(**TINY), found.weights, "c.pth")
    assert notes == ([] if key == "teacher" else ["not used by the backbone: masked_embed"])


def test_masked_models_load_their_token_or_keep_their_own():
    """A model with masked_embed loads it; from a file without one it keeps its own, with a note."""
    content = attmask_checkpoint()
    content["student"]["module.backbone.masked_embed"] += 1
    for key, value, notes in (("student", 1, 0), ("teacher", 0, 1)):
        model = backbones.build_backbone(**TINY, masked_im_modeling=True)
        said = pretrained.load_weights(model, pretrained.interpret(content, "c.pth", key).weights, "c.pth")
        assert (model.masked_embed == value).all()
        assert [note for note in said if "has no masked_embed" in note] == said
        assert len(said) == notes


def test_what_tells_the_pooling():
    """[CLS] and SimPool tell the mode; anything else in a ViT, and an operator's own weights, leave it open."""
    for mode, told_mode in (("official", "official"), ("simpool", "simpool"), ("gap", None), ("gem", None)):
        found = told({"teacher": tiny(mode=mode), "args": {"num_heads": 2}})
        assert found.settings.get("mode") == told_mode
        assert found.unknown == (() if told_mode else ("mode",))
        assert told({"teacher": tiny(mode=mode), "config": {**TINY, "mode": mode}}).unknown == ()
    resnets = {mode: backbones.build_backbone("resnet18", mode).state_dict() for mode in ("official", "gap", "otk")}
    assert [told(w).settings.get("mode") for w in resnets.values()] == ["official", "official", None]


def test_flags_of_a_pooling_without_our_config():
    """Settings that stand only on the recorded command line are asked for; the depth is the shapes'."""
    args = {"num_heads": 2, "mode": "gem", "pooling_args": ["p=2"], "pool_depth": 1, "depth": 3}
    found = told({"teacher": tiny(mode="gem"), "args": args})
    assert (found.unknown, found.settings["mode"], found.settings["depth"]) == (("pooling_args",), "gem", 2)
    assert "pool_depth" not in found.settings


@pytest.mark.parametrize("form", ["timm", "dinov2", "dinov2_training"])
def test_plain_vits_of_others(tmp_path, form):
    """timm's layout and DINOv2's, in chunks too: the features are those of the model that wrote the file."""
    from timm.models.vision_transformer import VisionTransformer as Other

    shape = {"img_size": 28, "patch_size": 14, "embed_dim": 24, "depth": 2, "num_heads": 2}
    other = Other(**shape, num_classes=5 if form == "timm" else 0, init_values=None if form == "timm" else 0.1).eval()
    weights = {name: torch.randn_like(value) / 3 for name, value in other.state_dict().items()}
    other.load_state_dict(weights)
    if form != "timm":
        weights["mask_token"] = torch.zeros(1, 24)
    content = weights
    if form == "dinov2_training":
        chunks = {re.sub(r"^blocks\.(\d+)", r"blocks.0.\1", name): value for name, value in weights.items()}
        content = {
            "teacher": {f"backbone.{name}": value for name, value in chunks.items()} | {"dino_head.w": torch.ones(1)}
        }
    torch.save(content, tmp_path / "other.pth")
    model, x = load_checkpoint_model(tmp_path / "other.pth", num_heads=2).model, torch.randn(3, 3, 28, 28)
    with torch.no_grad():
        expected = other.forward_head(other.forward_features(x), pre_logits=True)
        # Scaling before the product instead of after it rounds otherwise; the features are of order one
        assert torch.allclose(model(x), expected, atol=1e-5)


def test_what_makes_a_plain_vit_another_is_named(tmp_path):
    """Register tokens, a gated MLP and a layer scale of another width are refused by their names."""
    weights = backbones.build_backbone("vit_small", img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2)
    for name, value in (
        ("register_tokens", torch.zeros(1, 4, 24)),
        ("blocks.0.mlp.w12.weight", torch.zeros(8, 24)),
        ("blocks.0.ls1.gamma", torch.zeros(23)),
    ):
        torch.save({**weights.state_dict(), name: value}, tmp_path / "other.pth")
        with pytest.raises(ValueError, match=f"it has {name} that the model lacks"):
            load_checkpoint_model(tmp_path / "other.pth", num_heads=2)
