"""A pickle interpreter that can build dictionaries of tensor descriptions and nothing else.

No name in the file is ever looked up, imported or called: the few globals that a torch state dict holds are recognised
by their spelling and stand for themselves. Format: the opcode table of Python's ``pickletools``; the layout of tensors
in it: ``torch/_utils.py`` (``_rebuild_tensor_v2``) and ``torch/serialization.py`` (persistent ids).
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass
from typing import Any

from puna.errors import CheckpointError

# A pickle of the largest Llama is 0.2 MB; the limit bounds the time and memory that a hostile one can cost.
MAX_PICKLE_BYTES = 2 << 20

STORAGE_TYPES = {"torch.FloatStorage": "F32", "torch.HalfStorage": "F16", "torch.BFloat16Storage": "BF16"}
_REBUILD, _ORDERED_DICT = "torch._utils._rebuild_tensor_v2", "collections.OrderedDict"


@dataclass(frozen=True)
class Storage:
    """A run of ``count`` numbers of one type (``F32``, ``F16``, ``BF16``), stored beside the pickle under ``key``."""

    key: str
    type_name: str
    count: int


@dataclass(frozen=True)
class StoredTensor:
    """A view of a storage; ``offset`` and ``strides`` count numbers, not bytes. Always lies within its storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class _Global:
    name: str


class _Mark:
    """Where a group of stack items begins."""


def unpickle(data: bytes, source: str) -> Any:
    """Dictionaries, lists, tuples, texts, numbers and StoredTensors. Raises CheckpointError for all else."""
    if len(data) > MAX_PICKLE_BYTES:
        raise CheckpointError(
            f"{source}: the pickle has {len(data)} bytes; a weights file needs at most {MAX_PICKLE_BYTES}"
        )
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return machine.pop()
            machine.step(opcode.name, argument)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None
    except (ValueError, KeyError, IndexError, OverflowError):
        raise CheckpointError(f"{source}: the pickle is malformed; the file is damaged") from None
    raise CheckpointError(f"{source}: the pickle ends too early; the file is truncated")


class _Machine:
    """The pickle virtual machine: a stack and a memo."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def pop(self) -> Any:
        item = self.stack.pop()
        if isinstance(item, _Mark):
            raise ValueError
        return item

    def pop_to_mark(self) -> list[Any]:
        items: list[Any] = []
        while not isinstance(self.stack[-1], _Mark):
            items.append(self.stack.pop())
        self.stack.pop()
        items.reverse()
        return items

    def step(self, opcode: str, argument: Any) -> None:
        push = self.stack.append
        match opcode:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                push(_Mark())
            case "NONE":
                push(None)
            case "NEWTRUE" | "NEWFALSE":
                push(opcode == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                push(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE":
                push(argument)
            case "EMPTY_DICT":
                push({})
            case "EMPTY_LIST":
                push([])
            case "EMPTY_TUPLE":
                push(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [self.pop() for _ in range(int(opcode[-1]))]
                push(tuple(reversed(items)))
            case "TUPLE":
                push(tuple(self.pop_to_mark()))
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.top()
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.top()
            case "BINGET" | "LONG_BINGET":
                push(self.memo[argument])
            case "APPEND":
                item = self.pop()
                self.top(list).append(item)
            case "APPENDS":
                items = self.pop_to_mark()
                self.top(list).extend(items)
            case "SETITEM":
                value, key = self.pop(), self.pop()
                self.set_items([key, value])
            case "SETITEMS":
                self.set_items(self.pop_to_mark())
            case "GLOBAL":
                push(_known_global(argument.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                name, module = self.pop(), self.pop()
                if not (isinstance(name, str) and isinstance(module, str)):
                    raise ValueError
                push(_known_global(f"{module}.{name}"))
            case "REDUCE":
                arguments, function = self.pop(), self.pop()
                push(_reduce(function, arguments))
            case "BUILD":
                self.pop()  # attributes of a state dict (module versions), which weights do not need
                self.top(dict)
            case "BINPERSID":
                push(_storage(self.pop()))
            case _:
                raise CheckpointError(f"the pickle uses {opcode}, which a weights file does not need; refused")

    def top(self, kind: type = object) -> Any:
        item = self.stack[-1]
        if isinstance(item, _Mark) or not isinstance(item, kind):
            raise ValueError
        return item

    def set_items(self, items: list[Any]) -> None:
        target = self.top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Other keys could be tuples nested deep enough to exhaust the stack when hashed.
            if not isinstance(key, (str, int)):
                raise ValueError
            target[key] = value


def _known_global(name: str) -> _Global:
    if name in STORAGE_TYPES or name in (_REBUILD, _ORDERED_DICT):
        return _Global(name)
    raise CheckpointError(
        f"the pickle refers to {name[:200]!r}, which has no place in a weights file; refused, and nothing of it was run"
    )


def _reduce(function: Any, arguments: Any) -> Any:
    if not isinstance(function, _Global) or not isinstance(arguments, tuple):
        raise ValueError
    if function.name == _ORDERED_DICT and not arguments:
        return {}
    if function.name == _REBUILD and len(arguments) in (6, 7):
        return _tensor(*arguments[:4])
    raise ValueError


def _storage(identity: Any) -> Storage:
    """('storage', type, key, device, count), as torch writes it."""
    if not (isinstance(identity, tuple) and len(identity) == 5):
        raise ValueError
    tag, kind, key, _, count = identity
    if not (isinstance(tag, str) and tag == "storage" and isinstance(kind, _Global) and kind.name in STORAGE_TYPES):
        raise ValueError
    if not isinstance(key, str) or not _is_size(count):
        raise ValueError
    return Storage(key, STORAGE_TYPES[kind.name], count)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> StoredTensor:
    if not (isinstance(storage, Storage) and isinstance(shape, tuple) and isinstance(strides, tuple)):
        raise ValueError
    if not (0 < len(shape) == len(strides) <= 8 and all(map(_is_size, (offset, *shape, *strides)))):
        raise CheckpointError("a tensor has an impossible shape, stride or offset")
    numbers, last = 1, offset
    for size, stride in zip(shape, strides, strict=True):
        numbers *= size
        last += max(size - 1, 0) * stride
    # The first bound also refuses stride 0 tricks, whose copies would be larger than the file.
    if numbers > storage.count or (numbers and last >= storage.count):
        raise CheckpointError(
            f"a tensor of shape {shape}, strides {strides} and offset {offset} lies outside its storage "
            f"of {storage.count} numbers"
        )
    return StoredTensor(storage, offset, shape, strides)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62
