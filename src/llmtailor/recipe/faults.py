"""All that is wrong with a recipe, gathered in one pass and raised as one error."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import IncompatibleError, IncompleteError, InvalidInputError, TailorError, UnsupportedError

__all__ = ["Faults", "Place"]

# A recipe that is one long mistake needs no message of its own length.
_MAX_SHOWN = 25
_MAX_TEXT = 200
# Lines of a list start below the first one; see TailorError.__str__.
_INDENT = "\n" + " " * 12
# The class of faults of several kinds: wrong wording has to be mended before anything else can be judged.
_GRAVITY: tuple[type[TailorError], ...] = (InvalidInputError, IncompatibleError, IncompleteError, UnsupportedError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A place in a YAML document."""

    path: str
    """``$.slices[0].sources[1].layer_range``; a key that is no plain word is ``$.layers["norm, lm_head"]``."""
    line: int
    """From 1."""
    column: int
    """From 1."""

    def __str__(self) -> str:
        return f"{self.path} (line {self.line}, column {self.column})"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fault:
    kind: str
    what: str
    error: type[TailorError]
    place: Place | None
    layer: str | None
    expected: str | None
    found: str | None
    hint: str | None

    @property
    def text(self) -> str:
        """The fault in one line, as it stands among others."""
        facts = (("expected", self.expected), ("found", self.found), ("next", self.hint))
        where = "" if self.place is None else f"{self.place}: "
        return "; ".join([f"{where}{self.what}", *(f"{name}: {fact}" for name, fact in facts if fact is not None)])


class Faults:
    """A list that starts empty and, if it does not stay so, becomes an exception.

    Args:
        what: The sentence the error starts with ("the recipe is wrong").
        path: The recipe's file.
    """

    def __init__(self, what: str, path: str) -> None:
        self._what = what
        self._path = path
        self._faults: list[_Fault] = []

    def add(
        self,
        kind: str,
        what: str,
        *,
        place: Place | None = None,
        error: type[TailorError] = InvalidInputError,
        layer: str | None = None,
        expected: str | None = None,
        found: str | None = None,
        hint: str | None = None,
    ) -> None:
        """Note a fault; see ``TailorError`` for what the words are."""
        assert error in _GRAVITY, error
        shown = None if found is None or len(found) <= _MAX_TEXT else f"{found[:_MAX_TEXT]}..."
        self._faults.append(
            _Fault(
                kind=kind,
                what=what,
                error=error,
                place=place,
                layer=layer,
                expected=expected,
                found=shown or found,
                hint=hint,
            )
        )

    def near(self, name: str, known: Iterable[str], otherwise: str | None = None) -> str | None:
        """A hint for the next fault: ``did you mean ...?`` with the names that resemble this one, else another."""
        # Comparing is slow, and what is not shown needs no hint.
        if len(self._faults) >= _MAX_SHOWN:
            return None
        near = difflib.get_close_matches(name[:_MAX_TEXT], list(known), n=3)
        return f"did you mean {', '.join(near)}?" if near else otherwise

    def __len__(self) -> int:
        return len(self._faults)

    def raise_any(self) -> None:
        """Raise what was noted, if anything was.

        Raises:
            TailorError: A single fault as itself; several as one error of kind ``recipe-faults`` that lists them. Its
                class is ``InvalidInputError`` if any fault is one, else ``IncompatibleError``, else
                ``IncompleteError``, else ``UnsupportedError``.
        """
        if not self._faults:
            return
        if len(self._faults) == 1:
            raise self._alone(self._faults[0])
        kinds = {fault.error for fault in self._faults}
        error = next(error for error in _GRAVITY if error in kinds)
        lines = [fault.text for fault in self._faults[:_MAX_SHOWN]]
        if len(self._faults) > _MAX_SHOWN:
            lines.append(f"... and {len(self._faults) - _MAX_SHOWN} more")
        raise error(
            f"{self._what} in {len(self._faults)} places",
            kind="recipe-faults",
            path=self._path,
            found=_INDENT.join(lines),
        )

    def _alone(self, fault: _Fault) -> TailorError:
        where = "" if fault.place is None else f" at {fault.place}"
        return fault.error(
            f"{self._what}{where}: {fault.what}",
            kind=fault.kind,
            path=self._path,
            layer=fault.layer,
            expected=fault.expected,
            found=fault.found,
            hint=fault.hint,
        )
