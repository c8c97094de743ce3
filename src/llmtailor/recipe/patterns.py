"""Layers as a recipe names them: ``layers.0-15, norm``, ``layers.*``.

A text is patterns with commas between. A pattern with ``*``, ``?`` or ``[`` is a glob on whole layer names; one that
ends in two numbers with a dash is a range, both ends included; anything else is a name. What would be taken for
something else is written as a glob of one character: ``[,]``, ``[-]``, ``[*]``.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

__all__ = ["LayerNames", "LayerRange", "find_range", "split_patterns", "summarize_names", "write_patterns"]

_RANGE = re.compile(r"(|.*\.)(0|[1-9][0-9]{0,8})-(0|[1-9][0-9]{0,8})", re.DOTALL)
_NUMBERED = re.compile(r"(|.*\.)(0|[1-9][0-9]{0,8})", re.DOTALL)
_GLOB = re.compile(r"[*?\[]")
# A comma in brackets does not end a pattern.
_PIECE = re.compile(r"\[!?\]?[^\]]*\]|,|[^,\[]+|\[", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRange:
    """``layers.0-15``."""

    prefix: str
    """With its dot: ``layers.``; empty for a model whose blocks are its own children."""
    first: int
    last: int
    """Included."""


def split_patterns(text: str) -> tuple[str, ...]:
    """The patterns of a text, without the blanks around them; an empty one where a comma is too many."""
    patterns = [""]
    for piece in _PIECE.findall(text):
        if piece == ",":
            patterns.append("")
        else:
            patterns[-1] += piece
    return tuple(pattern.strip() for pattern in patterns)


def find_range(pattern: str) -> LayerRange | None:
    """The range that a pattern is, or None."""
    found = None if _GLOB.search(pattern) else _RANGE.fullmatch(pattern)
    return found and LayerRange(prefix=found[1], first=int(found[2]), last=int(found[3]))


class LayerNames:
    """The layers that patterns are matched against, in model order."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)
        self._known = frozenset(self.names)
        self._numbered: dict[str, dict[int, str]] = defaultdict(dict)
        for name in self.names:
            if (numbered := _NUMBERED.fullmatch(name)) is not None:
                self._numbered[numbered[1]][int(numbered[2])] = name

    def match(self, pattern: str) -> tuple[str, ...]:
        """The names that a pattern takes, in model order; of a range only those that there are."""
        if _GLOB.search(pattern):
            return tuple(name for name in self.names if fnmatchcase(name, pattern))
        if (wanted := find_range(pattern)) is None:
            return (pattern,) if pattern in self._known else ()
        # Never as long as the range says: nobody has 10**9 layers.
        there = self._numbered.get(wanted.prefix, {})
        return tuple(name for number, name in sorted(there.items()) if wanted.first <= number <= wanted.last)


def write_patterns(names: Sequence[str]) -> tuple[str, ...]:
    """Patterns that take these names and no others; numbers that follow each other become ranges."""
    return tuple(
        _escape(run[0]) if len(run) == 1 else f"{_escape(run[0])}-{_number_of(run[-1])}" for run in _runs(names)
    )


def summarize_names(names: Sequence[str], *, most: int = 12) -> str:
    """Names for an error: ``layers.0-15, norm``, cut off where there are too many."""
    runs = [run[0] if len(run) == 1 else f"{run[0]}-{_number_of(run[-1])}" for run in _runs(names)]
    rest = [f"... and {len(runs) - most} more"] if len(runs) > most else []
    return ", ".join(runs[:most] + rest)


def _runs(names: Sequence[str]) -> Iterator[list[str]]:
    """The names, cut wherever one does not follow the one before it by number."""
    run: list[str] = []
    for name in names:
        if run and not _follows(run[-1], name):
            yield run
            run = []
        run.append(name)
    if run:
        yield run


def _follows(before: str, after: str) -> bool:
    left, right = _NUMBERED.fullmatch(before), _NUMBERED.fullmatch(after)
    # A prefix that is a glob or holds a comma has to be escaped, and then the range would be taken for a glob.
    if left is None or right is None or left[1] != right[1] or _escape(left[1]) != left[1]:
        return False
    return int(right[2]) == int(left[2]) + 1


def _number_of(name: str) -> str:
    return name.rpartition(".")[2]


def _escape(name: str) -> str:
    escaped = re.sub(r"[*?\[,]", lambda found: f"[{found[0]}]", name)
    escaped = re.sub(r"\A\s|\s\Z", lambda found: f"[{found[0]}]", escaped)
    return escaped if _RANGE.fullmatch(escaped) is None else escaped.replace("-", "[-]")
