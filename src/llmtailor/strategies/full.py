"""Every layer at every save."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .arguments import format_call
from .context import SaveContext, Strategy

__all__ = ["Full"]


@dataclass(frozen=True)
class Full(Strategy):
    """Write every layer at every save: no layer is ever stale, so there is no ``max_age``."""

    max_age: ClassVar[None] = None  # type: ignore[misc]

    def select(self, context: SaveContext) -> frozenset[str]:
        """All layers."""
        return frozenset(layer.name for layer in context.layers)

    @property
    def text(self) -> str:
        """``full()``."""
        return format_call("full")
