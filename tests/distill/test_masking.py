"""Masks from attention, in blocks, and at random: published numbers, counts, determinism, and refusals."""

from __future__ import annotations

import pytest
import torch

from distill.masking import attention_mask, block_mask, random_mask, reveal_hints
from tests.distill.attmask import attmask_golden
from tests.reference import tensor

CASES = [key.removeprefix("mask/") for key in attmask_golden() if key.startswith("mask/")]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("case", CASES)
def test_published_masks(case):
    """Masks from attention are the published ones, patch by patch, in every precision that keeps the order."""
    golden = attmask_golden()[f"mask/{case}"]
    mode = case.rpartition("_")[0]
    mask = attention_mask(golden["attention"], golden["ratio"], mode)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, golden["mask"])
    assert torch.equal(attention_mask(golden["attention"].double(), golden["ratio"], mode), golden["mask"])


@pytest.mark.parametrize("mode", ["attmask_high", "attmask_low"])
@pytest.mark.parametrize(
    ("ratio", "patches", "count"), [(0, 9, 0), (1, 9, 9), (0.29, 100, 28), (0.7, 10, 7), (0.3, 0, 0)]
)
def test_the_count_is_cut_in_float64(mode, ratio, patches, count):
    """int(r N) patches are masked; 0.29 · 100 is just below 29 in float64, and 29 in float32."""
    mask = attention_mask(tensor(1, (3, patches)).softmax(-1) if patches else torch.zeros(3, 0), ratio, mode)
    assert mask.sum(1).tolist() == [count] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["attmask_high", "attmask_low"])
def test_ties_go_to_the_lowest_index(mode, dtype):
    """Among patches attended alike the first are masked, high and low, also in half precision."""
    mask = attention_mask(torch.ones(2, 50, dtype=dtype), 0.5, mode)
    assert torch.equal(mask, (torch.arange(50) < 25).expand(2, 50))
    attention = torch.tensor([[1.0, 2.0, 1.0, 2.0, 2.0]], dtype=dtype)
    expected = {"attmask_high": [False, True, False, True, False], "attmask_low": [True, False, True, False, False]}
    assert attention_mask(attention, 0.4, mode)[0].tolist() == expected[mode]


def test_hints_come_from_the_most_attended():
    """int(s N) of the top int(show_max N) patches are uncovered, each alike often over many draws; no other changes."""
    attention = tensor(2, (2000, 40)).softmax(-1)
    mask = attention_mask(attention, 0.5, "attmask_high")
    before = mask.clone()
    hinted = reveal_hints(mask, attention, 0.08, 0.2, torch.rand(2000, 40, generator=generator(1)))
    assert torch.equal(mask, before)
    revealed = mask & ~hinted
    assert not (hinted & ~mask).any()
    assert revealed.sum(1).tolist() == [3] * 2000  # int(.08 · 40)
    top = attention_mask(attention, 0.2, "attmask_high")
    assert not (revealed & ~top).any()
    by_rank = revealed.gather(1, attention.argsort(dim=1, descending=True))[:, :8].float().mean(0)
    # 3 of 8 each; a deviation of sqrt(.375 · .625 / 2000) = .011, so .05 is more than four of them
    assert (by_rank - 3 / 8).abs().max() < 0.05


def test_the_least_noise_decides_the_hints():
    """The draw is a function of the noise alone: the patches of the top with the least are uncovered."""
    attention = torch.tensor([[5.0, 1.0, 4.0, 3.0, 2.0]])
    mask = torch.ones(1, 5, dtype=torch.bool)
    noise = torch.tensor([[0.9, 0.0, 0.1, 0.5, 0.0]])  # the two zeros lie outside the top three
    assert reveal_hints(mask, attention, 0.4, 0.6, noise)[0].tolist() == [True, True, False, False, True]


@pytest.mark.parametrize(
    ("show_ratio", "show_max", "left"), [(0.0, 0.5, 8), (0.09, 0.5, 8), (1.0, 0.5, 3), (0.6, 0.09, 8)]
)
def test_hints_without_or_beyond_what_there_is(show_ratio, show_max, left):
    """A count of 0 uncovers nothing, one above the top's size all of the top; neither is an error."""
    attention = tensor(3, (4, 10)).softmax(-1)
    mask = attention_mask(attention, 0.8, "attmask_high")
    hinted = reveal_hints(mask, attention, show_ratio, show_max, torch.rand(4, 10))
    assert hinted.sum(1).tolist() == [left] * 4


def test_an_image_without_a_mask_gets_none_from_hints():
    """Uncovering never masks: a row of False stays one."""
    hinted = reveal_hints(torch.zeros(2, 10, dtype=torch.bool), tensor(4, (2, 10)), 0.2, 0.5, torch.rand(2, 10))
    assert not hinted.any()


@pytest.mark.parametrize("grid", [(14, 14), (7, 12), (4, 4), (6, 6)])
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5])
def test_the_area_of_block_masks(grid, ratio):
    """No mask exceeds r N, most come near to it, and every patch is masked now and then."""
    draws, wanted = generator(5), ratio * grid[0] * grid[1]
    masks = torch.stack([block_mask(grid, ratio, draws) for _ in range(200)])
    assert masks.shape == (200, *grid)
    areas = masks.flatten(1).sum(1)
    assert areas.max() <= wanted
    assert areas.float().mean() > 0.8 * int(wanted)
    assert masks.any(0).all()


def test_blocks_are_blocks():
    """In a block mask a patch's right neighbour is masked far more often than in a random mask of the same ratio."""
    draws = generator(6)
    blocks = torch.stack([block_mask((14, 14), 0.3, draws) for _ in range(100)])
    both = (blocks[:, :, 1:] & blocks[:, :, :-1]).sum() / blocks[:, :, :-1].sum()
    assert both > 0.6  # .3 at random


def test_block_masks_of_no_and_every_patch():
    """A ratio of 0, or a grid too small for any block, masks nothing; a ratio of 1 ends too."""
    assert not block_mask((14, 14), 0.0).any()
    assert not block_mask((1, 1), 1.0).any()
    assert block_mask((14, 14), 1.0, generator(7)).float().mean() > 0.5


def test_random_masks_have_their_exact_count():
    """int(r N) patches, each alike often."""
    draws = generator(8)
    masks = torch.stack([random_mask(49, 0.3, draws) for _ in range(1000)])
    assert masks.sum(1).tolist() == [14] * 1000
    # 14 of 49 each; a deviation of .0143, so .07 is almost five of them
    assert (masks.float().mean(0) - 14 / 49).abs().max() < 0.07
    assert random_mask(10, 1.0).all()
    assert not random_mask(10, 0.0).any()
    assert random_mask(0, 0.5).shape == (0,)


@pytest.mark.parametrize("draw", [lambda g: block_mask((14, 14), 0.4, g), lambda g: random_mask(196, 0.4, g)])
def test_a_mask_follows_from_its_generator(draw):
    """Equal generators give equal masks, whatever the global one does; others give others."""
    first = draw(generator(9))
    torch.rand(7)
    assert torch.equal(first, draw(generator(9)))
    assert not torch.equal(first, draw(generator(10)))


ATTENTION, ALL = torch.ones(2, 4), torch.ones(2, 4, dtype=torch.bool)
REFUSED = {
    "mode": (
        lambda: attention_mask(ATTENTION, 0.5, "attmask_hihg"),
        "'attmask_hihg'.*did you mean attmask_high.*known",
    ),
    "another mode": (lambda: attention_mask(ATTENTION, 0.5, "zz"), "'zz' of masking by attention; known are"),
    "ratio": (lambda: attention_mask(ATTENTION, 1.5, "attmask_low"), r"ratio is 1.5; .*\[0, 1\]"),
    "no number": (lambda: attention_mask(ATTENTION, float("nan"), "attmask_low"), "ratio is nan"),
    "heads": (lambda: attention_mask(torch.ones(2, 3, 4), 0.5, "attmask_low"), r"\(2, 3, 4\).*average it over"),
    "show_ratio": (lambda: reveal_hints(ALL, ATTENTION, -0.1, 0.1, ATTENTION), "show_ratio is -0.1"),
    "show_max 0": (lambda: reveal_hints(ALL, ATTENTION, 0.1, 0, ATTENTION), "show_max is 0;"),
    "show_max 1": (lambda: reveal_hints(ALL, ATTENTION, 0.1, 1.0, ATTENTION), "show_max is 1.0"),
    "mask": (lambda: reveal_hints(ALL[:1], ATTENTION, 0.1, 0.1, ATTENTION), r"mask has shape \(1, 4\).*\(2, 4\)"),
    "mask's dtype": (lambda: reveal_hints(ATTENTION, ATTENTION, 0.1, 0.1, ATTENTION), "dtype torch.float32"),
    "noise": (lambda: reveal_hints(ALL, ATTENTION, 0.1, 0.1, ATTENTION[:, :3]), r"noise has shape \(2, 3\)"),
    "block ratio": (lambda: block_mask((4, 4), -1), "ratio is -1"),
    "grid": (lambda: block_mask((0, 4), 0.5), r"grid \(0, 4\)"),
    "random ratio": (lambda: random_mask(4, 2), "ratio is 2"),
    "count": (lambda: random_mask(-1, 0.5), "count is -1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_values_are_named(case):
    """What can't work is refused with its name and value."""
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()
