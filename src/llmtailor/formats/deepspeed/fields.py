"""Values in a tree that nobody vouches for, by key and type."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ...errors import FormatError
from ..torch_files import TorchTensor, Tree

__all__ = ["refuse", "require", "require_list_of", "require_shape", "require_tensors"]

_Kind = TypeVar("_Kind")
_MAX_NUMEL = 2**53


def refuse(what: str, path: Path, *, expected: object, found: object, fqn: str | None = None) -> FormatError:
    """The error for a file that is not as DeepSpeed writes it."""
    return FormatError(
        f"not a file that DeepSpeed wrote: {what}",
        kind="deepspeed-file",
        path=path,
        fqn=fqn,
        expected=expected,
        found=found,
        hint="the file is damaged or of an unknown version of DeepSpeed; take another checkpoint",
    )


def require(tree: Tree, key: Any, kind: type[_Kind], path: Path) -> _Kind:
    """The value at a key, of a type; True is no int.

    Raises:
        FormatError: There is none, or of another type.
    """
    if not isinstance(tree, Mapping) or key not in tree:
        raise refuse(f"{key!r} is missing", path, expected=f"{key!r}", found=_describe(tree))
    value = tree[key]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise refuse(f"{key!r} is of another type", path, expected=kind.__name__, found=type(value).__name__)
    return value


def require_list_of(tree: Tree, key: Any, kind: type[_Kind], path: Path) -> Sequence[_Kind]:
    """The list at a key, of values of one type.

    Raises:
        FormatError: There is none, or something else is in it.
    """
    values = require(tree, key, list, path)
    for value in values:
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise refuse(
                f"{key!r} holds values of another type", path, expected=kind.__name__, found=type(value).__name__
            )
    return values


def require_tensors(tree: Tree, key: Any, path: Path) -> Sequence[TorchTensor]:
    """The flat tensors at a key.

    Raises:
        FormatError: There are none, or one is not flat.
    """
    tensors = require_list_of(tree, key, TorchTensor, path)
    for tensor in tensors:
        if len(tensor.ref.meta.shape) != 1:
            raise refuse(f"a tensor of {key!r} is not flat", path, expected="1 dimension", found=tensor.ref.meta)
    return tensors


def require_shape(name: Any, value: Tree, path: Path) -> tuple[str, tuple[int, ...]]:
    """A parameter's name and shape.

    Raises:
        FormatError: It is none.
    """
    if not isinstance(name, str) or not name or not name.isprintable() or len(name) > 1024:
        raise refuse("a parameter's name is unusable", path, expected="printable text", found=ascii(name)[:80])
    is_shape = isinstance(value, tuple | list) and len(value) <= 64
    if not is_shape or not all(type(size) is int and 0 <= size <= _MAX_NUMEL for size in value):
        raise refuse("a parameter's shape is none", path, expected="sizes", found=ascii(value)[:80], fqn=name)
    if math.prod(value) > _MAX_NUMEL:
        raise refuse("a parameter is too large", path, expected=f"<= {_MAX_NUMEL} elements", found=value, fqn=name)
    return name, tuple(value)


def _describe(tree: Tree) -> str:
    if isinstance(tree, Mapping):
        return ", ".join(sorted(map(ascii, tree))[:12]) or "an empty dict"
    return type(tree).__name__
