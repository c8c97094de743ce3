"""A recipe that was written for the user."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["ComposedRecipe"]


@dataclass(frozen=True, slots=True)
class ComposedRecipe:
    """What ``llmtailor plan RUN`` shows."""

    text: str
    path: Path | None
    """The file it was written to; None if it is only shown."""

    def names(self) -> list[str]:
        return [] if self.path is None else [str(self.path)]

    def record(self) -> dict[str, Any]:
        return {"recipe": self.text, "path": None if self.path is None else str(self.path)}

    def tables(self) -> Iterator[RenderableType]:
        from .tables import line

        if self.path is None:
            yield from (line(each) for each in self.text.splitlines())
        else:
            yield line(f"wrote {self.path}; llmtailor plan {self.path} shows what it would do")
