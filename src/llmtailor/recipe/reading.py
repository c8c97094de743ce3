"""Typed access to what a YAML document holds: what is wrong is noted, and a stand-in goes on in its place.

So one pass finds every fault. A stand-in never leaves the parser, which raises what was noted before it returns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from .faults import Faults
from .yaml_text import Item

__all__ = ["Reader"]

_MAX_PATH = 4096
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class Reader:
    """Reads items as what they should be.

    Args:
        faults: Where to note what is wrong.
    """

    def __init__(self, faults: Faults) -> None:
        self.faults = faults

    def fields(
        self, item: Item, keys: Sequence[str], *, required: Sequence[str] = (), form: str, what: str = "a mapping"
    ) -> Mapping[str, Item]:
        """The entries of a mapping, of which only ``keys`` are known and ``required`` must be there.

        An entry that holds nothing (``base:``) counts as absent.
        """
        if not isinstance(item.value, Mapping):
            self.refuse(item, "type", f"expected {what}", expected=form)
            return {}
        for key, entry in item.value.items():
            if key not in keys:
                self.faults.add(
                    "unknown-key",
                    f"there is no key {key[:80]!r}",
                    place=entry.key_place,
                    expected=", ".join(keys),
                    hint=self.faults.near(key, keys),
                )
        found = {key: entry for key, entry in item.value.items() if key in keys and entry.value is not None}
        for key in required:
            if key not in found:
                self.faults.add("missing-key", f"the key {key!r} is missing", place=item.place, expected=form)
        return found

    def items(self, item: Item, *, form: str) -> tuple[Item, ...]:
        """The entries of a list that is not empty."""
        if isinstance(item.value, tuple) and item.value:
            return item.value
        self.refuse(item, "type", "expected a list that is not empty", expected=form)
        return ()

    def text(self, item: Item, *, form: str) -> str:
        """One line of text that is not empty."""
        if not isinstance(item.value, str):
            self.refuse(item, "type", "expected a text", expected=f"{form}; in quotes if it looks like something else")
            return ""
        if not item.value.strip() or _CONTROL.search(item.value):
            self.refuse(item, "text", "expected one line of text that is not empty", expected=form)
        return item.value

    def path(self, item: Item) -> str:
        """A checkpoint's path, as written."""
        text = self.text(item, form="the path of a checkpoint, as text")
        if len(text) > _MAX_PATH:
            self.refuse(item, "text", "a path that is too long", expected=f"at most {_MAX_PATH} characters")
        return text

    def whole(self, item: Item, *, form: str) -> int:
        """A whole number, 0 or more."""
        if isinstance(item.value, int) and not isinstance(item.value, bool) and item.value >= 0:
            return item.value
        self.refuse(item, "type", "expected a whole number, 0 or more", expected=form)
        return 0

    def number(self, item: Item, *, form: str) -> float:
        """A finite number."""
        if isinstance(item.value, int | float) and not isinstance(item.value, bool):
            return float(item.value)
        self.refuse(item, "type", "expected a number", expected=form)
        return 0.0

    def truth(self, item: Item) -> bool:
        """``true`` or ``false``."""
        if isinstance(item.value, bool):
            return item.value
        self.refuse(item, "type", "expected true or false", expected="true or false, without quotes")
        return False

    def choice(self, item: Item, known: Sequence[str]) -> str:
        """One of some words."""
        if isinstance(item.value, str) and item.value in known:
            return item.value
        near = self.faults.near(item.value, known) if isinstance(item.value, str) else None
        self.refuse(item, "unknown-value", "expected one of some words", expected=", ".join(known), hint=near)
        return known[0]

    def refuse(self, item: Item, kind: str, what: str, *, expected: str, hint: str | None = None) -> None:
        """Note that an item is not what it should be; shows what it is."""
        self.faults.add(kind, what, place=item.place, expected=expected, found=_show(item), hint=hint)


def _show(item: Item) -> str:
    match item.value:
        case Mapping():
            return "a mapping"
        case tuple():
            return "an empty list" if not item.value else f"a list of {len(item.value)}"
        case None:
            return "nothing"
        case bool():
            return str(item.value).lower()
        case value:
            return repr(value)
