"""An interpreter of pickles that runs nothing: opcodes in, a tree of plain values and inert nodes out.

A pickle is a program for a small stack machine. Two of its instructions are dangerous, "import this" and "call this";
here the first pushes a ``Global``, a name, and the second an ``Instance``, a note of what would have been called. The
few calls that only build values (``OrderedDict()``, ``torch.Size``, a tensor) are recognized by name in ``rebuild``.

Protocols 2 to 5, and of their instructions those that pickling plain data, torch, DeepSpeed, DCP and numpy use. Not
here: protocol 0 and 1, old-style instances, extension codes, out-of-band buffers. Source: CPython 3.11, Lib/pickle.py,
Lib/pickletools.py.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeGuard

from ...errors import FormatError, UnsupportedError
from .nodes import Global, Instance, Size, TorchStorage, Tree
from .tree_checks import check_tree

__all__ = ["MAX_PICKLE_NBYTES", "TRUNCATED", "Builder", "interpret"]

MAX_PICKLE_NBYTES = 64 * 2**20
TRUNCATED = "pickle-truncated"
"""Kind of the error for a pickle that goes on after the bytes there are."""

# What objects may take while the pickle is read, roughly: so much in any file, and the more, the more was read. One
# byte can ask for a set of nothing, 216 bytes; DCP's ``.metadata``, the largest pickles there are, make objects of 23
# bytes out of each of theirs, at any number of ranks. Instructions need no limit of their own: each is a byte or more,
# and its time and what is not counted here (numbers, texts) are in proportion to its bytes.
_FREE_OBJECT_NBYTES = 64 * 2**20
_OBJECT_NBYTES_PER_BYTE = 32
_MAX_NAME_LENGTH = 1024
# numpy's generators have 128 bits, torch's magic number 80. Beyond 64 bits a number is no key: all multiples of
# 2^61 - 1 have the same hash, and a dict of a million of them would take days.
_MAX_INT_NBYTES = 128
_MAX_KEY_BITS = 64
# Tuples as keys could be made to collide, too; no known format has any but a handful.
_MAX_TUPLE_KEYS = 4096
_MAX_TUPLE_KEY_LENGTH = 16
_ATOMS = frozenset({type(None), bool, float, str, bytes})


class Builder(Protocol):
    """What names, calls and persistent ids stand for."""

    def check_global(self, found: Global) -> None:
        """Refuse names that no checkpoint has."""

    def call(self, function: Global, arguments: tuple[Tree, ...]) -> Tree:
        """The value of a call, or an ``Instance`` that notes it."""

    def persistent(self, identifier: Tree) -> TorchStorage:
        """The object outside the pickle with this id."""


def interpret(
    data: bytes, builder: Builder, *, path: Path | None, start: int = 0, must_end: bool = True
) -> tuple[Tree, int]:
    """Build the tree a pickle describes.

    Args:
        data: Holds the pickle.
        builder: Makes of calls and persistent ids what can be made.
        path: The file, for the error.
        start: Where the pickle starts.
        must_end: Whether the data ends with it.

    Returns:
        The tree, within the limits of ``check_tree``, and where the pickle ends.

    Raises:
        FormatError: Not a pickle, or beyond the limits; of kind ``TRUNCATED`` if it goes on after the data.
        UnsupportedError: A pickle of a protocol or with an instruction that no checkpoint needs.
    """
    machine = _Machine(data, start, builder, path)
    try:
        tree = machine.run()
    except IndexError as err:
        # An empty stack; the end of the data is checked wherever something is read.
        raise machine.refuse("an instruction lacks its operands") from err
    if must_end and machine.position != len(data):
        raise machine.refuse("bytes follow its end")
    check_tree(tree, path, nbytes_read=machine.position - start)
    return tree, machine.position


class _Machine:
    """The stack, its marks, the memo. Stacks between marks are lists of their own, so that none is popped across."""

    __slots__ = ("builder", "data", "marks", "max_nbytes", "memo", "path", "position", "room", "stack", "tuple_keys")

    def __init__(self, data: bytes, start: int, builder: Builder, path: Path | None) -> None:
        self.data = data
        self.position = start
        self.builder = builder
        self.path = path
        self.stack: list[Tree] = []
        self.marks: list[list[Tree]] = []
        self.memo: dict[int, Tree] = {}
        self.tuple_keys = 0
        self.room = self.max_nbytes = _FREE_OBJECT_NBYTES + _OBJECT_NBYTES_PER_BYTE * (len(data) - start)

    def run(self) -> Tree:
        if self.take(1) != _PROTO:
            raise self.unsupported("protocol 0 or 1", "protocol 2 to 5")
        _proto(self)
        data, end = self.data, len(self.data)
        while self.position < end:
            opcode = data[self.position]
            self.position += 1
            if opcode == _STOP:
                return self.finish()
            instruction = _INSTRUCTIONS.get(opcode)
            if instruction is None:
                raise self.unsupported(f"the instruction {bytes([opcode])!r}", "instructions that build plain data")
            instruction(self)
        raise self.truncated()

    def finish(self) -> Tree:
        if self.marks or len(self.stack) != 1:
            raise self.refuse("it does not end with one object", found=f"{len(self.stack)} objects")
        return self.stack[0]

    def push(self, value: Tree, nbytes: int) -> None:
        """Put a new object on the stack that takes about so many bytes."""
        self.take_room(nbytes)
        self.stack.append(value)

    def take_room(self, nbytes: int) -> None:
        self.room -= nbytes
        if self.room < 0:
            expected = f"at most {self.max_nbytes} bytes in a pickle of this size"
            raise self.refuse("too many objects", expected=expected, found="more")

    def remember(self, number: int) -> None:
        """Give what is on top of the stack a number."""
        if number not in self.memo:
            self.take_room(_MEMO_NBYTES)
        self.memo[number] = self.stack[-1]

    def take(self, nbytes: int) -> bytes:
        start = self.position
        if nbytes > len(self.data) - start:
            raise self.truncated()
        self.position = start + nbytes
        return self.data[start : self.position]

    def number(self, nbytes: int) -> int:
        # As take(), which every second instruction would call through here.
        start = self.position
        end = start + nbytes
        if end > len(self.data):
            raise self.truncated()
        self.position = end
        return int.from_bytes(self.data[start:end], "little")

    def text(self, nbytes: int) -> str:
        try:
            return str(self.take(nbytes), "utf-8", "surrogatepass")
        except UnicodeDecodeError as err:
            raise self.refuse("a text is not UTF-8") from err

    def line(self) -> str:
        end = self.data.find(b"\n", self.position, self.position + _MAX_NAME_LENGTH + 1)
        if end < 0:
            if len(self.data) - self.position <= _MAX_NAME_LENGTH:
                raise self.truncated()
            raise self.refuse("a name is too long", expected=f"at most {_MAX_NAME_LENGTH} bytes")
        line = self.text(end - self.position)
        self.position += 1
        return line

    def pop_to_mark(self) -> list[Tree]:
        items = self.stack
        self.stack = self.marks.pop()
        return items

    def push_global(self, module: Tree, name: Tree) -> None:
        if not _is_name(module) or not _is_name(name):
            raise self.refuse("the name of a global is unusable")
        found = Global(_PYTHON_3_MODULES.get(module, module), name)
        self.builder.check_global(found)
        self.push(found, _GLOBAL_NBYTES)

    def call(self, function: Tree, arguments: Tree, *, is_call: bool) -> None:
        if type(function) is not Global or type(arguments) is not tuple:
            raise self.refuse("a call of something that has no name")
        if is_call:
            first = arguments[0] if arguments else ()
            if (nbytes_each := _COPY_NBYTES.get(type(first))) is not None:
                self.take_room(nbytes_each * len(first))
            value = self.builder.call(function, arguments)
            self.push(value, _SIZE_NBYTES if type(value) is Size else _CALL_NBYTES)
        else:
            self.push(Instance(function, arguments), _INSTANCE_NBYTES)

    def set_items(self, items: list[Tree]) -> None:
        if len(items) % 2:
            raise self.refuse("a key lacks its value")
        target = self.stack[-1]
        if type(target) is Instance:
            if target.entries is None:
                self.take_room(_DICT_NBYTES)
                target.entries = {}
            entries = target.entries
        elif type(target) is dict or type(target) is OrderedDict:
            entries = target
        else:
            raise self.refuse("entries are set in something that is no mapping", found=type(target).__name__)
        for index in range(0, len(items), 2):
            self.check_key(items[index])
            entries[items[index]] = items[index + 1]

    def append_items(self, items: list[Tree]) -> None:
        target = self.stack[-1]
        if type(target) is Instance:
            if target.items is None:
                target.items = []
            target.items.extend(items)
        elif type(target) is list:
            target.extend(items)
        else:
            raise self.refuse("items are appended to something that is no list", found=type(target).__name__)

    def check_key(self, key: Tree) -> None:
        kind = type(key)
        if kind is str or kind in _ATOMS or kind is Global or kind is Instance:
            return
        if kind is int:
            if key.bit_length() > _MAX_KEY_BITS:
                raise self.refuse("a key is too large a number", expected=f"at most {_MAX_KEY_BITS} bits")
        elif isinstance(key, tuple):
            self.tuple_keys += 1
            if self.tuple_keys > _MAX_TUPLE_KEYS or len(key) > _MAX_TUPLE_KEY_LENGTH:
                raise self.refuse("too many or too long tuples are keys", expected=f"at most {_MAX_TUPLE_KEYS}")
            for item in key:
                if isinstance(item, tuple):  # hashing follows tuples into any depth, and every reference
                    raise self.refuse("a tuple of tuples is a key", expected="plain keys")
                self.check_key(item)
        else:
            raise self.refuse("a key cannot be one", expected="a plain value", found=kind.__name__)

    def truncated(self) -> FormatError:
        hint = "it was not copied or written to its end; take another copy"
        return self._error("it is cut off", TRUNCATED, "its end", f"{len(self.data)} bytes", hint)

    def refuse(self, what: str, *, expected: object = None, found: object = None) -> FormatError:
        return self._error(what, "pickle", expected, found)

    def _error(self, what: str, kind: str, expected: object, found: object, hint: str | None = None) -> FormatError:
        what = f"not a valid pickle: {what} (byte {self.position})"
        return FormatError(what, kind=kind, path=self.path, expected=expected, found=found, hint=hint)

    def unsupported(self, found: str, expected: str) -> UnsupportedError:
        return UnsupportedError(
            "cannot read this pickle", kind="pickle-opcode", path=self.path, expected=expected, found=found
        )


# Python 2's names of modules, which pickles of protocol 2 use. Source: CPython 3.11, Lib/_compat_pickle.py.
_PYTHON_3_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}


def _is_name(value: Tree) -> TypeGuard[str]:
    return type(value) is str and 0 < len(value) <= _MAX_NAME_LENGTH and value.isascii() and value.isprintable()


# Sizes of objects in CPython 3.11 with one or two things in them.
_TUPLE_NBYTES = 64
_LIST_NBYTES = 88
_DICT_NBYTES = _SET_NBYTES = 216
_INSTANCE_NBYTES = _GLOBAL_NBYTES = 160
# An OrderedDict, or a tensor and what describes it.
_CALL_NBYTES = 480
_SIZE_NBYTES = 96
_MEMO_NBYTES = 64
# Sets, sizes and bytes are copies of what the call is given, which the memo can recall any number of times: each item
# takes room, and time, again.
_COPY_NBYTES: dict[type, int] = {list: 64, tuple: 8, Size: 8, str: 8}

# Instructions, by what they do. Each gets its operands from the data after the opcode and from the stack.


def _proto(machine: _Machine) -> None:
    protocol = machine.number(1)
    if not 2 <= protocol <= 5:
        raise machine.unsupported(f"protocol {protocol}", "protocol 2 to 5")


def _frame(machine: _Machine) -> None:
    nbytes = machine.number(8)
    if nbytes > len(machine.data) - machine.position:
        raise machine.truncated()


def _mark(machine: _Machine) -> None:
    machine.take_room(_LIST_NBYTES)
    machine.marks.append(machine.stack)
    machine.stack = []


def _constant(value: Tree) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(value)


def _empty(kind: type, nbytes: int) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(kind(), nbytes)


def _fixed(layout: str) -> Callable[[_Machine], None]:
    unpacker = struct.Struct(layout)
    return lambda machine: machine.stack.append(unpacker.unpack(machine.take(unpacker.size))[0])


def _long(width: int) -> Callable[[_Machine], None]:
    def instruction(machine: _Machine) -> None:
        nbytes = machine.number(width)
        if nbytes > _MAX_INT_NBYTES:
            raise machine.refuse("a number is too large", expected=f"at most {8 * _MAX_INT_NBYTES} bits")
        machine.stack.append(int.from_bytes(machine.take(nbytes), "little", signed=True))

    return instruction


def _text(width: int) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(machine.text(machine.number(width)))


def _bytes(width: int) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(machine.take(machine.number(width)))


def _bytearray(machine: _Machine) -> None:
    content = machine.take(machine.number(8))
    machine.push(Instance(Global("builtins", "bytearray"), (content,), is_call=True), _INSTANCE_NBYTES)


def _tuple(machine: _Machine) -> None:
    items = machine.pop_to_mark()
    machine.push(tuple(items), _TUPLE_NBYTES)


def _short_tuple(length: int) -> Callable[[_Machine], None]:
    def instruction(machine: _Machine) -> None:
        if len(machine.stack) < length:
            raise IndexError
        items = tuple(machine.stack[-length:])
        del machine.stack[-length:]
        machine.push(items, _TUPLE_NBYTES)

    return instruction


def _append(machine: _Machine) -> None:
    machine.append_items([machine.stack.pop()])


def _appends(machine: _Machine) -> None:
    machine.append_items(machine.pop_to_mark())


def _set_item(machine: _Machine) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    machine.set_items([key, value])


def _set_items(machine: _Machine) -> None:
    machine.set_items(machine.pop_to_mark())


def _add_items(machine: _Machine) -> None:
    items = machine.pop_to_mark()
    target = machine.stack[-1]
    if type(target) is not set:
        raise machine.refuse("items are added to something that is no set", found=type(target).__name__)
    for item in items:
        machine.check_key(item)
    target.update(items)


def _frozenset(machine: _Machine) -> None:
    items = machine.pop_to_mark()
    machine.push(Instance(Global("builtins", "frozenset"), (items,), is_call=True), _INSTANCE_NBYTES)


def _global(machine: _Machine) -> None:
    module, name = machine.line(), machine.line()
    machine.push_global(module, name)


def _stack_global(machine: _Machine) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    machine.push_global(module, name)


def _reduce(machine: _Machine) -> None:
    arguments, function = machine.stack.pop(), machine.stack.pop()
    machine.call(function, arguments, is_call=True)


def _new_object(machine: _Machine) -> None:
    arguments, cls = machine.stack.pop(), machine.stack.pop()
    machine.call(cls, arguments, is_call=False)


def _build(machine: _Machine) -> None:
    state = machine.stack.pop()
    target = machine.stack[-1]
    if type(target) is Instance and target.state is None:
        target.state = state
    elif type(target) is OrderedDict and type(state) is dict and list(state) == ["_metadata"]:
        # An attribute of the dict; no other name may be set, or it could hide one of dict's own.
        vars(target)["_metadata"] = state["_metadata"]
    else:
        raise machine.refuse("a state is given to something that has none", found=type(target).__name__)


def _persistent(machine: _Machine) -> None:
    machine.stack.append(machine.builder.persistent(machine.stack.pop()))


def _get(width: int) -> Callable[[_Machine], None]:
    def instruction(machine: _Machine) -> None:
        number = machine.number(width)
        if number not in machine.memo:
            raise machine.refuse("an object is recalled that was never remembered")
        machine.stack.append(machine.memo[number])

    return instruction


def _put(width: int) -> Callable[[_Machine], None]:
    def instruction(machine: _Machine) -> None:
        machine.remember(machine.number(width))

    return instruction


def _memoize(machine: _Machine) -> None:
    machine.remember(len(machine.memo))


_PROTO = b"\x80"
_STOP = ord(".")

_INSTRUCTIONS: dict[int, Callable[[_Machine], None]] = {
    opcode[0]: instruction
    for opcode, instruction in {
        b"\x95": _frame,
        b"(": _mark,
        b"N": _constant(None),
        b"\x88": _constant(True),
        b"\x89": _constant(False),
        b")": _constant(()),
        b"]": _empty(list, _LIST_NBYTES),
        b"}": _empty(dict, _DICT_NBYTES),
        b"\x8f": _empty(set, _SET_NBYTES),
        b"J": _fixed("<i"),
        b"K": _fixed("<B"),
        b"M": _fixed("<H"),
        b"G": _fixed(">d"),
        b"\x8a": _long(1),
        b"\x8b": _long(4),
        b"U": _text(1),  # a text of Python 2, which torch reads as UTF-8, too
        b"T": _text(4),
        b"X": _text(4),
        b"\x8c": _text(1),
        b"\x8d": _text(8),
        b"C": _bytes(1),
        b"B": _bytes(4),
        b"\x8e": _bytes(8),
        b"\x96": _bytearray,
        b"t": _tuple,
        b"\x85": _short_tuple(1),
        b"\x86": _short_tuple(2),
        b"\x87": _short_tuple(3),
        b"a": _append,
        b"e": _appends,
        b"s": _set_item,
        b"u": _set_items,
        b"\x90": _add_items,
        b"\x91": _frozenset,
        b"c": _global,
        b"\x93": _stack_global,
        b"R": _reduce,
        b"\x81": _new_object,
        b"b": _build,
        b"Q": _persistent,
        b"h": _get(1),
        b"j": _get(4),
        b"q": _put(1),
        b"r": _put(4),
        b"\x94": _memoize,
    }.items()
}
