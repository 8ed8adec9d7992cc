"""What made a set of features or a linear head: everything that changes its numbers, and how two of them differ.

A probe that is resumed, a saved head and stored features all carry such a description. They are used only by a run that
would have made the same; anything else would report one model's numbers under another's name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from data.source import ImageSource
from runtime.checkpoint import finite_json
from runtime.guards import InputError
from runtime.terminal import say

EXTRACTION = ("img_size", "resize", "amp", "on_bad_image")


def of_model(loaded: Any, checkpoint_key: str) -> dict[str, Any]:
    """The checkpoint's hash, which of its networks, and the model's whole configuration (of a `LoadedModel`)."""
    return {"checkpoint_sha256": loaded.sha256, "checkpoint_key": checkpoint_key, "config": dict(loaded.config)}


def of_data(train: ImageSource, val: ImageSource) -> dict[str, Any]:
    """Fingerprints of both splits."""
    return {"train_data": train.fingerprint(), "val_data": val.fingerprint()}


def of_classes(source: ImageSource) -> str:
    """Twelve hexadecimal digits that tell this list of classes from another."""
    return hashlib.sha256("\n".join(source.classes).encode("utf-8", "surrogateescape")).hexdigest()[:12]


def differences(saved: Mapping[str, Any], mine: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """`name saved, here mine` for each of `keys` (and each entry of `config`) that does not agree.

    An entry that `saved` lacks disagrees too: an earlier version did not record it, so it cannot be checked.
    """
    found = []
    for key in keys:
        theirs, ours = saved.get(key), mine.get(key)
        if isinstance(ours, Mapping):
            theirs = theirs if isinstance(theirs, Mapping) else {}
            names = dict.fromkeys([*ours, *theirs])
            found += differences({n: theirs.get(n) for n in names}, {n: ours.get(n) for n in names}, names)
        elif key not in saved:
            found.append(f"{key} is not recorded there")
        elif _plain(theirs) != _plain(ours):
            found.append(f"{key} was {_shown(theirs)} and is {_shown(ours)} here")
    return found


def require_same(
    saved: Mapping[str, Any], mine: Mapping[str, Any], keys: Iterable[str], what: str, remedy: str
) -> None:
    """Raise InputError that names each difference."""
    found = differences(saved, mine, keys)
    if found:
        raise InputError(f"{what}: {'; '.join(found)}. {remedy}")


def recorded(saved: Mapping[str, Any], keys: Iterable[str], where: str) -> list[str]:
    """Those of `keys` that `saved` holds; says which it lacks, as files of earlier versions do."""
    keys = list(keys)
    missing = [key for key in keys if key not in saved]
    if missing:
        say(f"warning: {where} was written by an earlier version and does not record {', '.join(missing)}: not checked")
    return [key for key in keys if key in saved]


def _plain(value: Any) -> Any:
    """The value as JSON would give it back: tuples become lists."""
    return json.loads(json.dumps(finite_json(value), default=str))


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
