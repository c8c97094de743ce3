"""Limits of a tree: not cyclic, not deep, not many nodes, also for who walks it without care.

A pickle of a few hundred bytes can describe a list inside a list 40 times over, each twice in the next: 40 objects, and
10^12 steps for a walk that does not notice the sharing. Such a tree is refused here, once, for everybody.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

from ...errors import FormatError
from .nodes import MAX_DEPTH, Global, Instance, Size, TorchStorage, TorchTensor, Tree, metadata_of

__all__ = ["check_tree", "children_of"]

# Nodes take more memory than what asks for them, so there may be so many in any file, and the more, the more was read.
# Real files have one in 20 bytes or more.
_FREE_NODES = 1_000_000
_NBYTES_PER_NODE = 8
# Steps of a walk that follows every reference: so many in any tree, and the more, the more nodes there are without
# following. Sharing in real files saves a factor of two or three; ``.metadata`` of DCP has four leaves to a node.
_FREE_EXPANDED = 20_000_000
_EXPANDED_PER_NODE = 8

_LEAVES = frozenset({type(None), bool, int, float, str, bytes, Size, Global, TorchTensor, TorchStorage})


def children_of(node: Tree) -> Iterator[Tree]:
    """What is directly inside a node: of a mapping keys and values."""
    match node:
        case list() | tuple() | set():
            yield from node
        case dict():
            yield from node.keys()
            yield from node.values()
            if isinstance(node, OrderedDict) and (metadata := metadata_of(node)) is not None:
                yield metadata
        case Instance():
            yield from node.arguments
            yield node.state
            yield from node.items or ()
            if node.entries:
                yield from node.entries.keys()
                yield from node.entries.values()


def check_tree(tree: Tree, path: Path | None, *, nbytes_read: int | None = None) -> None:
    """Check the limits, without recursion.

    Args:
        tree: Any; made of nodes alone.
        path: The file it is from, for the error.
        nbytes_read: Of the pickle it was made from; None if it was put together here, of what passed this check.

    Raises:
        FormatError: It holds itself, is deeper than ``MAX_DEPTH`` or has too many nodes.
    """
    # Depth and size with every reference followed, by node, once it is done; None while it is open.
    done: dict[int, tuple[int, int] | None] = {}
    open_nodes: list[tuple[Tree, Iterator[Tree], list[int]]] = []

    max_nodes = math.inf if nbytes_read is None else _FREE_NODES + nbytes_read // _NBYTES_PER_NODE

    def enter(node: Tree) -> None:
        if len(done) >= max_nodes:
            expected = f"at most {max_nodes} in a pickle of {nbytes_read} bytes"
            raise _refuse(path, "too many objects", expected, "more")
        if len(open_nodes) >= MAX_DEPTH:
            raise _too_deep(path)
        done[id(node)] = None
        open_nodes.append((node, children_of(node), [0, 1]))

    if type(tree) not in _LEAVES:
        enter(tree)
    while open_nodes:
        node, children, totals = open_nodes[-1]
        for child in children:
            if type(child) in _LEAVES:
                totals[1] += 1
                continue
            if id(child) not in done:
                enter(child)
                break
            known = done[id(child)]
            if known is None:
                raise _refuse(path, "an object that holds itself", "a tree", type(child).__name__)
            _add(totals, known, len(done), path)
        else:
            open_nodes.pop()
            known = done[id(node)] = (totals[0] + 1, totals[1])
            if open_nodes:
                _add(open_nodes[-1][2], known, len(done), path)


def _add(totals: list[int], child: tuple[int, int], num_nodes: int, path: Path | None) -> None:
    totals[0] = max(totals[0], child[0])
    totals[1] += child[1]
    if totals[0] >= MAX_DEPTH:
        raise _too_deep(path)
    max_expanded = _FREE_EXPANDED + _EXPANDED_PER_NODE * num_nodes
    if totals[1] > max_expanded:
        raise _refuse(path, "objects shared beyond measure", f"at most {max_expanded} when written out", "more")


def _too_deep(path: Path | None) -> FormatError:
    return _refuse(path, "objects too deep inside each other", f"at most {MAX_DEPTH} levels", "more")


def _refuse(path: Path | None, what: str, expected: str, found: str) -> FormatError:
    return FormatError(f"not a valid pickle: {what}", kind="pickle-tree", path=path, expected=expected, found=found)
