"""The state of one parameter is a tree; a file holds its leaves by path, and notes on what leaves cannot say.

Knows neither torch nor files; ``optimizer_values`` and ``formats.torch_files`` make the leaves, each of its own kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypeVar
from urllib.parse import unquote

from .errors import FormatError
from .tensors import TensorMeta

__all__ = ["MAX_DEPTH", "NUMBERS", "Note", "assemble", "escape", "require_number"]

Note: TypeAlias = str | dict[str, Any]
"""``"int"``, ``"float"``, ``"bool"``: the leaf was a Python number. ``"none"``. ``{"str": text}``.
``{"dict": [key, ...]}``, ``{"list": length}``, ``{"tuple": length}``: a container of the paths below this one."""

_Leaf = TypeVar("_Leaf")

# Python numbers by the note that tells them from tensors; 0-dim.
NUMBERS = {
    "bool": TensorMeta(dtype="BOOL", shape=()),
    "int": TensorMeta(dtype="I64", shape=()),
    "float": TensorMeta(dtype="F64", shape=()),
}
MAX_DEPTH = 32  # bounds the recursion on a value that holds itself and on a hostile path


def require_number(path: str, meta: TensorMeta, note: Note, fqn: str | None) -> None:
    """Check that a leaf with a note is the tensor of a Python number.

    Raises:
        FormatError: It is not.
    """
    if not isinstance(note, str) or NUMBERS.get(note) != meta:
        raise _misfit(path, fqn, f"the tensor of a Python number, for the note {note!r}", str(meta))


def assemble(
    leaves: Mapping[str, _Leaf],
    notes: Mapping[str, Note],
    fqn: str | None,
    make: Callable[[str, _Leaf, Note | None], object],
) -> dict[str, Any]:
    """Put the containers of a state together.

    Args:
        leaves: By path.
        notes: By path; a container without a note is a dict.
        fqn: The parameter, for the error.
        make: (path, leaf, its note) -> the value that stands for the leaf.

    Raises:
        FormatError: Leaves and notes do not fit together.
    """
    children = _children_by_path([*leaves, *notes], fqn)

    def build(path: str) -> object:
        below = children.get(path, {})
        if path in leaves:
            if below:
                raise _misfit(path, fqn, "a tensor or a container", "both")
            return make(path, leaves[path], notes.get(path))
        kind, content = _read_note(path, notes.get(path, {"dict": [unquote(name) for name in below]}), below, fqn)
        if kind == "dict":
            return {key: build(below[escape(key)]) for key in content}
        if kind in ("list", "tuple"):
            items = [build(below[str(index)]) for index in range(content)]
            return items if kind == "list" else tuple(items)
        return content

    return {unquote(name): build(path) for name, path in children.get("", {}).items()}


def _read_note(path: str, note: Note, below: Mapping[str, str], fqn: str | None) -> tuple[str, Any]:
    """Kind and content of the note of a value without a tensor, checked against the names below it."""
    if note == "none" and not below:
        return "none", None
    match note:
        case {"str": str(text), **rest} if not rest and not below:
            return "str", text
        case {"dict": list(keys), **rest} if not rest and all(isinstance(key, str) for key in keys):
            if sorted(map(escape, keys)) == sorted(below):
                return "dict", keys
        case {"list": int(length), **rest} | {"tuple": int(length), **rest} if not rest and length == len(below):
            if all(str(index) in below for index in range(length)):
                return next(iter(note)), length
    found = f"{sorted(below)} below it" if below else "nothing below it"
    raise _misfit(path, fqn, f"what its note {note!r} says", found)


def _children_by_path(paths: list[str], fqn: str | None) -> dict[str, dict[str, str]]:
    """Container path -> name -> path, in the order of the paths; the state itself is the container ''."""
    children: dict[str, dict[str, str]] = {}
    for path in paths:
        if not path or path.count("/") >= MAX_DEPTH or "" in path.split("/"):
            raise _misfit(path[:200], fqn, f"names joined by /, at most {MAX_DEPTH}", "another path")
        rest = path
        while rest:
            parent, _, name = rest.rpartition("/")
            children.setdefault(parent, {})[name] = rest
            rest = parent
    return children


def _misfit(path: str, fqn: str | None, expected: str, found: str) -> FormatError:
    return FormatError(
        f"optimizer state {path!r} cannot be put together: tensors and notes do not fit",
        kind="optimizer-notes",
        fqn=fqn,
        expected=expected[:500],
        found=found[:500],
        hint="llmtailor verify tells whether the file was damaged",
    )


def escape(name: str) -> str:
    """A name as it stands in a path."""
    # '.' too, so that the last one in "state.<fqn>.<path>" ends the fqn.
    return name.replace("%", "%25").replace("/", "%2F").replace(".", "%2E")
