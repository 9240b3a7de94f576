"""Pickles of torch, read and never run.

A pickle is a program for a small stack machine, and pickle's own machine imports and calls what the
program names. This one has only the instructions that a dictionary of tensors needs, and a closed
list of names that stand for tensors and types here. Nothing is imported, and nothing is called.
"""

import math
import pickletools
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from moe_peft.weights import leaves

_KINDS = {"Half": "float16", "Float": "float32", "Double": "float64", "Bool": "bool"}
_KINDS |= {"Char": "int8", "Short": "int16", "Int": "int32", "Long": "int64", "Byte": "uint8"}
_STORAGES = {f"torch {theirs}Storage": np.dtype(ours) for theirs, ours in _KINDS.items()}
_STORAGES |= {"torch BFloat16Storage": leaves.BFLOAT16}
_STORAGES |= {"torch.storage UntypedStorage": np.dtype("uint8")}  # its tensors say their dtype
_DTYPES = {f"torch uint{bits}": np.dtype(f"uint{bits}") for bits in (16, 32, 64)}
_CALLS = {"collections OrderedDict", "torch._utils _rebuild_parameter"}
_CALLS |= {f"torch._utils _rebuild_tensor_v{version}" for version in (2, 3)}

# Opcodes that put what they carry on the stack, or something fresh;
_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}
_FRESH = {"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": bool}
_FRESH |= {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}
# that take so many values from it, None for all since the last mark; and that remember one.
_TAKING = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "TUPLE": None, "BINPERSID": 1, "REDUCE": 2}
_TAKING |= {"APPEND": 1, "APPENDS": None, "SETITEM": 2, "SETITEMS": None, "BUILD": 1}
_TAKING |= {"STACK_GLOBAL": 2}
_PUT, _GET = {"BINPUT", "LONG_BINPUT", "MEMOIZE"}, {"BINGET", "LONG_BINGET"}

_MAX_AXES, _MAX_SIZE, _MAX_KEY = 32, 2**62, 500  # the size in bytes, the key in characters


class Storage(NamedTuple):
    """Values in the file, which several tensors may share."""

    key: str
    dtype: np.dtype
    nbytes: int


class Tensor(NamedTuple):
    """A view of a storage, inside of it and with no more values than it has."""

    storage: Storage
    dtype: np.dtype
    offset: int  # values before the first
    span: int  # values from the first to the last, both included
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in values


class _Name(NamedTuple):
    text: str  # module and name, with a space in between


def load(file: BinaryIO) -> tuple[Any, dict[str, Storage]]:
    """Reads one pickle; returns what it describes, and the storages that it names, by key.

    Raises ValueError or LookupError if it is damaged, or needs more than tensors do. Memory and
    time are a small multiple of its length.
    """
    stack, below, memo, storages = [], [], {}, {}
    for known, argument, _ in pickletools.genops(file):
        opcode = known.name
        if (count := _TAKING.get(opcode, 0)) is None:
            taken, stack = stack, below.pop()
        else:
            taken = [stack.pop() for _ in range(count)][::-1]
        if opcode in _VALUES:
            stack.append(argument)
        elif opcode in _FRESH:
            stack.append(_FRESH[opcode]())
        elif opcode == "MARK":
            below.append(stack)
            stack = []
        elif opcode.startswith("TUPLE"):
            stack.append(tuple(taken))
        elif opcode in ("GLOBAL", "STACK_GLOBAL"):
            stack.append(_name(argument or " ".join(map(_text, taken))))
        elif opcode == "REDUCE":
            stack.append(_called(*taken))
        elif opcode == "BINPERSID":
            stack.append(_storage(*taken, storages))
        elif opcode.startswith("APPEND") and type(stack[-1]) is list:
            stack[-1].extend(taken)
        elif opcode.startswith("SETITEM") and type(stack[-1]) is dict:
            for key, value in zip(taken[::2], taken[1::2], strict=True):
                # States of optimisers, next to which a state dict may lie, have numbers for keys.
                if (key if type(key) is int else _text(key)) in stack[-1]:
                    raise ValueError(f"{key} is there twice")
                stack[-1][key] = value
        elif opcode == "BUILD" and type(stack[-1]) is type(taken[0]) is dict:
            if taken[0].keys() != {"_metadata"}:  # versions of modules, which change no tensor
                raise ValueError("its pickle has BUILD for more than a state dict's _metadata")
        elif opcode in _PUT:
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif opcode in _GET and argument in memo:
            stack.append(memo[argument])
        elif opcode in _GET:
            raise ValueError(f"its pickle takes value {argument} before it is there")
        elif opcode not in ("PROTO", "FRAME", "STOP"):
            raise ValueError(f"its pickle has the opcode {opcode}, which no tensor needs")
    if below or len(stack) != 1:
        raise ValueError("its pickle stops in the middle")
    return stack[0], storages


def _name(text: str) -> _Name:
    if text in _STORAGES or text in _DTYPES or text in _CALLS:
        return _Name(text)
    shown = repr(text[:100].replace(" ", "."))
    raise ValueError(f"its pickle asks for {shown}, which no tensor needs; nothing was run")


def _storage(described: Any, storages: dict[str, Storage]) -> Storage:
    # Only plain tuples: those with names are ours. Serial files have a None at the end.
    match described if type(described) is tuple else None:
        case ("storage", _Name(kind), key, _, size) | ("storage", _Name(kind), key, _, size, None):
            (size,), dtype = _counts((size,)), _STORAGES[kind]
            found = Storage(_text(key), dtype, size * dtype.itemsize)
            if storages.setdefault(key, found) == found:
                return found
            raise ValueError(f"the storage {key} has two types or sizes")
    raise ValueError("its pickle has a persistent id that is not that of a whole storage")


def _called(function: Any, arguments: Any) -> Any:
    """Returns what stands for the result of a call of torch's; nothing is called."""
    match function, arguments if type(arguments) is tuple else None:
        case _Name("collections OrderedDict"), ():
            return {}
        case _Name("torch._utils _rebuild_parameter"), (Tensor() as tensor, _, _):
            return tensor
        case _Name("torch._utils _rebuild_tensor_v2"), (Storage() as storage, *view):
            return _tensor(storage, storage.dtype, view)
        case _Name("torch._utils _rebuild_tensor_v3"), (Storage() as storage, *view):
            dtype = view.pop(5) if len(view) > 5 else None
            return _tensor(storage, _DTYPES.get(getattr(dtype, "text", "")), view)
    raise ValueError(f"its pickle calls {getattr(function, 'text', 'no function')} for no tensor")


def _tensor(storage: Storage, dtype: np.dtype | None, view: list[Any]) -> Tensor:
    # The last ones: hooks, and settings such as a conjugate that is still to be taken.
    is_plain = len(view) in (5, 6) and all(one is None or one == {} for one in view[4:])
    if dtype is None or not is_plain:
        raise ValueError("a tensor has no known dtype, or hooks or settings of its own")
    (offset,), shape, strides = _counts((view[0],)), _counts(view[1]), _counts(view[2])
    if len(shape) != len(strides) or math.prod(n or 1 for n in shape) > _MAX_SIZE // dtype.itemsize:
        raise ValueError("a tensor has not one stride for each axis, or is larger than any file")
    strides = tuple(step if n > 1 else 0 for n, step in zip(shape, strides, strict=True))
    size, last = math.prod(shape), sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    span, there = last + 1 if size else 0, storage.nbytes // dtype.itemsize
    if size and max(size, offset + span) > there:
        ends = f"{size} values, the last one number {offset + span}"
        raise ValueError(f"a tensor has {ends}, but its storage {storage.key} has {there}")
    return Tensor(storage, dtype, offset, span, shape, strides)


def _text(key: Any) -> str:
    # Keys end in messages of one line.
    if not isinstance(key, str) or len(key) > _MAX_KEY or not key.isprintable():
        raise ValueError(f"a key or a name is no printable text of at most {_MAX_KEY} characters")
    return key


def _counts(values: Any) -> tuple[int, ...]:
    is_short = type(values) is tuple and len(values) <= _MAX_AXES
    if not is_short or not all(type(n) is int and 0 <= n < _MAX_SIZE for n in values):
        raise ValueError("a size, an offset or a stride is negative, too large or not a number")
    return values
