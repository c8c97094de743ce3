"""The tree in a pickle: plain values and inert nodes. Building it imports nothing and calls nothing.

A *tree* is None, bool, int, float, str, bytes, list, tuple, dict, set, ``collections.OrderedDict``, or one of the nodes
below. Containers may be shared (the same object at two places), never cyclic, and are at most ``MAX_DEPTH`` deep, so
recursion over a tree that was read is safe. An ``OrderedDict`` may carry the attribute ``_metadata`` that
``torch.nn.Module.state_dict`` gives it; ``metadata_of`` reads it. Names of globals are Python 3's (``builtins.set``).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, TypeAlias

from ...tensor_refs import TensorRef

__all__ = ["MAX_DEPTH", "Global", "Instance", "Size", "TorchStorage", "TorchTensor", "Tree", "metadata_of"]

Tree: TypeAlias = Any
"""See the module's docstring; recursive types do not help a reader here."""

MAX_DEPTH = 64
"""Containers and instances inside each other; real files have a dozen."""


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function by name; never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Size(tuple[int, ...]):
    """A ``torch.Size``."""

    __slots__ = ()


@dataclass(slots=True, eq=False)
class Instance:
    """An object of some class, or the result of some call; nothing was called."""

    cls: Global
    arguments: tuple[Tree, ...] = ()
    """What it was made from."""
    is_call: bool = False
    """Made by calling ``cls(*arguments)`` (REDUCE) rather than ``cls.__new__(cls, *arguments)`` (NEWOBJ)."""
    state: Tree = None
    """What BUILD gave it: as a rule the instance's ``__dict__``."""
    items: list[Tree] | None = None
    """What was appended to it."""
    entries: dict[Tree, Tree] | None = None
    """What was set in it by key."""


@dataclass(slots=True, eq=False, kw_only=True)
class TorchTensor:
    """A tensor in the tree. Two nodes with the same ``ref`` object share one storage when written."""

    ref: TensorRef
    requires_grad: bool = False
    is_parameter: bool = False
    """A ``torch.nn.Parameter``."""


@dataclass(slots=True, eq=False, kw_only=True)
class TorchStorage:
    """A storage in the tree without a tensor around it, or as an argument of a call that has no node of its own."""

    ref: TensorRef
    """Its bytes, U8, 1-dim."""
    cls: Global
    """``torch.FloatStorage``, ``torch.storage.UntypedStorage``, ..."""


def metadata_of(mapping: OrderedDict[Any, Tree]) -> Tree:
    """What ``torch.nn.Module.state_dict`` notes of the modules' versions beside the entries; None if nothing."""
    return vars(mapping).get("_metadata")
