"""The backbone of a new run: pooled as its flags say, on every crop size; and what a checkpoint then records."""

from __future__ import annotations

import json
import re
from functools import partial

import pytest
import torch

import backbones
import main_dino
import main_supervised
import utils
from poolings.choose import read_settings
from pretrained import load_weights
from runtime.checkpoint import read_checkpoint, save_checkpoint
from runtime.guards import InputError
from tests.pretraining import FAMILIES, VIT, assert_equal_states, train
from tests.small_images import tiny_checkpoint
from training import arguments
from training.backbone import fit_positions, initial_settings

GEM = ["--mode", "gem", "--pooling_args", "p=2", "learn=false", "eps=none"]
RUNS = {
    "gem": ([*VIT, *GEM, "--pool_position", "after"], {"p": 2, "learn": False, "eps": None}),
    "slot": ([*VIT, "--mode", "slot", "--pooling_args", "eval_seed=1"], {"eval_seed": 1}),
    "kmeans": ([*VIT, "--mode", "kmeans", "--pool_depth", "1"], {}),
    "cbam": ([*FAMILIES["resnet"], "--mode", "cbam"], {}),
    "how": ([*FAMILIES["timm"], "--mode", "how", "--pooling_args", "width=48"], {"width": 48}),
    "official": ([*FAMILIES["vit_official"], "--pool_depth", "1"], None),
}  # fmt: skip


LONG = [pytest.param(name, marks=pytest.mark.full) for name in ("kmeans", "cbam", "how", "official")]


@pytest.mark.parametrize("name", ["gem", "slot", *LONG])
def test_any_pooling_trains_resumes_and_is_read_back(small, tmp_path, name):
    """Stopped and continued, the run ends bit for bit the same; its config alone builds the model again."""
    flags, settings = RUNS[name]
    flags = [*flags, "--data_path", small, "--eval_every", 0, "--max_steps"]
    assert train(*flags, 4, "--output_dir", tmp_path / "whole") == 0
    assert train(*flags, 2, "--output_dir", tmp_path / "parts") == 0
    assert train(*flags, 4, "--output_dir", tmp_path / "parts") == 0
    assert_equal_states(tmp_path / "whole", tmp_path / "parts")

    content = torch.load(tmp_path / "whole" / "checkpoint.pth", weights_only=True)
    config, mode = content["config"], content["args"]["mode"]
    assert config.get("pooling_args") == settings
    assert config["pool_depth"] == (1 if "--pool_depth" in flags else 0)
    assert ("gamma" in config, "use_beta" in config) == (False, False)
    assert config.get("pool_position") == {"gem": "after", "official": None}.get(mode, "before")
    loaded = utils.load_checkpoint_model(tmp_path / "whole" / "checkpoint.pth")
    assert loaded.model.mode == mode
    assert loaded.model(torch.randn(2, 3, 32, 32)).shape == (2, loaded.model.num_features)


def test_simpool_records_what_it_is(small, tmp_path):
    """gamma, beta and position as built, whatever the flags left open."""
    flags = [*VIT, "--data_path", small, "--eval_every", 0, "--max_steps", 1, "--output_dir"]
    recorded = []
    for folder, more in (("ssl", []), ("supervised", ["--pool_position", "after"]), ("plain", ["--gamma", "None"])):
        assert train(*flags, tmp_path / folder, *more) == 0
        config = read_checkpoint(tmp_path / folder / "checkpoint.pth")["config"]
        recorded.append([config[key] for key in ("gamma", "use_beta", "pool_position")])
        loaded = utils.load_checkpoint_model(tmp_path / folder / "checkpoint.pth")
        assert (loaded.model.simpool.beta is not None) == (folder == "ssl")
    assert recorded == [[1.25, True, "before"], [1.25, False, "after"], [None, True, "before"]]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mode", "gem", "--pooling_args", "pp=2"], "gem has no setting 'pp' (did you mean p?)"),
        (["--mode", "gem", "--pooling_args", "p"], "'p' is no setting of a pooling: write key=value"),
        (["--mode", "gem", "--pooling_args", "p=x"], "gem: p must be a positive number, got 'x'"),
        (["--mode", "gem", "--pooling_args", "p=2", "p=3"], "p is set twice, to 2 and '3'"),
        (["--mode", "gem", "--gamma", "2"], "gem has no gamma, got 2.0"),
        (["--mode", "official", "--pooling_args", "p=2"], "p=2: the architecture's own pooling"),
        (["--mode", "kmeans", "--pooling_args", "k=5"], "--local_crops_size 16: vit_small cannot take images of that "
         "size (kmeans: k=5 clusters need as many positions, the image has 4; lower k)"),
        (["--mode", "cbam", "--pooling_args", "flatten=true", "map_size=4,4"], "--local_crops_size 16: vit_small "
         "cannot take images of that size (cbam: flatten=True was built for maps of (4, 4), got (2, 2)"),
        (["--mode", "cait", "--pooling_args", "heads=5"], "width 24 is not divisible into 5 heads"),
        (["--pool_depth", "2"], "pool_depth 2: it is the number of blocks to leave out of 2, so give 0 to 1"),
        (["--pool_depth", "-1"], "--pool_depth -1"),
        (["--use_beta", "true", "--mode", "gap"], "use_beta is a setting of simpool"),
    ],
)  # fmt: skip
def test_poolings_that_cannot_work_are_refused_before_the_run(small, tmp_path, flags, message):
    """One line with the value and the remedy, and nothing is written."""
    with pytest.raises(InputError, match=re.escape(message)):
        train(*VIT, "--data_path", small, "--output_dir", tmp_path, *flags)
    assert not (tmp_path / "checkpoint.pth").exists()


def test_a_changed_pooling_is_another_run(small, tmp_path):
    """The position and the settings belong to the mathematics, in runs from before they could be chosen as well."""
    flags = [*VIT, "--gamma", "None", "--data_path", small, "--eval_every", 0, "--output_dir", tmp_path, "--max_steps"]
    assert train(*flags, 1) == 0
    with pytest.raises(InputError, match="pool_position: None -> after"):
        train(*flags, 2, "--pool_position", "after")
    content = read_checkpoint(tmp_path / "checkpoint.pth")
    for key in ("use_beta", "pool_position", "pool_depth", "pooling_args"):
        content["config"].pop(key)
        content["args"].pop(key)
    torch.save(content, tmp_path / "checkpoint.pth")
    with pytest.raises(InputError, match="pool_position: None -> after"):
        train(*flags, 2, "--pool_position", "after")
    assert train(*flags, 2) == 0


SMALL_RESNET = [
    "--arch", "resnet10t", "--mode", "simpool", "--img_size", "16", "--local_crops_number", "0", "--out_dim", "64",
    "--batch_size_per_gpu", "8", "--num_workers", "0", "--matmul_precision", "highest", "--report", "false",
    "--eval_every", "0", "--optimizer", "sgd", "--device", "cpu", "--head_layers", "1", "--bottleneck_dim", "16",
]  # fmt: skip


def test_small_images_have_a_small_stem(small, tmp_path, capsys):
    """Chosen below 64 pixels, said on the first screen, recorded, and read back by whoever builds the model."""
    flags = [*SMALL_RESNET, "--data_path", small, "--max_steps"]
    assert train(*flags, 1, "--output_dir", tmp_path) == 0
    said = capsys.readouterr().out
    assert "stem small" in said
    assert "images of 16 pixels: resnet10t has a small stem" in said
    content = read_checkpoint(tmp_path / "checkpoint.pth")
    assert (content["config"]["stem"], content["args"]["stem"]) == ("small", "small")
    loaded = utils.load_checkpoint_model(tmp_path / "checkpoint.pth")
    assert loaded.model.get_attention_map(torch.zeros(1, 3, 16, 16)).shape == (1, 1, 2, 2)
    assert train(*flags, 2, "--output_dir", tmp_path) == 0
    with pytest.raises(InputError, match="stem: small -> standard"):
        train(*flags, 3, "--output_dir", tmp_path, "--stem", "standard")
    args = main_dino.parse_arguments(["--init_from", str(tmp_path / "checkpoint.pth"), "--data_path", "demo"])
    assert (args.stem, args.sources["stem"]) == ("small", "init_from")


LATER = [pytest.param(left, marks=pytest.mark.full) for left in ("config.json", "--resume")]


@pytest.mark.parametrize("left", ["the checkpoint alone", *LATER])
def test_a_run_from_before_there_was_a_choice_goes_on(small, tmp_path, left):
    """Neither its arguments nor its configuration record a stem: it ends in the bits of the standard one."""
    flags = [*SMALL_RESNET, "--data_path", small, "--max_steps"]
    assert train(*flags, 4, "--output_dir", tmp_path / "whole", "--stem", "standard") == 0
    before, after = tmp_path / "before", tmp_path / "before"
    assert train(*flags, 2, "--output_dir", before, "--stem", "standard") == 0
    content = read_checkpoint(before / "checkpoint.pth")
    del content["args"]["stem"], content["config"]["stem"]
    for file in before.glob("checkpoint*.pth"):
        file.unlink()
    save_checkpoint(content, before / "checkpoint.pth")
    (before / "config.json").write_text(json.dumps(content["args"]))
    if left == "the checkpoint alone":
        (before / "config.json").unlink()
    if left == "--resume":
        after = tmp_path / "after"
        assert train("--resume", before / "checkpoint.pth", "--max_steps", 4, "--output_dir", after) == 0
    else:
        assert train(*flags, 4, "--output_dir", after) == 0
    assert_equal_states(tmp_path / "whole", after)


def test_a_stem_that_cannot_be_is_refused():
    """One line with the flag, before a --dry_run too; a ResNet whose stem has no strides keeps it, and that is said."""
    with pytest.raises(InputError, match="--stem small: vit_small has no stem of strided convolutions"):
        main_dino.parse_arguments([*VIT, "--data_path", "demo", "--stem", "small"])
    for arch in ("vgg11", "convnext_tiny", "convnext_atto"):
        args = main_dino.parse_arguments(["--arch", arch, "--img_size", "32", "--data_path", "demo"])
        assert args.stem == "standard"
        assert any(f"{arch} keeps its stem" in note for note in args.notes)


def test_supervised_runs_of_small_images_have_a_small_stem_too():
    """The flag, and its automatic choice, belong to all training programs."""
    flags = ["--arch", "resnet18", "--data_path", "demo", "--img_size"]
    assert [main_supervised.parse_arguments([*flags, size]).stem for size in ("63", "64")] == ["small", "standard"]


def test_the_gather_of_ge_is_no_reason_to_refuse_bf16(small, tmp_path):
    """A pooling computes in float32, so its strided convolutions of one-pixel maps have whole gradients."""
    flags = ["--mode", "ge", "--amp", "bf16", "--device", "cpu", "--max_steps", 1, "--eval_every", 0]
    run = [*FAMILIES["convnext"], *flags, "--data_path", small, "--output_dir", tmp_path]
    assert train(*run) == 0


def vit(img_size: int, mode: str = "official", arch: str = "vit_small"):
    return backbones.build_backbone(arch, mode, patch_size=8, img_size=img_size, embed_dim=24, depth=1, num_heads=2)


@pytest.mark.parametrize("mode", ["official", "simpool"])
def test_positions_are_resampled_to_the_grid(mode):
    """A file of 4x4 patches for a model of 6x6: bicubic, [CLS]'s position as it is; the same size is left alone."""
    small, large = vit(32, mode), vit(48, mode)
    weights = small.state_dict()
    assert fit_positions(small, weights) == []
    assert fit_positions(large, weights) == ["position embeddings resampled from 4x4 to 6x6 patches"]
    assert load_weights(large, weights, "file") == []
    prefix = small.num_prefix_tokens
    assert torch.equal(large.pos_embed[:, :prefix], small.pos_embed[:, :prefix])
    maps = small.pos_embed[:, prefix:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(maps, size=(6, 6), mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)
    torch.testing.assert_close(large.pos_embed[:, prefix:], expected)


def test_positions_of_a_timm_model_are_resampled():
    """Under its name inside our wrapper."""
    build = partial(backbones.build_backbone, "vit_tiny_patch16_224")
    weights = build(img_size=32).state_dict()
    assert fit_positions(build(img_size=64), weights) == ["position embeddings resampled from 2x2 to 4x4 patches"]


def test_many_more_patches_than_in_training_are_said():
    """Nine times the patches of the file: likely a default that nobody chose, so the file's own size is named."""
    _, said = fit_positions(vit(96), vit(32).state_dict())
    assert "9 times as many patches" in said
    assert "--img_size 32 keeps its size" in said


def test_other_widths_are_left_to_the_loader():
    """A file of another width is refused by the loader, which names the shapes."""
    weights = backbones.build_backbone("vit_tiny", patch_size=8, img_size=32, depth=1).state_dict()
    assert fit_positions(vit(48), weights) == []
    with pytest.raises(ValueError, match="pos_embed is"):
        load_weights(vit(48), weights, "file")


def test_settings_of_the_initial_file(tmp_path):
    """All but the image size and what is given; a pooling's settings as its flag has them."""
    path = tiny_checkpoint(tmp_path / "checkpoint.pth")
    found = initial_settings(str(path), {"patch_size"})
    assert (found["mode"], found["embed_dim"], found["pool_position"]) == ("simpool", 24, "before")
    assert not {"img_size", "patch_size"} & found.keys()
    content = read_checkpoint(path)
    content["config"] |= {"mode": "gem", "gamma": "auto", "pooling_args": {"p": 2.0, "learn": False}}
    content["teacher"] = {n: v for n, v in content["teacher"].items() if "simpool" not in n}
    save_checkpoint(content, path)
    assert read_settings(initial_settings(str(path), ())["pooling_args"]) == {"p": 2.0, "learn": False}


def test_what_the_initial_file_does_not_tell_is_asked_for(tmp_path):
    """Weights alone of an unusual width: the number of heads is nowhere."""
    path = tmp_path / "weights.pth"
    save_checkpoint({"teacher": {f"backbone.{n}": v for n, v in vit(32).state_dict().items()}}, path)
    with pytest.raises(InputError, match="--num_heads"):
        initial_settings(str(path), ())
    assert initial_settings(str(path), {"num_heads"})["embed_dim"] == 24


@pytest.mark.parametrize("flags", [[], ["--mode", "gem", "--pooling_args", "p=2", "learn=false", "--pool_depth", "1"]])
def test_the_configuration_of_a_run_can_be_given_again(tmp_path, flags):
    """config.json holds the pooling's flags, given or not, in a form that --config reads."""
    args = main_dino.parse_arguments([*VIT, "--data_path", "demo", *flags])
    saved = arguments.saved(args, main_dino.METHOD)
    (tmp_path / "config.json").write_text(json.dumps(saved))
    again = arguments.saved(main_dino.parse_arguments(["--config", str(tmp_path / "config.json")]), main_dino.METHOD)
    for key in ("mode", "pooling_args", "pool_position", "pool_depth", "use_beta", "gamma"):
        assert again[key] == saved[key], key
