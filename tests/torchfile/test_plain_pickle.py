"""Pickles are interpreted without running them, and within bounds."""

from __future__ import annotations

import collections
import io
import pickle
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from torchfile.plain_pickle import Reader, UnsafeContent


def no_storage(key: str, dtype: torch.dtype, count: int) -> torch.Tensor:
    return torch.arange(count, dtype=dtype)


def read(data: bytes, budget: int = 1 << 20):
    return Reader(no_storage, budget).read(io.BytesIO(data))


VALUES = {
    "a": [1, -5, 2**40, 2.5, None, True, "ä\U0001f600", b"x"], "b": {"c": (1, (2, 3), 4, 5, ())}, 7: {}, "s": [[]],
    "lr": np.float64(0.5), "n": np.int32(-3), "flag": np.bool_(True),
}  # fmt: skip


@pytest.mark.parametrize("protocol", range(6))
def test_values_of_every_protocol(protocol):
    """Numbers, texts, containers and numpy's numbers are read as pickle itself reads them, of Python's own types."""
    found = read(pickle.dumps(VALUES, protocol))
    assert found == VALUES
    assert type(found["lr"]) is float
    assert type(found["n"]) is int


def test_dictionaries_of_the_standard_library_become_plain():
    """OrderedDict, defaultdict and Counter, as optimizers and schedules hold them."""
    value = [collections.OrderedDict(a=1), collections.defaultdict(list, b=[2]), collections.Counter("aab")]
    found = read(pickle.dumps(value, 2))
    assert found == [{"a": 1}, {"b": [2]}, {"a": 2, "b": 1}]
    assert {type(item) for item in found} == {dict}


class Evil:
    def __init__(self, call: tuple) -> None:
        self.call = call

    def __reduce__(self):
        return self.call


def test_every_unknown_name_is_listed():
    """The refusal names all that the pickle asks for, not the first only."""
    data = pickle.dumps([Evil((eval, ("1",))), {"x": Evil((subprocess.check_call, (["true"],)))}])
    with pytest.raises(UnsafeContent) as refusal:
        read(data)
    assert refusal.value.names == ["builtins.eval", "subprocess.check_call"]


AMPLIFIERS = {
    "encode": b"\x80\x02c_codecs\nencode\nX" + (10**6).to_bytes(4, "little") + b"x" * 10**6
    + b"X\x06\0\0\0latin1\x86R.",
    "bytearray": b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
    "torch.Tensor": b"\x80\x02ctorch\nTensor\nM\xff\xffM\xff\xff\x86R.",
    "memo": b"\x80\x02]r\xff\xff\xff\x7f.",
    "dictionaries": b"\x80\x02" + b"}" * 1_500_000 + b".",
    "long text": b"\x80\x02X\xff\xff\xff\xffx.",
    "doubling": b"\x80\x02]q\0" + b"".join(b"]q" + bytes([i]) + b"(h" + bytes([i - 1]) * 1 + b"h" + bytes([i - 1])
                                           + b"e" for i in range(1, 60)) + b".",
    "cycle": b"\x80\x02]q\0h\0a.",
    "wide cycle": b"\x80\x02]q\0(" + b"h\0" * 1000 + b"K\x01" * 300_000 + b"e.",
    "deep": b"\x80\x02" + b"]" * 3000 + b"a" * 2999 + b".",
    "unhashable": b"\x80\x02}](K\x01es.",
}  # fmt: skip


@pytest.mark.parametrize("kind", AMPLIFIERS)
def test_small_pickles_stay_small(kind):
    """Content that would grow, or never end, is refused at once, with little memory."""
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    if kind == "memo":  # a memo of a number, not of a size: harmless here, gigabytes in pickle's own reader
        assert read(AMPLIFIERS[kind]) == []
    else:
        with pytest.raises(ValueError):  # noqa: PT011  the type is the contract
            read(AMPLIFIERS[kind])
    assert time.process_time() - begin < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


def tensor_pickle(count: int, size: tuple[int, ...], stride: tuple[int, ...], times: int = 1) -> bytes:
    """A list of `times` tensors over one storage, as torch.save writes each."""

    class Tensors(pickle._Pickler):
        def persistent_id(self, value):
            return value[1:] if isinstance(value, tuple) and value[:1] == ("persistent",) else None

    class View:
        def __reduce__(self):
            storage = ("persistent", "storage", torch.FloatStorage, "0", "cpu", count)
            return torch._utils._rebuild_tensor_v2, (storage, 0, size, stride, False, collections.OrderedDict())

    stream = io.BytesIO()
    Tensors(stream, 2).dump([View() for _ in range(times)])
    return stream.getvalue()


def test_tensors_are_views_of_what_is_stored():
    """Shape, stride and values."""
    (found,) = read(tensor_pickle(6, (2, 3), (1, 2)))
    assert found.tolist() == [[0, 2, 4], [1, 3, 5]]


@pytest.mark.parametrize(
    ("count", "size", "stride", "times"),
    [(6, (3, 3), (3, 1), 1), (1, (10**6,), (0,), 1), (1000, (1000,), (1,), 1000), (6, (2, 3), (1,), 1),
     (6, (-1, 3), (3, 1), 1), (1, (2**40, 2**40), (0, 0), 1)],
    ids=["too large", "expanded", "shared", "strides", "negative", "overflow"],
)  # fmt: skip
def test_tensors_that_claim_more_than_is_stored(count, size, stride, times):
    """One number can stand for any shape, and one storage for any number of tensors: both are bounded."""
    with pytest.raises(ValueError, match=r"tensor|instead of a size"):
        read(tensor_pickle(count, size, stride, times), budget=1 << 20)


def test_time_is_linear():
    """Four times the content takes about four times as long; a quadratic reader would need sixteen."""

    def seconds(count: int) -> float:
        data = pickle.dumps([{"key": i} for i in range(count)], 2)
        times = []
        for _ in range(3):
            begin = time.process_time()
            read(data)
            times.append(time.process_time() - begin)
        return min(times)

    assert seconds(20_000) < 10 * seconds(5_000)


def test_nothing_is_imported(tmp_path):
    """A pickle that names a module does not import it."""
    (tmp_path / "trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')")
    sys.path.insert(0, str(tmp_path))
    try:
        with pytest.raises(UnsafeContent, match=r"trap\.x"):
            read(b"\x80\x02ctrap\nx\n.")
    finally:
        sys.path.remove(str(tmp_path))
    assert not Path(tmp_path / "sprung").exists()
