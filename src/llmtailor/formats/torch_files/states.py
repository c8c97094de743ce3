"""What an optimizer remembers of one parameter, between a tree and the leaves and notes of our files.

The same as ``optimizer_values.flatten_state`` and ``restore_state`` for values that were never loaded: tensors stay
references, only Python numbers have values. See the specification, section 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from ...catalog import Note, StateRef
from ...errors import FormatError, UnsupportedError
from ...tensor_refs import TensorRef
from ...tensors import TensorMeta
from .nodes import Global, Instance, TorchTensor, Tree
from .numbers import inline_number, read_number

__all__ = ["read_state", "write_state"]

_NUMBERS = {"bool": "BOOL", "int": "I64", "float": "F64"}
_MAX_DEPTH = 32


def read_state(tree: Mapping[Any, Tree], fqn: str) -> StateRef:
    """The state of one parameter, taken apart into tensors by path.

    Args:
        tree: Name -> value, as in ``optimizer.state_dict()["state"][index]``.
        fqn: The parameter, for the error.

    Raises:
        UnsupportedError: A value has no exact form in a file; names the path and the type.
    """
    tensors: dict[str, TensorRef] = {}
    notes: dict[str, Note] = {}
    for path, value in _walk("", dict(tree), fqn):
        if isinstance(value, TorchTensor):
            tensors[path] = value.ref
            continue
        notes[path] = _note_of(path, value, fqn)
        if type(value) in (bool, int, float):
            tensors[path] = inline_number(value, _NUMBERS[type(value).__name__])
    return StateRef(tensors=tensors, notes=notes)


def _walk(path: str, value: Tree, fqn: str) -> Iterator[tuple[str, Tree]]:
    """Every path with its value, containers before what is in them; without the root."""
    if path:
        yield path, value
    if path.count("/") >= _MAX_DEPTH:
        raise _refuse(path[:200], fqn, f"containers nested more than {_MAX_DEPTH} deep")
    children: Iterable[tuple[Any, Tree]] = ()
    if type(value) is dict:
        children = value.items()
    elif type(value) in (list, tuple):
        children = ((str(index), item) for index, item in enumerate(value))
    for key, child in children:
        if type(key) is not str or not key:
            raise _refuse(path[:200], fqn, f"a name that is {_describe(key)}")
        yield from _walk(f"{path}/{_escape(key)}" if path else _escape(key), child, fqn)


def _note_of(path: str, value: Tree, fqn: str) -> Note:
    kind = type(value)
    if value is None:
        return "none"
    if kind is int and not -(2**63) <= value < 2**63:
        raise _refuse(path, fqn, "an int of more than 64 bits")
    if kind in (bool, int, float):
        return kind.__name__
    if kind is str:
        return {"str": value}
    if kind is dict:
        return {"dict": list(value)}
    if kind in (list, tuple):
        return {kind.__name__: len(value)}
    raise _refuse(path, fqn, _describe(value))


def _describe(value: Tree) -> str:
    if isinstance(value, Instance):
        return str(value.cls)
    if isinstance(value, Global):
        return f"the class {value}"
    return f"an empty {type(value).__name__}" if value in ("", b"") else f"a {type(value).__name__}"


def _refuse(path: str, fqn: str, found: str) -> UnsupportedError:
    return UnsupportedError(
        f"cannot take over the optimizer's state {path!r}: there is no exact form of it in a file yet",
        kind="optimizer-state-type",
        fqn=fqn,
        expected="a plain tensor, int, float, bool, str, None, or dict, list or tuple of these",
        found=found,
    )


def write_state(state: StateRef) -> dict[str, Tree]:
    """The state of one parameter as a tree; inverse of ``read_state``. Numbers in files are read, tensors are not.

    Raises:
        FormatError: Tensors and notes do not fit together.
    """
    children = _children_by_path([*state.tensors, *state.notes])

    def build(path: str) -> Tree:
        below = children.get(path, {})
        note = state.notes.get(path)
        if path in state.tensors:
            if below:
                raise _misfit(path, "a tensor or a container", "both")
            return _leaf(path, state.tensors[path], note)
        kind, content = _read_note(path, {"dict": [unquote(name) for name in below]} if note is None else note, below)
        if kind == "dict":
            return {key: build(below[_escape(key)]) for key in content}
        if kind in ("list", "tuple"):
            items = [build(below[str(index)]) for index in range(content)]
            return items if kind == "list" else tuple(items)
        return content

    return {unquote(name): build(path) for name, path in children.get("", {}).items()}


def _leaf(path: str, ref: TensorRef, note: Note | None) -> Tree:
    if note is None:
        return TorchTensor(ref=ref)
    if not isinstance(note, str) or ref.meta != TensorMeta(dtype=_NUMBERS.get(note, ""), shape=()):
        raise _misfit(path, f"the tensor of a Python number, for the note {note!r}", str(ref.meta))
    return read_number(ref)


def _read_note(path: str, note: Note, below: Mapping[str, str]) -> tuple[str, Any]:
    """Kind and content of the note of a value without a tensor, checked against the names below it."""
    if note == "none" and not below:
        return "none", None
    match note:
        case {"str": str(text), **rest} if not rest and not below:
            return "str", text
        case {"dict": list(keys), **rest} if not rest and all(isinstance(key, str) for key in keys):
            if sorted(map(_escape, keys)) == sorted(below):
                return "dict", keys
        case {"list": int(length), **rest} | {"tuple": int(length), **rest} if not rest and length == len(below):
            if all(str(index) in below for index in range(length)):
                return next(iter(note)), length
    raise _misfit(path, f"what its note {note!r} says", f"{sorted(below)} below it" if below else "nothing below it")


def _children_by_path(paths: list[str]) -> dict[str, dict[str, str]]:
    """Container path -> name -> path, in the order of the paths; the state itself is the container ''."""
    children: dict[str, dict[str, str]] = {}
    for path in paths:
        if not path or path.count("/") >= _MAX_DEPTH or "" in path.split("/"):
            raise _misfit(path[:200], f"names joined by /, at most {_MAX_DEPTH}", "another path")
        rest = path
        while rest:
            parent, _, name = rest.rpartition("/")
            children.setdefault(parent, {})[name] = rest
            rest = parent
    return children


def _misfit(path: str, expected: str, found: str) -> FormatError:
    return FormatError(
        f"optimizer state {path!r} cannot be put together: tensors and notes do not fit",
        kind="optimizer-notes",
        expected=expected[:500],
        found=found[:500],
        hint="llmtailor verify tells whether the file was damaged",
    )


def _escape(name: str) -> str:
    # '.' too, so that the last one in "state.<fqn>.<path>" ends the fqn.
    return name.replace("%", "%25").replace("/", "%2F").replace(".", "%2E")
