"""From a name and settings to an operator, and what is refused on the way."""

import re
from pathlib import Path

import pytest

from poolings.choose import POOLINGS, build_pooling, settings_of
from tests.poolings.operators import published_names


def test_names():
    """The fifteen operators; every published number has one of them."""
    assert list(POOLINGS) == [
        "gap", "max", "avgmax", "gem", "lse", "how", "otk", "kmeans", "slot", "se", "cbam", "ge", "cls", "cait",
        "simpool",
    ]  # fmt: skip
    theirs = {"avg", "learnlse", "vit"}
    assert published_names() == (set(POOLINGS) - {"gap", "cls", "kmeans"}) | theirs


@pytest.mark.parametrize("name", list(POOLINGS))
def test_each_name_builds_its_class(name):
    """POOLINGS[name] is the class of what is built, and knows its name."""
    pool = build_pooling(name, 16)
    assert type(pool) is POOLINGS[name]
    assert pool.name == name


def test_defaults():
    """The settings that each operator has, and their defaults."""
    assert {name: settings_of(name) for name in POOLINGS if settings_of(name)} == {
        "gem": {"p": 3.0, "learn": True, "reduce": "mean", "eps": 1e-6},
        "lse": {"r": 10.0, "learn": True},
        "how": {"width": 512},
        "otk": {"eps": 25.0},
        "kmeans": {"k": 3, "iterations": 3, "seed": 0},
        "slot": {"slots": 3, "iterations": 3, "eval_noise": False, "eval_seed": None},
        "se": {"reduction": 16},
        "cbam": {"reduction": 16, "flatten": False, "map_size": None},
        "ge": {"extent": 2, "reduction": 16},
        "cls": {"heads": 4},
        "cait": {"heads": 4},
        "simpool": {"gamma": None, "use_beta": False, "value_min": "image"},
    }


def test_the_document_lists_them():
    """docs/poolings.md has a row for each operator in this order, with its settings and defaults as they are."""
    document = (Path(__file__).resolve().parents[2] / "docs" / "poolings.md").read_text()
    found = {}
    for name, settings in re.findall(r"^\| `(\w+)` \| [^|]* \| (?:`(.*?)`)? *\|", document, re.MULTILINE):
        found[name] = eval(f"dict({settings})")
    assert list(found) == list(POOLINGS)
    assert found == {name: settings_of(name) for name in POOLINGS}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("simpol", "did you mean simpool"),
        ("avgmx", "did you mean avgmax"),
        ("zzz", "known are gap, max, avgmax.*simpool"),
        ("avg", "is called gap here"),
        ("vit", "is called cls here"),
        ("learnlse", "is called lse here"),
    ],
)
def test_unknown_names(name, message):
    """An unknown name is answered with near ones and all known ones, a published one with ours."""
    with pytest.raises(ValueError, match=f"unknown pooling '{name}'.*{message}"):
        build_pooling(name, 16)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("kmeans", {"iteration": 2}, "no setting 'iteration' .did you mean iterations.*k, iterations, seed"),
        ("gap", {"p": 2}, "gap has no setting 'p'; it has none"),
        ("gap", {"gamma": 2.0}, "gap has no gamma, got 2.0; only simpool has one"),
        ("kmeans", {"k": 0}, "kmeans: k must be an integer of at least 1, got 0"),
        ("kmeans", {"k": 2.0}, "k must be an integer"),
        ("kmeans", {"k": True}, "k must be an integer"),
        ("kmeans", {"iterations": 0}, "iterations .* got 0"),
        ("kmeans", {"seed": -1}, "seed .* got -1"),
        ("gem", {"p": 0}, "gem: p must be a positive number, got 0"),
        ("gem", {"p": -1.0}, "got -1.0"),
        ("gem", {"p": float("nan")}, "got nan"),
        ("gem", {"p": "3"}, "got '3'"),
        ("gem", {"reduce": "max"}, 'reduce must be "mean" or "sum", got \'max\''),
        ("gem", {"learn": "false"}, "learn must be True or False, got 'false'"),
        ("gem", {"eps": 0}, "eps must be a positive number, got 0"),
        ("gem", {"eps": None}, "eps None needs an even exponent"),
        ("gem", {"eps": None, "learn": False, "p": 3}, "even exponent with learn=False, got p=3"),
        ("lse", {"r": 0}, "lse: r must be a positive number, got 0"),
        ("how", {"width": 0}, "how: width .* got 0"),
        ("otk", {"eps": 0}, "otk: eps must be a positive number, got 0"),
        ("slot", {"slots": 0}, "slot: slots .* got 0"),
        ("slot", {"eval_noise": True, "eval_seed": 0}, "choose one"),
        ("se", {"reduction": 0}, "se: reduction must be an integer of at least 1, got 0"),
        ("cbam", {"reduction": 0}, "cbam: reduction .* got 0"),
        ("cbam", {"map_size": (0, 7)}, "cbam: map_size .* got 0"),
        ("cbam", {"map_size": 7}, "cbam: map_size must be .rows, columns. or None, got 7"),
        ("ge", {"reduction": 0}, "ge: reduction .* got 0"),
        ("ge", {"extent": 3}, "ge: extent must be a power of two, got 3"),
        ("ge", {"extent": 1}, "ge: extent must be an integer of at least 2, got 1"),
        ("cls", {"heads": 3}, "cls: width 16 is not divisible into 3 heads"),
        ("cait", {"heads": 5}, "cait: width 16 is not divisible into 5 heads"),
        ("cait", {"heads": 0}, "cait: heads .* got 0"),
        ("simpool", {"gamma": 0.0}, "simpool: gamma must be a positive number, got 0.0"),
        ("simpool", {"gamma": "auto"}, "simpool: gamma must be a positive number, got 'auto'"),
        ("simpool", {"value_min": "all"}, "value_min must be"),
    ],
)
def test_settings_that_cannot_work(name, settings, message):
    """Each is refused when the operator is built, by name and value."""
    with pytest.raises(ValueError, match=message):
        build_pooling(name, 16, **settings)


@pytest.mark.parametrize("name", list(POOLINGS))
def test_a_width_that_cannot_be(name):
    """dim 0 is refused by name and value."""
    with pytest.raises(ValueError, match=f"^{name}: dim must be an integer of at least 1, got 0"):
        build_pooling(name, 0)
