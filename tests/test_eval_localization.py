"""eval_localization.py from the command line: every protocol, and what its numbers are made of."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import eval_localization
from data.boxes import open_boxes
from data.loader import normalize
from evaluation.crops import resize_bilinear
from evaluation.discovery import box_iou, corloc, dino_seg_box, lost_box
from evaluation.localization import max_box_accuracy, max_box_curve
from evaluation.models import load_checkpoint_model
from evaluation.object_maps import lost_features, padded
from evaluation.whole_images import whole_pixels
from runtime.guards import InputError
from tests.boxed_images import boxed_folder
from tests.small_images import tiny_checkpoint
from tests.test_eval_knn import run_ranks


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    return boxed_folder(tmp_path_factory.mktemp("boxed") / "VOC", count=5)


@pytest.fixture
def checkpoint(tmp_path):
    return tiny_checkpoint(tmp_path / "run" / "checkpoint.pth")


def evaluate(protocol: str, *flags) -> int:
    return eval_localization.main(["--protocol", protocol, *map(str, flags), "--num_workers", "0"])


def results_of(folder, protocol: str) -> dict:
    return json.loads((folder / f"eval_localization_{protocol}.json").read_text())


def expected_maps(checkpoint, images) -> tuple[torch.nn.Module, list]:
    """The model, and its mean map of each squashed image."""
    model = load_checkpoint_model(checkpoint).model
    with torch.no_grad():
        squashed = [resize_bilinear(whole_pixels(images.source, i), 32) for i in range(len(images))]
        return model, [model.get_attention_map(normalize(x))[0].mean(0) for x in squashed]


@pytest.mark.parametrize(("mode", "flags"), [("simpool", []), ("official", ["--multi_contour", "false"])])
def test_maxboxacc_is_that_of_the_public_functions(voc, tmp_path, capsys, mode, flags):
    """Accuracies and curves equal max_box_accuracy and max_box_curve of the model's maps of squashed images."""
    checkpoint = tiny_checkpoint(tmp_path / "run" / "checkpoint.pth", mode)
    assert evaluate("maxboxacc", "--pretrained_weights", checkpoint, "--data_path", voc, "--save_boxes", *flags) == 0
    images = open_boxes(voc)
    _, maps = expected_maps(checkpoint, images)
    arguments = (maps, images.sizes.tolist(), [images.truths(i).tolist() for i in range(len(images))], not flags)
    found = results_of(checkpoint.parent, "maxboxacc")
    results = found["results"]
    assert results["accuracy"] == {str(k): value for k, value in max_box_accuracy(*arguments).items()}
    curve = max_box_curve(*arguments)
    assert results["curve"] == {str(k): values.tolist() for k, values in curve.items()}
    assert found["model"]["checkpoint_sha256"]
    assert found["data"]["fingerprint"] == images.fingerprint()
    assert found["settings"]["head"] == "mean"
    row = int(curve[50].argmax())
    assert sum(entry["iou"] >= 0.5 for entry in results["boxes"]) == curve[50][row]
    printed = capsys.readouterr().out
    for words in ("whole image", "central box", "less than 30%"):
        assert words in printed


def test_lengths_of_features_in_place_of_attention(voc, tmp_path):
    """--map norm: MaxBoxAcc of a model without attention is that of the lengths of its last features."""
    checkpoint = tiny_checkpoint(tmp_path / "run" / "checkpoint.pth", "gap")
    flags = ["--pretrained_weights", checkpoint, "--data_path", voc]
    with pytest.raises(InputError, match="no attention map"):
        evaluate("maxboxacc", *flags)
    assert evaluate("maxboxacc", *flags, "--map", "norm") == 0
    images, model = open_boxes(voc), load_checkpoint_model(checkpoint).model
    with torch.no_grad():
        squashed = [normalize(resize_bilinear(whole_pixels(images.source, i), 32)) for i in range(len(images))]
        maps = [model.forward_dense(x)[1][0].norm(dim=1).unflatten(0, (-1, 32 // model.patch_size)) for x in squashed]
    expected = max_box_accuracy(maps, images.sizes.tolist(), [images.truths(i).tolist() for i in range(len(images))])
    written = results_of(checkpoint.parent, "maxboxacc")
    assert written["settings"]["map"] == "norm"
    assert written["results"]["accuracy"]["mean"] == expected["mean"]
    with pytest.raises(InputError, match="have no heads"):
        evaluate("maxboxacc", *flags, "--map", "norm", "--head", "0")


def test_images_of_another_size_than_in_training(voc, checkpoint):
    """--image_size: MaxBoxAcc of maps of larger squashed images; a size that the model can't take is named."""
    flags = ["--pretrained_weights", checkpoint, "--data_path", voc]
    assert evaluate("maxboxacc", *flags, "--image_size", "64") == 0
    images, model = open_boxes(voc), load_checkpoint_model(checkpoint).model
    with torch.no_grad():
        squashed = [normalize(resize_bilinear(whole_pixels(images.source, i), 64)) for i in range(len(images))]
        maps = [model.get_attention_map(x)[0].mean(0) for x in squashed]
    expected = max_box_accuracy(maps, images.sizes.tolist(), [images.truths(i).tolist() for i in range(len(images))])
    written = results_of(checkpoint.parent, "maxboxacc")
    assert (written["settings"]["img_size"], written["results"]["accuracy"]["mean"]) == (64, expected["mean"])
    with pytest.raises(InputError, match="--image_size 65"):
        evaluate("maxboxacc", *flags, "--image_size", "65")


@pytest.mark.parametrize("protocol", ["dino_seg", "lost"])
def test_corloc_is_that_of_the_public_functions(voc, checkpoint, protocol):
    """Boxes equal those of dino_seg_box and lost_box on the model's own maps and keys at the image's resolution."""
    assert evaluate(protocol, "--pretrained_weights", checkpoint, "--data_path", voc, "--save_boxes") == 0
    images = open_boxes(voc)
    model = load_checkpoint_model(checkpoint).model
    boxes = []
    for i in range(len(images)):
        pixels = whole_pixels(images.source, i)
        image = padded(normalize(pixels), 8)
        grid = (image.shape[-2] // 8, image.shape[-1] // 8)
        with torch.no_grad():
            if protocol == "lost":
                boxes.append(lost_box(lost_features(model, image, 8)[0], grid, 8, tuple(pixels.shape[-2:])))
            else:
                boxes.append(dino_seg_box(model.get_attention_map(image)[0, 0].flatten(), grid, 8))
    found = results_of(checkpoint.parent, protocol)["results"]
    assert [entry["box"] for entry in found["boxes"]] == [list(box) for box in boxes]
    truths = [images.truths(i) for i in range(len(images))]
    assert found["corloc"] == corloc(boxes, truths)
    assert found["mean_iou"] == pytest.approx(
        np.mean([float(box_iou(box, t).max()) for box, t in zip(boxes, truths, strict=True)])
    )
    assert len(found["curve"]["model"]) == 101


def test_pictures_and_curve_are_drawn(voc, checkpoint):
    """The best, the worst and random images and the curve are PNGs next to the JSON."""
    assert evaluate("dino_seg", "--pretrained_weights", checkpoint, "--data_path", voc) == 0
    for suffix in ("", "_best", "_worst", "_random"):
        with Image.open(checkpoint.parent / f"eval_localization_dino_seg{suffix}.png") as picture:
            assert picture.width > 500
            assert len(picture.convert("L").getcolors(256)) > 20


def test_larger_images_are_resized_and_boxes_scaled_back(voc, checkpoint):
    """--max_side is recorded, and boxes still are in the image's own pixels."""
    assert evaluate("dino_seg", "--pretrained_weights", checkpoint, "--data_path", voc, "--max_side", 48,
                    "--mass", 0.999, "--save_boxes") == 0  # fmt: skip
    found = results_of(checkpoint.parent, "dino_seg")
    assert found["settings"]["max_side"] == 48
    images = open_boxes(voc)
    for entry, size in zip(found["results"]["boxes"], images.sizes.tolist(), strict=True):
        scale = max(size) / 48
        assert entry["box"][2] >= size[0] - 1e-9  # nearly all patches are kept, so the box reaches the padding's end
        assert entry["box"][2] <= size[0] + 8 * scale


def test_the_summary_needs_no_boxes(checkpoint, imagenet_sample, tmp_path, capsys):
    """Means over any images, with those of a uniform map for comparison."""
    for path in sorted(imagenet_sample.iterdir())[:3]:
        shutil.copy(path, tmp_path / path.name)
    assert evaluate("summary", "--pretrained_weights", checkpoint, "--data_path", tmp_path) == 0
    results = results_of(checkpoint.parent, "summary")["results"]
    assert results["images"] == 3
    for name in ("entropy", "central", "largest"):
        assert 0 <= results[name]["mean"] <= 1
    assert "uniform map" in capsys.readouterr().out


@pytest.mark.parametrize("protocol", ["maxboxacc", "dino_seg", "summary"])
def test_broken_maps_count_as_zeros_and_are_reported(voc, checkpoint, protocol, monkeypatch, capsys):
    """A map with a value that is not finite costs its image, and the output says how many there were."""
    calls = []

    def spoiled(model, x, original=eval_localization.load):
        loaded = original(model)
        plain = loaded.model.get_attention_map

        def get(images):
            maps = plain(images)
            calls.append(len(maps))
            if len(calls) > 1:  # the first is the look at the number of heads
                maps[0, 0, 0, 0] = float("nan")
            return maps

        loaded.model.get_attention_map = get
        return loaded

    monkeypatch.setattr(eval_localization, "load", lambda args: spoiled(args, None))
    data = voc / "JPEGImages" if protocol == "summary" else voc
    flags = ("--pretrained_weights", checkpoint, "--data_path", data, "--batch_size_per_gpu", 2)
    assert evaluate(protocol, *flags) == 0
    count = 5 if protocol == "dino_seg" else 3  # of three batches of at most 2 images
    assert results_of(checkpoint.parent, protocol)["results"]["not_finite"] == count
    assert f"warning: {count} of 5 maps" in capsys.readouterr().out


@pytest.mark.parametrize("protocol", ["maxboxacc", pytest.param("lost", marks=pytest.mark.full)])
def test_two_processes_find_what_one_finds(voc, checkpoint, tmp_path, protocol):
    """Each image is evaluated once, by one rank; results and boxes are those of one process."""
    flags = ("--protocol", protocol, "--pretrained_weights", checkpoint, "--data_path", voc, "--save_boxes")
    eval_localization.main([*map(str, flags), "--num_workers", "0", "--output_dir", str(tmp_path / "one")])
    run_ranks("eval_localization.py", *flags, "--output_dir", tmp_path / "two", "--num_workers", 0)
    one, two = (results_of(tmp_path / name, protocol) for name in ("one", "two"))
    assert one["results"] == two["results"]
    assert one["data"] == two["data"]


def test_workers_find_what_the_program_alone_finds(voc, checkpoint, tmp_path):
    """Boxes searched in other processes are the same."""
    flags = ["--protocol", "maxboxacc", "--pretrained_weights", str(checkpoint), "--data_path", str(voc)]
    for workers in ("0", "2"):
        eval_localization.main([*flags, "--num_workers", workers, "--output_dir", str(tmp_path / workers)])
    one, two = (results_of(tmp_path / workers, "maxboxacc")["results"] for workers in ("0", "2"))
    assert one == two


def test_lost_works_without_a_map(voc, tmp_path):
    """A ResNet pooled by averaging has no map, and LOST takes its last one, dilated."""
    assert evaluate("lost", "--arch", "resnet18", "--img_size", 64, "--data_path", voc, "--output_dir", tmp_path) == 0
    for protocol in ("maxboxacc", "dino_seg"):
        with pytest.raises(InputError, match=r"no attention map; build it with mode=.simpool"):
            evaluate(protocol, "--arch", "resnet18", "--img_size", 64, "--data_path", voc, "--output_dir", tmp_path)


@pytest.mark.parametrize(
    ("protocol", "flags", "message"),
    [
        ("maxboxacc", ["--head", "2"], "--head 2: the model has one head"),
        ("maxboxacc", ["--head", "-1"], "--head -1"),
        ("dino_seg", ["--mass", "1"], "--mass 1"),
        ("dino_seg", ["--mass", "nan"], "--mass nan"),
        ("lost", ["--max_side", "-5"], "--max_side -5"),
        ("lost", ["--max_side", "1000000"], "--max_side 1000000"),
        ("lost", ["--head", "0"], "--head is for --protocol maxboxacc, dino_seg, summary, not lost"),
        ("maxboxacc", ["--published_components"], "--published_components is for --protocol dino_seg"),
        ("lost", ["--annotations", "/nowhere.json"], "--annotations /nowhere.json"),
        ("maxboxacc", ["--img_size", "30"], "img_size 30 but the checkpoint says 32"),
    ],
)
def test_bad_input_is_one_line_with_the_value(voc, checkpoint, protocol, flags, message):
    """Flags out of range, of another protocol, or against the checkpoint are named."""
    with pytest.raises(InputError, match=message) as error:
        evaluate(protocol, "--pretrained_weights", checkpoint, "--data_path", voc, *flags)
    assert "\n" not in str(error.value)


def test_help_lists_the_flags(capsys):
    """--help names every protocol and the flags of the boxes."""
    with pytest.raises(SystemExit) as leave:
        eval_localization.main(["--help"])
    assert leave.value.code == 0
    printed = capsys.readouterr().out
    for word in ("maxboxacc", "dino_seg", "lost", "summary", "--annotations", "--save_boxes", "--max_side"):
        assert word in printed
