"""What probes see of validation images: kept up to a bound, and the same beyond it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import backbones
from data.datasets import open_images
from data.sampler import TrainSampler
from evaluation.forms import Form
from evaluation.probe_cache import CachedTokens, MemoryBudget, TrainingTokens
from evaluation.probe_families import Grid
from evaluation.probe_names import read_probes
from evaluation.probe_recipes import RECIPES
from evaluation.probes import Probes, Widths
from runtime.guards import InputError

EXTRACTION = {
    "device": torch.device("cpu"), "img_size": 32, "resize": 32, "batch_size": 16, "num_workers": 0, "amp_dtype": None,
    "dtype": torch.float32, "on_bad_image": "raise",
}  # fmt: skip
BATCH = 16 * (24 + 16 * 24) * 4  # bytes of a batch's features and tokens


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return backbones.build_backbone(
        arch="vit_small", mode="simpool", patch_size=8, img_size=32, embed_dim=24, depth=1, num_heads=2
    ).eval()


@pytest.fixture(scope="module")
def probes():
    names = read_probes(["linear", "ep:queries=8"])
    return Probes(
        names, [Form()], Widths([24], 24), 2, Grid([0.1, 1.0], [0.0], 16), RECIPES["dino"], torch.device("cpu")
    )


@pytest.mark.parametrize(("budget", "batches"), [(0, 0), (1.5 * BATCH, 1), (1 << 30, 3)])
def test_counts_do_not_depend_on_how_much_is_kept(model, probes, small, budget, batches, capsys):
    """40 images in batches of 16: none, one or all of them are kept; the numbers are equal bit for bit."""
    val = open_images(str(small), "val")
    everything = CachedTokens(model, val, probes, EXTRACTION, MemoryBudget(1.0), "validation").count(probes)
    capsys.readouterr()
    seen = CachedTokens(model, val, probes, EXTRACTION, MemoryBudget(budget / (1 << 30)), "validation")
    assert len(seen.kept) == batches
    assert sum(inputs.nbytes for inputs, _ in seen.kept) <= budget
    said = capsys.readouterr().out
    assert (f"tokens of {16 * batches} of 40 validation images" in said) == (batches < 3)
    assert torch.equal(seen.count(probes), everything)
    assert torch.equal(seen.count(probes), everything)  # once more


def test_every_image_is_counted_once(model, probes, small):
    """Hits and losses are means over the images, those of the last, shorter batch included."""
    val = open_images(str(small), "val")
    whole = CachedTokens(model, val, probes, EXTRACTION, MemoryBudget(1.0), "validation").count(probes)
    parts = [CachedTokens(model, val, probes, EXTRACTION, MemoryBudget(1.0), "part", i).count(probes) for i in
             (torch.arange(30).numpy(), torch.arange(30, 40).numpy())]  # fmt: skip
    torch.testing.assert_close(whole, (3 * parts[0] + parts[1]) / 4, rtol=1e-5, atol=1e-5)


def test_training_tokens_are_those_of_the_sampled_images(model, probes, small):
    """Each epoch's batches hold the tokens and labels of the images that the sampler names, bit for bit."""
    train, indices = open_images(str(small), "train"), np.arange(5, 96, 3)
    sampler = TrainSampler(len(indices), 8, seed=1)
    kept = TrainingTokens(model, train, probes, EXTRACTION, MemoryBudget(1.0), indices, sampler)
    (whole,) = CachedTokens(
        model, train, probes, {**EXTRACTION, "batch_size": 16}, MemoryBudget(1.0), "all", indices[:16]
    ).kept
    first = {int(image): i for i, image in enumerate(indices[:16])}
    found = 0
    for epoch in (0, 1):
        sampler.set_position(epoch)
        order = [indices[position] for pairs in sampler for _, position in pairs]
        sampler.set_position(epoch)
        batches = list(kept)
        assert len(batches) == 3
        assert torch.cat([labels for _, labels in batches]).tolist() == [train.labels[i] for i in order]
        for image, tokens in zip(order, torch.cat([inputs.patches for inputs, _ in batches]), strict=True):
            if int(image) in first:
                found += 1
                assert torch.equal(tokens, whole[0].patches[first[int(image)]])
    assert found > 16


def test_training_tokens_that_do_not_fit_are_an_error_that_says_how_much_they_take(model, probes, small):
    """The first batch tells; nothing else is computed."""
    train = open_images(str(small), "train")
    with pytest.raises(InputError, match=r"96 training images, which take 0\.00 GiB: give --token_cache 0\.5"):
        TrainingTokens(model, train, probes, EXTRACTION, MemoryBudget(5 * BATCH / (1 << 30)), np.arange(96),
                       TrainSampler(96, 8))  # fmt: skip


def test_the_second_set_has_the_room_that_the_first_left():
    """Memory is shared, and what does not fit takes none of it."""
    budget = MemoryBudget(100 / (1 << 30))
    assert budget.take(60)
    assert not budget.take(50)
    assert budget.take(40)
    assert budget.left == 0


def test_tokens_that_are_not_finite_are_an_error_before_training(model, probes, small):
    """A diverged backbone is named at once."""
    broken = backbones.build_backbone(
        arch="vit_small", mode="simpool", patch_size=8, img_size=32, embed_dim=24, depth=1, num_heads=2
    )
    torch.nn.init.constant_(broken.norm.weight, float("nan"))
    with pytest.raises(InputError, match="tokens are not finite"):
        CachedTokens(broken.eval(), open_images(str(small), "val"), probes, EXTRACTION, MemoryBudget(1.0), "validation")
