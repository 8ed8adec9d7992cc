"""A pickle as plain values, read by interpreting its opcodes here: nothing is imported, so nothing in it can run.

The names that a pickle asks for are looked up in one table (`_CALLS`) of what the published checkpoints hold: tensors,
parsed arguments, paths, numpy numbers, the dictionaries of the standard library. Everything else is refused by name.

What is read is bounded: bytes, opcodes, tensors, depth, and the size of the tree that the values form when it is
walked (a pickle of a kilobyte can hold a list whose walk never ends).
"""

from __future__ import annotations

import io
import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MOST_BYTES = 16 << 20
_MOST_OPCODES = 1_000_000
_MOST_TENSORS = 100_000
_MOST_VALUES = 2_000_000
_DEEPEST = 100

_STORAGES = {
    f"torch.{name}Storage": dtype
    for name, dtype in {
        "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
        "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
        "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128,
    }.items()
} | {"torch.storage.UntypedStorage": torch.uint8}  # fmt: skip
_NUMBERS = {
    "f2": "e", "f4": "f", "f8": "d", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I",
    "u8": "Q", "b1": "?",
}  # fmt: skip


class UnsafeContent(ValueError):
    """The pickle asks for code or objects. `names` are those that it asks for."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(", ".join(names))
        self.names = names


@dataclass(frozen=True)
class _Name:
    """An importable name in a pickle; as a value it is its text."""

    text: str


class _Dtype:
    """numpy's dtype of a number: its code and byte order."""

    def __init__(self, code: str) -> None:
        self.code, self.order = code, "<"


_UNKNOWN = object()  # what a refused name stands for, so that the others after it are found too
_MARK = object()


class Reader:
    """Reads pickles of one file.

    `storage(key, dtype, count)` gives the numbers of a stored tensor as a flat tensor. `budget` is the number of bytes
    that all tensors together may stand for: a view of a small storage can claim any size.
    """

    def __init__(self, storage: Callable[[str, torch.dtype, int], Tensor], budget: int) -> None:
        self._storage, self._budget = storage, budget
        self._refused: dict[str, None] = {}
        self._tensors = 0

    def read(self, stream: io.BytesIO) -> Any:
        """The value of the pickle at the stream's position, which moves behind it.

        Raises UnsafeContent, or ValueError for what is no pickle or breaks a bound.
        """
        try:
            value = self._interpret(stream)
            if not self._refused:
                _check_tree(value)
        except Exception as error:  # content of unknown origin may be wrong in any way
            if self._refused:
                raise UnsafeContent(sorted(self._refused)) from error
            if isinstance(error, ValueError) and not isinstance(error, UnicodeError):
                raise
            raise ValueError(f"it is damaged, or is no checkpoint ({type(error).__name__}: {error})") from error
        if self._refused:
            raise UnsafeContent(sorted(self._refused))
        return value

    def _interpret(self, stream: io.BytesIO) -> Any:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._namespaces: dict[int, dict] = {}
        for number, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if number > _MOST_OPCODES:
                raise ValueError(f"it holds more than {_MOST_OPCODES} values")
            name = opcode.name
            if name == "STOP":
                break
            if name in _PUSHED:
                self._stack.append(argument)
            elif name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name])
            else:
                handler = getattr(self, f"_op_{_SAME_AS.get(name, name).lower()}", None)
                if handler is None:
                    raise ValueError(f"its pickle uses {name}, which checkpoints do not")
                handler(argument)
        return self._stack.pop()

    # ---- the stack and the memo

    def _above_mark(self) -> list[Any]:
        at = len(self._stack) - 1
        while self._stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise ValueError("its pickle lacks a mark")
        items = self._stack[at + 1 :]
        del self._stack[at:]
        return items

    def _op_proto(self, _: Any) -> None:
        pass

    _op_frame = _op_proto

    def _op_pop(self, _: Any) -> None:
        self._stack.pop()

    def _op_pop_mark(self, _: Any) -> None:
        self._above_mark()

    def _op_put(self, index: int) -> None:
        self._memo[int(index)] = self._stack[-1]

    def _op_memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _op_get(self, index: int) -> None:
        self._stack.append(self._memo[int(index)])

    # ---- containers

    def _op_empty_list(self, _: Any) -> None:
        self._stack.append([])

    def _op_empty_dict(self, _: Any) -> None:
        self._stack.append({})

    def _op_list(self, _: Any) -> None:
        self._stack.append(self._above_mark())

    def _op_tuple(self, _: Any) -> None:
        self._stack.append(tuple(self._above_mark()))

    def _last_as_tuple(self, count: int) -> None:
        items = tuple(self._stack[-count:])
        del self._stack[-count:]
        self._stack.append(items)

    def _op_tuple1(self, _: Any) -> None:
        self._last_as_tuple(1)

    def _op_tuple2(self, _: Any) -> None:
        self._last_as_tuple(2)

    def _op_tuple3(self, _: Any) -> None:
        self._last_as_tuple(3)

    def _op_append(self, _: Any) -> None:
        self._extend([self._stack.pop()])

    def _op_appends(self, _: Any) -> None:
        self._extend(self._above_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if target is not _UNKNOWN:
            if type(target) is not list:
                raise ValueError(f"its pickle appends to a {type(target).__name__}")
            target.extend(map(_as_value, items))

    def _op_dict(self, _: Any) -> None:
        items = self._above_mark()
        self._stack.append({})
        self._set(items)

    def _op_setitem(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set([key, value])

    def _op_setitems(self, _: Any) -> None:
        self._set(self._above_mark())

    def _set(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if target is _UNKNOWN:
            return
        if type(target) is not dict:
            raise ValueError(f"its pickle sets keys of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_checked_key(key)] = _as_value(value)

    # ---- names and objects

    def _op_global(self, text: str) -> None:
        module, _, name = text.partition(" ")
        self._push_name(f"{module}.{name}")

    def _op_stack_global(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._push_name(f"{module}.{name}")

    def _push_name(self, name: str) -> None:
        known = name in _CALLS or name in _STORAGES or _torch_dtype(name) is not None
        if not known:
            self._refused[name[:200]] = None
        self._stack.append(_Name(name) if known else _UNKNOWN)

    def _op_reduce(self, _: Any) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        self._stack.append(self._call(function, arguments))

    _op_newobj = _op_reduce

    def _op_inst(self, text: str) -> None:
        arguments = tuple(self._above_mark())
        self._op_global(text)
        self._stack.append(self._call(self._stack.pop(), arguments))

    def _op_obj(self, _: Any) -> None:
        function, *arguments = self._above_mark()
        self._stack.append(self._call(function, tuple(arguments)))

    def _call(self, function: Any, arguments: Any) -> Any:
        if function is _UNKNOWN or arguments is _UNKNOWN or (
            isinstance(arguments, tuple) and any(argument is _UNKNOWN for argument in arguments)
        ):  # fmt: skip
            return _UNKNOWN
        name = function.text if isinstance(function, _Name) else str(function)
        if name not in _CALLS or not isinstance(arguments, tuple):
            raise ValueError(f"its pickle calls {name[:80]!r}")
        return _CALLS[name](self, *arguments)

    def _op_build(self, _: Any) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if id(target) in self._namespaces:
            if type(state) is not dict:
                raise ValueError("its arguments are no dictionary")
            target.update(state)
        elif isinstance(target, _Dtype):
            target.order = state[1]
        elif target is not _UNKNOWN and type(target) is not dict:  # a dictionary's attributes (_metadata) are dropped
            raise ValueError(f"its pickle sets attributes of a {type(target).__name__}")

    def _op_binpersid(self, _: Any) -> None:
        identity = self._stack.pop()
        kind, storage, key, _, count, *view = identity
        if storage is _UNKNOWN:
            self._stack.append(_UNKNOWN)
            return
        dtype = _STORAGES.get(storage.text) if isinstance(storage, _Name) else None
        if kind != "storage" or dtype is None or any(part is not None for part in view):
            raise ValueError("its pickle refers to data that is no tensor's")
        self._stack.append(self._storage(str(key), dtype, _whole(count)))

    # ---- what the known names make

    def _namespace(self, *_: Any, **__: Any) -> dict:
        made: dict[str, Any] = {}
        self._namespaces[id(made)] = made
        return made

    def _dictionary(self, *arguments: Any) -> dict:
        made: dict = {}
        first = [a for a in arguments if not isinstance(a, _Name)][:1]  # defaultdict's factory is dropped
        for key, value in dict(*first).items():
            made[_checked_key(key)] = value
        return made

    def _listed(self, items: Any = ()) -> list:
        return list(items)

    def _type_name(self, *_: Any) -> None:
        raise ValueError("its pickle calls a type, which checkpoints do not")

    def _path(self, *parts: str) -> str:
        return "/".join(parts)[:4096].replace("//", "/", 1)

    def _size(self, sizes: Any = ()) -> tuple[int, ...]:
        return tuple(_whole(size) for size in sizes)

    def _device(self, *parts: Any) -> str:
        return ":".join(str(part) for part in parts)[:100]

    def _encoded(self, text: str, encoding: str = "utf-8") -> bytes:
        if len(text) > 64 or encoding not in ("latin1", "utf-8"):  # a numpy number; anything longer only costs memory
            raise ValueError(f"it encodes a text of {len(text)} letters")
        return text.encode(encoding)

    def _dtype(self, code: str, *_: Any) -> _Dtype:
        if code not in _NUMBERS:
            raise ValueError(f"its numpy type {code[:80]!r} is no number's")
        return _Dtype(code)

    def _scalar(self, dtype: _Dtype, data: bytes) -> int | float | bool:
        order = ">" if dtype.order == ">" else "<"
        return struct.unpack(order + _NUMBERS[dtype.code], data)[0]

    def _parameter(self, data: Tensor, *_: Any) -> Tensor:
        if not isinstance(data, Tensor):
            raise ValueError("a parameter of it is no tensor")
        return data

    def _tensor(self, storage: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
        size, stride, offset = self._size(size), self._size(stride), _whole(offset)
        if len(size) != len(stride) or len(size) > 16:
            raise ValueError(f"a tensor of it has {len(size)} sides and {len(stride)} strides")
        count = 1
        for side in size:
            count *= side
        last = offset + sum((side - 1) * step for side, step in zip(size, stride, strict=True))
        if count and last >= storage.numel():
            raise ValueError("a tensor of it is larger than the numbers stored for it")
        self._tensors += 1
        self._budget -= count * storage.element_size()
        if self._budget < 0 or self._tensors > _MOST_TENSORS:
            raise ValueError("its tensors stand for far more numbers than the file holds")
        return storage.as_strided(size, stride, offset)

    def _untyped_tensor(
        self, storage: Tensor, offset: int, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: _Name, *_: Any
    ) -> Tensor:
        """Types without a storage of their own (8-bit floats): bytes, and the type's name."""
        return self._tensor(storage.view(_torch_dtype(dtype.text)), offset, size, stride)


_PUSHED = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (), "MARK": _MARK}
_SAME_AS = {
    "BINPUT": "PUT", "LONG_BINPUT": "PUT", "BINGET": "GET", "LONG_BINGET": "GET",
}  # fmt: skip
_CALLS: dict[str, Callable] = {
    "argparse.Namespace": Reader._namespace,
    "collections.OrderedDict": Reader._dictionary,
    "collections.defaultdict": Reader._dictionary,
    "collections.Counter": Reader._dictionary,
    "torch.Size": Reader._size,
    "torch.device": Reader._device,
    "torch._utils._rebuild_tensor": Reader._tensor,
    "torch._utils._rebuild_tensor_v2": Reader._tensor,
    "torch._utils._rebuild_tensor_v3": Reader._untyped_tensor,
    "torch._utils._rebuild_parameter": Reader._parameter,
    "_codecs.encode": Reader._encoded,
    "numpy.dtype": Reader._dtype,
    "numpy.core.multiarray.scalar": Reader._scalar,
    "numpy._core.multiarray.scalar": Reader._scalar,
    **{f"{module}.{path}": Reader._path for module in ("pathlib", "pathlib._local")
       for path in ("Path", "PosixPath", "PurePosixPath", "WindowsPath")},
    **{f"{module}.{kind}": Reader._type_name for module in ("builtins", "__builtin__")
       for kind in ("dict", "list", "int", "float", "str", "bool")},
    **{f"{module}.set": Reader._listed for module in ("builtins", "__builtin__")},
}  # fmt: skip


def _torch_dtype(name: str) -> torch.dtype | None:
    dtype = getattr(torch, name.removeprefix("torch."), None) if name.startswith("torch.") else None
    return dtype if isinstance(dtype, torch.dtype) else None


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        raise ValueError(f"it holds {str(value)[:80]!r} instead of a size")
    return value


def _checked_key(key: Any) -> Any:
    """A dictionary's key: a text, or a number small enough to be its own hash (others could be made to collide)."""
    if key is None or type(key) in (bool, float) or (type(key) is int and abs(key) < 2**60):
        return key
    if isinstance(key, str):
        return key if type(key) is str else str(key)
    raise ValueError(f"it uses a {type(key).__name__} as a key")


def _as_value(item: Any) -> Any:
    return item.text if isinstance(item, _Name) else item


def _check_tree(value: Any) -> None:
    """Walk the values as every later reader will: ValueError for cycles, great depth, and walks without end."""
    path, seen = [iter((value,))], 0
    while path:
        for value in path[-1]:
            seen += 1
            if seen > _MOST_VALUES or len(path) > _DEEPEST:
                raise ValueError("its values are nested too deeply, or without end")
            if type(value) is dict:
                path.append(iter(value.values()))
                break
            if type(value) in (list, tuple):
                path.append(iter(value))
                break
            if not (value is None or type(value) in (bool, int, float, str, bytes) or isinstance(value, Tensor)):
                raise ValueError(f"it holds a {type(value).__name__.strip('_')} instead of a value")
        else:
            path.pop()
