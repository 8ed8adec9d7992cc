"""ImageNet-9: the map from a thousand classes to nine, and the folders."""

from __future__ import annotations

import json

import pytest
import torch

from evaluation.imagenet9 import CLASSES, class_numbers, hits, nine_of_thousand, open_variants
from runtime.guards import InputError
from tests.conftest import SHARED_DATA

NAMES = [f"{number:02d}_{word}" for number, word in enumerate(CLASSES)]


def test_370_of_the_thousand_classes_belong_to_one_of_the_nine():
    """Well-known ones are where they should be: tench, ostrich, tabby, tiger, orangutan, banjo and so on."""
    table = nine_of_thousand()
    assert (table >= 0).sum() == 370
    assert table.unique().tolist() == list(range(-1, 9))
    words = list(CLASSES)
    expected = {0: "fish", 9: "bird", 281: None, 292: "carnivore", 269: "carnivore", 365: "primate", 420: "instrument",
                510: None, 207: "dog", 50: "reptile", 301: "insect", 817: "vehicle"}  # fmt: skip
    for index, word in expected.items():
        assert table[index] == (-1 if word is None else words.index(word)), index


@pytest.mark.skipif(not (SHARED_DATA / "in_to_in9.json").is_file(), reason="needs the shared data")
def test_the_map_is_the_published_one():
    """All thousand entries agree with the file that ImageNet-9 comes with."""
    published = json.loads((SHARED_DATA / "in_to_in9.json").read_text())
    assert nine_of_thousand().tolist() == [published[str(i)] for i in range(1000)]


def test_folders_are_told_by_their_words():
    """The order of the folders' names does not matter; anything but nine known ones is refused."""
    assert class_numbers(NAMES, "x").tolist() == list(range(9))
    assert class_numbers(["fish", "dog"] + [w for w in CLASSES if w not in ("fish", "dog")], "x").tolist()[:2] == [8, 0]
    assert class_numbers(["02_wheeled vehicle", "06_musical instrument", *(NAMES[i] for i in (0, 1, 3, 4, 5, 7, 8))],
                         "x").tolist()[:2] == [2, 6]  # fmt: skip
    for wrong in (NAMES[:8], [*NAMES[:8], "08_dog"], [*NAMES[:8], "table"]):
        with pytest.raises(InputError, match="ImageNet-9 has nine"):
            class_numbers(wrong, "x")


def test_classes_outside_the_nine_count_as_wrong():
    """A tench is a fish; an Egyptian cat is none of the nine, and wrong whatever the label."""
    predictions = torch.tensor([0, 285, 9, 9])
    assert hits(predictions, [8, 4, 1, 0], NAMES, "x", 1000) == 50
    assert hits(torch.tensor([8, 4]), [8, 0], NAMES, "x", 9) == 50


def test_a_folder_without_variants_is_refused(tmp_path):
    """The message lists what should be there."""
    with pytest.raises(InputError, match="original, mixed_same"):
        open_variants(tmp_path)
