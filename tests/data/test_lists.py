"""Lists of images: what is odd in them is named with its line."""

import numpy as np
import pytest
from PIL import Image

from data.datasets import check_same_classes, open_images
from data.lists import read_rows
from data.source import labels_from_words
from runtime.guards import InputError


@pytest.fixture
def write(tmp_path):
    """Write a list beside 0.png .. 5.png; returns its path."""
    for i in range(6):
        Image.fromarray(np.full((8, 8, 3), 9 * i, np.uint8)).save(tmp_path / f"{i}.png")

    def write(name, text):
        (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
        return tmp_path / name

    return write


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.csv", "path,label,split\n0.png,a,train\n1.png,a\n", r"l\.csv, line 3: 2 columns, too few"),
        ("l.csv", "label,path\na,0.png\nb\n", r"l\.csv, line 3: 1 columns"),
        ("l.csv", '0.png,a\n"1.png,a\n2.png,b\n', r"l\.csv, line 3: .*stray quotation mark"),
        ("l.csv", '0.png,a\n"1.png,a\n2.png,b\n3.png,"b\n', r"line 4: .*stray quotation mark"),
        ("l.csv", '0.png,"a"b\n', r"line 1: .*stray quotation mark"),
        ("l.csv", "0.png,a\n1.png,\n", r"none for 1\.png: label all lines or none"),
        ("l.txt", b"0.png a\n\0\0 a\n", r"1 of the 2 images .* do not exist"),
        ("l.csv", "x" * 200_000 + ",a\n", r"line 1: field larger than"),
        ("l.txt", b"\xff\xfe0\0.\0p\0n\0g\0", r"do not exist"),
    ],
)
def test_an_odd_line_is_named(write, name, text, message):
    """Rows too short, stray quotes (also two that swallow the lines between), half labels, binary files."""
    with pytest.raises(InputError, match=message) as caught:
        open_images(write(name, text))
    assert "\n" not in str(caught.value)


def test_quotes_that_belong_there_are_read(write):
    """A quoted cell may hold the delimiter and doubled quotes."""
    rows = read_rows(write("l.csv", '"0.png","a, ""b"""\n1.png,c\n'), "train")
    assert rows == [("0.png", 'a, "b"'), ("1.png", "c")]


def test_a_list_that_cannot_be_read_is_an_input_error(write, monkeypatch):
    """A permission, or a disk that fails."""
    file = write("l.txt", "0.png\n")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(InputError, match=r"l\.txt can't be read: Permission denied"):
        read_rows(file, "train")


def test_labels_of_many_digits_are_names():
    """Twenty digits do not fit into 64 bits, and are no class numbers anyway."""
    labels, classes = labels_from_words(["12345678901234567890", "9" * 5000, "12345678901234567890"])
    assert labels.tolist() == [0, 1, 0]
    assert classes == ["12345678901234567890", "9" * 5000]


def test_labels_that_start_at_one_are_refused_with_advice(write):
    """Evaluation would find class 0 without an image: the message tells to subtract 1."""
    train = open_images(write("train.txt", "0.png 1\n1.png 2\n2.png 3\n"))
    with pytest.raises(InputError, match=r"run from 1 to 3, but class numbers start at 0: subtract 1"):
        check_same_classes(train, train)
    gap = open_images(write("gap.txt", "0.png 1\n1.png 3\n"))
    check_same_classes(gap, gap)  # a subset of some numbering that does start at 0


def test_val_may_lack_the_highest_class_numbers(write):
    """Numbers mean the same in both lists; val with a class that train lacks is still refused, and so are names."""
    train = open_images(write("train.txt", "0.png 0\n1.png 1\n2.png 2\n"))
    val = open_images(write("val.txt", "3.png 0\n4.png 1\n"), "val")
    check_same_classes(train, val)
    with pytest.raises(InputError, match="they differ"):
        check_same_classes(val, train)
    names = [open_images(write(f"{n}.txt", text)) for n, text in (("p", "0.png a\n1.png b\n"), ("q", "0.png a\n"))]
    with pytest.raises(InputError, match="they differ"):
        check_same_classes(*names)


def test_a_list_with_missing_files_can_be_opened_for_checking(write):
    """check=False: the missing file is a bad image, and the others are there."""
    source = open_images(write("l.txt", "0.png\ngone.png\n2.png\n"), check=False)
    assert len(source) == 3
    assert source.load(2).shape == (8, 8, 3)
