"""What every report can do, so that one sink can show any of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["Report"]


class Report(Protocol):
    """A finished answer in three forms. Only ``tables`` needs rich."""

    def tables(self) -> Iterable[RenderableType]:
        """For people: what to print, in order."""

    def record(self) -> Any:
        """For programs: what ``json.dumps`` takes."""

    def names(self) -> Iterable[str]:
        """For pipes: the paths it is about, one a line."""
