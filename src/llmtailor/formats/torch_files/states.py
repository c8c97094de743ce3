"""What an optimizer remembers of one parameter, between a tree and the leaves and notes of our files.

The same as ``optimizer_values.flatten_state`` and ``restore_state`` for values that were never loaded: tensors stay
references, only Python numbers have values. See the specification, section 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ...catalog import StateRef
from ...errors import UnsupportedError
from ...state_tree import MAX_DEPTH, NUMBERS, Note, assemble, escape, require_number
from ...tensor_refs import TensorRef
from ..numbers import inline_number, read_number
from .nodes import Global, Instance, TorchTensor, Tree

__all__ = ["read_state", "write_state"]


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
            tensors[path] = inline_number(value, NUMBERS[type(value).__name__].dtype)
    return StateRef(tensors=tensors, notes=notes)


def _walk(path: str, value: Tree, fqn: str) -> Iterator[tuple[str, Tree]]:
    """Every path with its value, containers before what is in them; without the root."""
    if path:
        yield path, value
    if path.count("/") >= MAX_DEPTH:
        raise _refuse(path[:200], fqn, f"containers nested more than {MAX_DEPTH} deep")
    children: Iterable[tuple[Any, Tree]] = ()
    if type(value) is dict:
        children = value.items()
    elif type(value) in (list, tuple):
        children = ((str(index), item) for index, item in enumerate(value))
    for key, child in children:
        if type(key) is not str or not key:
            raise _refuse(path[:200], fqn, f"a name that is {_describe(key)}")
        yield from _walk(f"{path}/{escape(key)}" if path else escape(key), child, fqn)


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
    return assemble(state.tensors, state.notes, None, _leaf)


def _leaf(path: str, ref: TensorRef, note: Note | None) -> Tree:
    if note is None:
        return TorchTensor(ref=ref)
    require_number(path, ref.meta, note, None)
    return read_number(ref)
