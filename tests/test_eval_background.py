"""eval_background.py from the command line: heads, k-NN and probe on small variants of ImageNet-9."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import eval_background
from data.demo import PHOTOGRAPHS, read_photograph
from data.loader import normalize
from evaluation import heads
from evaluation.forms import Form
from evaluation.imagenet9 import CLASSES, nine_of_thousand
from evaluation.models import load_checkpoint_model
from runtime.checkpoint import read_checkpoint, save_checkpoint
from runtime.guards import InputError
from tests.small_images import tiny_checkpoint

NAMES = [f"{number:02d}_{word}" for number, word in enumerate(CLASSES)]


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    """Nine classes, each the patches of one photograph: original with train/ and val/, and two others."""
    root = tmp_path_factory.mktemp("in9")
    rng = np.random.default_rng(0)
    for part, count in (("original/train", 6), ("original/val", 2), ("mixed_same/val", 2), ("mixed_rand", 2)):
        for name, photograph in zip(NAMES, PHOTOGRAPHS, strict=False):
            folder = root / part / name
            folder.mkdir(parents=True)
            pixels = read_photograph(photograph)
            for i in range(count):
                y, x = (int(rng.integers(0, side - 64)) for side in pixels.shape[:2])
                Image.fromarray(pixels[y : y + 64, x : x + 64]).resize((32, 32)).save(folder / f"{i}.png")
    (root / "fg_mask").mkdir()
    return root


@pytest.fixture
def checkpoint(tmp_path):
    return tiny_checkpoint(tmp_path / "run" / "checkpoint.pth")


def with_head(checkpoint, outputs: int = 1000):
    """The checkpoint with a linear classifier beside the backbone, and that classifier."""
    content = read_checkpoint(checkpoint)
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(outputs, 24, generator=generator), torch.randn(outputs, generator=generator)
    content["teacher"] |= {"head.weight": weight, "head.bias": bias}
    save_checkpoint(content, checkpoint)
    return weight, bias


def evaluate(checkpoint, data, *flags) -> dict:
    arguments = ["--pretrained_weights", str(checkpoint), "--data_path", str(data), *map(str, flags)]
    assert eval_background.main([*arguments, "--num_workers", "0"]) == 0
    return json.loads((checkpoint.parent / "eval_background.json").read_text())


def test_the_checkpoints_own_head_answers(variants, checkpoint, capsys):
    """Top-1 is that of the head's arg-max on whole images, mapped to the nine; BG-gap is MS - MR."""
    weight, bias = with_head(checkpoint)
    found = evaluate(checkpoint, variants)
    model = load_checkpoint_model(checkpoint).model
    expected = {}
    for name, place in (("original", "original/val"), ("mixed_same", "mixed_same/val"), ("mixed_rand", "mixed_rand")):
        right = []
        for number, folder in enumerate(NAMES):
            for path in sorted((variants / place / folder).iterdir()):
                image = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None]
                with torch.no_grad():
                    answer = F.linear(model(normalize(image)), weight, bias).argmax()
                right.append(nine_of_thousand()[answer] == number)
        expected[name] = 100 * float(np.mean(right))
    results = found["results"]
    assert {name: results[name]["top1"] for name in expected} == pytest.approx(expected)
    assert results["bg_gap"] == pytest.approx(expected["mixed_same"] - expected["mixed_rand"])
    assert found["settings"]["classifier"] == "head"
    assert (found["settings"]["img_size"], found["settings"]["resize"]) == (32, 32)
    printed = capsys.readouterr().out
    assert "BG-gap" in printed
    assert "not there, and left out: mixed_next, only_fg, no_fg, only_bg_b, only_bg_t" in printed


def test_a_linear_head_of_imagenet_answers(variants, checkpoint, tmp_path):
    """--linear_weights takes eval_linear's file; one of another checkpoint, width or number of classes is refused."""
    file = tmp_path / "best.pth.tar"

    def save(outputs=1000, width=24, identity=None):
        state = {"linear.weight": torch.randn(outputs, width), "linear.bias": torch.zeros(outputs)}
        content = (
            {"state_dict": state} if identity is None else heads.head_content(state, Form(1, False), 1.0, identity)
        )
        save_checkpoint(content, file)

    save()
    assert evaluate(checkpoint, variants, "--linear_weights", file)["settings"]["outputs"] == 1000
    for settings, message in (
        ({"outputs": 10}, "a head of 10 classes"),
        ({"width": 12}, "a head on 12 features, but the model gives 24"),
        ({"identity": {"checkpoint_sha256": "0", "checkpoint_key": "teacher", "config": {}}}, "trained on other"),
    ):
        save(**settings)
        with pytest.raises(InputError, match=message):
            evaluate(checkpoint, variants, "--linear_weights", file)


@pytest.mark.parametrize("classifier", ["knn", "probe"])
def test_features_of_the_train_part_take_the_heads_place(variants, checkpoint, classifier):
    """Patches of nine photographs are told apart far better than by chance, by k-NN and by a probe."""
    found = evaluate(checkpoint, variants, "--classifier", classifier, "--nb_knn", 5)
    assert found["settings"]["classifier"] == classifier
    assert found["settings"]["train_images"] == 54
    assert found["results"]["original"]["top1"] > 40


def test_without_a_head_knn_takes_over_and_says_so(variants, checkpoint, capsys, tmp_path):
    """With the train part k-NN answers; without it, the error says what would help."""
    assert evaluate(checkpoint, variants)["settings"]["classifier"] == "knn"
    assert "no 1000-way head" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"no 1000-way head.*take --classifier knn"):
        evaluate(checkpoint, variants, "--classifier", "head")
    shutil.copytree(variants, tmp_path / "in9")
    shutil.rmtree(tmp_path / "in9" / "original" / "train")
    with pytest.raises(InputError, match=r"no 1000-way head.*original/train.*--linear_weights"):
        evaluate(checkpoint, tmp_path / "in9")
    with pytest.raises(InputError, match=r"original/train"):
        evaluate(checkpoint, tmp_path / "in9", "--classifier", "probe")


def test_a_head_of_other_classes_is_not_used(variants, checkpoint, capsys):
    """A checkpoint fine-tuned on ten classes falls back on k-NN, and the output says why."""
    with_head(checkpoint, 10)
    assert evaluate(checkpoint, variants)["settings"]["classifier"] == "knn"
    assert "head has 10 classes, not 1000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--nb_knn", "0"], "nb_knn 0"),
        (["--temperature", "nan"], "temperature nan"),
        (["--classifier", "knn", "--linear_weights", "x"], "leave one out"),
        (["--data_path", "/nowhere"], "none of ImageNet-9's folders"),
    ],
)
def test_bad_input_is_named(variants, checkpoint, flags, message):
    """One line with the value and the remedy."""
    with pytest.raises(InputError, match=message):
        evaluate(checkpoint, variants, *flags)


def test_help(capsys):
    """--help names the classifiers."""
    with pytest.raises(SystemExit) as leave:
        eval_background.main(["--help"])
    assert leave.value.code == 0
    assert "--linear_weights" in capsys.readouterr().out
